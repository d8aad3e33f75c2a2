"""Which cells a grid has: the short one of `make demo`, and the full one in two passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phasewatch.channels import mask_of, source_subsets
from phasewatch.errors import UsageError
from phasewatch.models.base import InputKind, Table
from phasewatch.models.registry import BASELINES, row_of
from phasewatch.split import RECIPES, Fold
from phasewatch.train.cell import Cell, plan_cells

Folds = Mapping[str, Sequence[Fold]]  # recipe → its folds; one that could not be built is absent

SIX = ("gbt", "mlp", "cnn", "gru", "lstm", "transformer")
CHEAP = "minirocket"
THREATS = ("realistic", "oracle")
DEPLOYED = ("portable", "realistic")
HEADLINE, DEPLOY = "held_out_host", "deploy"
SHORT = ("held_out_host", "held_out_sample", "held_out_both", "in_distribution", "random_windows")
MORE = ("held_out_host", "held_out_both")  # where the headline models get more seeds, tables and masks
MORE_SEEDS = 2  # beside the first


def short_grid(folds: Folds, *, seed: int = 0) -> tuple[Cell, ...]:
    """Give the cells of the short grid (DESIGN section 16): one seed, the raw table.

    `gbt` answers for every recipe that the inflation meter shows, the six models for both threat models on the one
    fold that tests most, and the baselines for the headline's recipe.
    """
    cells = [*_cells(folds, SHORT, models=("gbt",), seed=seed)]
    cells += _cells(folds, (HEADLINE,), models=BASELINES, seed=seed)
    cells += plan_cells(widest(folds), models=SIX, threats=THREATS, seeds=(seed,))
    cells += _cells(folds, (DEPLOY,), models=("gbt",), threats=DEPLOYED, seed=seed)
    return tuple(sorted(set(cells)))


def full_grid(folds: Folds, *, seed: int = 0) -> tuple[Cell, ...]:
    """Give the first pass of the full grid: every recipe, fold, model and both threat models, one seed, the raw table."""
    tested = tuple(row.name for row in RECIPES if row.tests)
    honest = tuple(row.name for row in RECIPES if row.tests and not row.leaky)
    cells = [*short_grid(folds, seed=seed)]
    cells += _cells(folds, tested, models=(*SIX, CHEAP), threats=THREATS, seed=seed)
    cells += _cells(folds, honest, models=tuple(b for b in BASELINES if b != CHEAP), seed=seed)
    cells += _cells(folds, (HEADLINE,), models=("gbt",), threats=sensor_masks(), seed=seed)
    return tuple(sorted(set(cells)))


def headline_grid(folds: Folds, *, net: str, seed: int = 0) -> tuple[Cell, ...]:
    """Give the second pass: seeds, tables and the portable mask for `gbt`, the best net and `minirocket`.

    Args:
        folds: As in the first pass.
        net: The net that validation A liked best; chosen before a test prediction is read.
        seed: Of the first pass.
    """
    models = tuple(dict.fromkeys(("gbt", net, CHEAP)))
    tables = tuple(m for m in models if row_of(m).kind is InputKind.TABLE)
    cells: list[Cell] = []
    for more in range(seed + 1, seed + 1 + MORE_SEEDS):
        cells += _cells(folds, MORE, models=models, seed=more)
    cells += _cells(folds, MORE, models=models, threats=("portable",), seed=seed)
    cells += _cells(folds, MORE, models=models, table=Table.COMMISSIONED, seed=seed)
    cells += _cells(folds, MORE, models=tables, table=Table.CONTEXT, seed=seed)
    cells += _cells(folds, (DEPLOY,), models=models, threats=DEPLOYED, seed=seed)
    return tuple(sorted(set(cells)))


def brought_grid(
    folds: Folds, models: Sequence[str], *, recipes: Sequence[str] = (), seed: int = 0
) -> tuple[Cell, ...]:
    """Give the cells of models that a user brings: realistic, over the headline's recipe or those asked for."""
    return _cells(folds, recipes or (HEADLINE,), models=models, seed=seed)


def masked_grid(
    folds: Folds, threats: Sequence[str], *, models: Sequence[str] = (), recipes: Sequence[str] = (), seed: int = 0
) -> tuple[Cell, ...]:
    """Give the cells of masks that a user asks for: `gbt` on `deploy`, or the models and recipes named.

    Raises:
        UsageError: If a mask or a model is not registered, or no recipe of these could be built.
    """
    for name in threats:
        mask_of(name)
    for name in models:
        row_of(name)
    cells = _cells(folds, recipes or (DEPLOY,), models=models or ("gbt",), threats=threats, seed=seed)
    if not cells:
        raise UsageError(f"there is no fold of {', '.join(recipes or (DEPLOY,))}; make it with `phasewatch split RUN`")
    return cells


def sensor_masks() -> tuple[str, ...]:
    """Name the threat models that tell what a source is worth, but for the one that is trained as `realistic` anyway."""
    return tuple(name for name in source_subsets() if mask_of(name) != mask_of(THREATS[0]))


def widest(folds: Folds) -> tuple[Fold, ...]:
    """Give the one fold of the headline's recipe that tests most profiles, then by name."""
    of = folds.get(HEADLINE, ())
    tested = {fold.fold: len({row.profile for row in fold.coverage if row.test}) for fold in of}
    return tuple(sorted(of, key=lambda fold: (-tested[fold.fold], fold.fold))[:1])


def _cells(
    folds: Folds,
    recipes: Sequence[str],
    *,
    models: Sequence[str],
    threats: Sequence[str] = ("realistic",),
    table: str = "raw",
    seed: int,
) -> tuple[Cell, ...]:
    chosen = [fold for recipe in recipes for fold in folds.get(recipe, ())]
    return plan_cells(chosen, models=models, threats=threats, table=table, seeds=(seed,))
