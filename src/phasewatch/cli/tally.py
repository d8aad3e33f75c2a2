"""The grid as it fills: recipes by models, and how many cells of each are through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from phasewatch.train.cell import Cell

Counts = dict[tuple[str, str], int]  # (recipe, model) → cells that are through


@contextmanager
def tallying(*, quiet: bool = False) -> Iterator[Callable[[Cell, int, int], None]]:
    """Show the grid on stderr: a live table where that is a terminal, else one line for each recipe as it ends."""
    if quiet:
        yield lambda cell, done, total: None
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, markup=False, highlight=False)
    through: Counts = {}
    said: dict[str, int] = {}
    with Live(console=console, transient=True, refresh_per_second=4, auto_refresh=console.is_terminal) as live:

        def tell(cell: Cell, done: int, total: int) -> None:
            through[cell.recipe, cell.model] = through.get((cell.recipe, cell.model), 0) + 1
            said[cell.recipe] = said.get(cell.recipe, 0) + 1
            if console.is_terminal:
                live.update(table_of(through, done, total))
            elif done == total:
                for recipe, n in sorted(said.items()):
                    console.print(f"train     {recipe}: {n} cells", soft_wrap=True)

        yield tell


def table_of(through: Counts, done: int, total: int) -> Table:
    """Set the counts as recipes by models."""
    from rich.table import Table

    models = list(dict.fromkeys(model for _, model in sorted(through)))
    table = Table(title=f"{done} of {total} cells", box=None, pad_edge=False)
    table.add_column("recipe")
    for model in models:
        table.add_column(model, justify="right")
    for recipe in sorted({recipe for recipe, _ in through}):
        counts = [through.get((recipe, model), 0) for model in models]
        table.add_row(recipe, *(str(n) if n else "" for n in counts))
    return table
