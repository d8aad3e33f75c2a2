"""What every command shares: the JSON document, plain text for the terminal, progress on stderr, the bundled corpus."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import phasewatch
from phasewatch.errors import RunError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phasewatch.split import SetAside
    from phasewatch.train.cells import FailedCell
    from phasewatch.validate.verdict import Verdict

CODES = "Exit codes: 0 done, 1 findings, 2 usage, 3 bad or absent data, 4 does not fit, 5 the machine."
SHOWN = 20  # of a list that goes on in a file
QUIET_S = 20.0  # without a terminal, a long stage says where it stands so often
CHANNELS_HELP = "A TOML file with channels of your own; the run remembers it."
CORPUS_VARIABLE = "PHASEWATCH_CORPUS"
CORPUS = Path("corpus") / "lab-v1"
RUN_FILES = (
    "run.json", "validation_v1.parquet", "ledger.json", "features_window_v1.parquet", "feature_schema_v1.json",
    "splits_v1.json", "predictions_v1.parquet", "metrics_v1.json", "audit_v1.json",
)  # fmt: skip
EDGE = "lab-v1.edge.zip"  # beside the corpus: the bundled model


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"phasewatch {phasewatch.__version__}")
        raise typer.Exit


def plain(text: str) -> str:
    """Make text from data harmless to a terminal: what does not print is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def answer(result: dict[str, Any], *, as_json: bool, lines: Sequence[str] = ()) -> None:
    """Print a command's result: one JSON document, in which what is no number is null, or lines for people."""
    if as_json:
        typer.echo(json.dumps({"result": _without_nan(result)}, indent=1, sort_keys=True, default=str))
        return
    for line in lines:
        typer.echo(plain(line))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def names(words: str) -> tuple[str, ...]:
    """Read names separated by commas."""
    return tuple(word.strip() for word in words.split(",") if word.strip())


def goes_with(option: str, partner: str, *, alone: bool) -> None:
    """Refuse an option that would be ignored in silence.

    Raises:
        UsageError: If it stands alone.
    """
    from phasewatch.errors import UsageError

    if alone:
        raise UsageError(f"{option} goes with {partner}; add it, or leave out {option}")


def described_aside(aside: Sequence[SetAside]) -> list[dict[str, Any]]:
    """Return the episodes that splits do without, as JSON."""
    return [
        {
            "host_id": a.host_id, "episode_id": a.episode_id, "profile": a.profile, "code": str(a.code),
            "recipes": list(a.recipes),
        }
        for a in aside
    ]  # fmt: skip


def aside_lines(aside: Sequence[SetAside]) -> list[str]:
    """Return the first of them, a line each, and what their codes mean."""
    lines = [
        f"set aside: {a.host_id}/{a.episode_id} ({a.profile}) [{a.code}]{' for ' + ', '.join(a.recipes) if a.recipes else ''}"
        for a in aside[:SHOWN]
    ]
    if len(aside) > SHOWN:
        lines.append(f"… and {len(aside) - SHOWN:,} more; splits_v1.json has each")
    return [*lines, *(f"  {code}: {code.about}" for code in dict.fromkeys(a.code for a in aside))]


def described_failures(failed: Sequence[FailedCell]) -> list[dict[str, Any]]:
    """Return the cells that could not be trained, as JSON."""
    return [
        f.cell.keys() | {"seed": f.cell.seed, "why": f.failure.words, "exit_code": f.failure.exit_code} for f in failed
    ]


def failure_lines(failed: Sequence[FailedCell]) -> list[str]:
    """Return a line for each cell that could not be trained."""
    more = [f"… and {len(failed) - SHOWN:,} more; --json lists each"] if len(failed) > SHOWN else []
    return [*(f"failed: {f}" for f in failed[:SHOWN]), *more]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Set rows in columns, two spaces apart, the last column free."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def bundled_corpus() -> Path:
    """Find the recordings that come with phasewatch: where a variable says, beside the checkout's code, or below here.

    A wheel holds no recordings (they are larger than all of its code); the source distribution and the repository do.

    Raises:
        StoreError: If they are not there; names both ways to give them.
    """
    told = os.environ.get(CORPUS_VARIABLE)
    if told and not Path(told).is_dir():
        raise StoreError(f"{told}: {CORPUS_VARIABLE} names this folder, and it is not there; unset it or mend it")
    beside = Path(phasewatch.__file__).resolve().parents[2] / CORPUS
    for corpus in (Path(told),) if told else (beside, CORPUS):
        if corpus.is_dir():
            return corpus
    raise StoreError(
        f"{CORPUS}: the bundled corpus is not here, because an installed phasewatch has none; name a store, work in a "
        f"checkout or an unpacked source distribution, or set {CORPUS_VARIABLE} to its {CORPUS}"
    )


def bundled_model() -> Path:
    """Find the edge bundle that stands beside the bundled recordings.

    Raises:
        StoreError: If the variable for the recordings names a folder that is not there.
        RunError: If there is none; names the option that gives another.
    """
    try:
        edge = bundled_corpus().parent / EDGE
    except StoreError:
        if os.environ.get(CORPUS_VARIABLE):
            raise
        edge = CORPUS.parent / EDGE
    if not edge.is_file():
        raise RunError(
            f"{edge}: the bundled model is not here, an installed phasewatch has none; name one with --model, "
            "`phasewatch export RUN --out X.zip` makes it"
        )
    return edge


def need_run(run: Path) -> Path:
    """Return the run's folder if it is there and holds anything of a run; nothing is written to any other folder.

    Raises:
        RunError: If it is absent or no run.
    """
    if not run.is_dir():
        raise RunError(f"{run}: there is no such run; make one with `phasewatch run STORE --out {run}`")
    if not any((run / name).is_file() for name in RUN_FILES):
        from phasewatch.store.base import has_bundle

        what = "it holds bundles, so it is a store" if has_bundle(run) else "it holds no file of one"
        raise RunError(f"{run}: no run: {what}; make a run with `phasewatch run STORE --out RUN`")
    return run


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int, str], None]]:
    """Show stages on stderr: a bar where that is a terminal, else a line now and then and as each stage ends."""
    if quiet:
        yield lambda stage, done, total, words: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, highlight=False)
    columns = (
        TextColumn("{task.fields[stage]:<9}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}
        said_s: dict[str, float] = {}

        def tell(stage: str, done: int, total: int, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task("", total=total, stage=stage)
                said_s[stage] = time.monotonic()
            bar.update(tasks[stage], completed=done, total=total, description=plain(words)[:100])
            if not console.is_terminal and total > 1 and time.monotonic() - said_s[stage] > QUIET_S:
                said_s[stage] = time.monotonic()
                console.print(f"{stage:<9} {done:,}/{total:,}  {plain(words)}", soft_wrap=True)
            if done >= total and total == 1 and words:
                bar.console.print(f"{stage:<9} {plain(words)}", soft_wrap=True)

        yield tell


def tallied(stage: str, tell: Callable[[str, int, int, str], None]) -> Callable[[int, int, Verdict], None]:
    """Tell of a sweep: rate, time left, errors by reason, and the bundle."""
    from phasewatch.validate.tally import Tally

    tally = Tally(time.monotonic())

    def heard(done: int, total: int, verdict: Verdict) -> None:
        tally.add(verdict)
        tell(stage, done, total, tally.words(total, time.monotonic()))

    return heard
