"""Which cells a grid has: the short one of `make demo`, and the full one in two passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phasewatch.channels import build_channel_mask, list_source_subsets
from phasewatch.errors import UsageError
from phasewatch.models.base import InputKind, InputVariant
from phasewatch.models.registry import BASELINE_MODELS, find_model
from phasewatch.splits import SPLIT_RECIPES, Fold
from phasewatch.training.experiment import Experiment, plan_experiments

FoldsByRecipe = Mapping[str, Sequence[Fold]]  # recipe → its folds; one that could not be built is absent

MAIN_MODELS = ("gbt", "mlp", "cnn", "gru", "lstm", "transformer")
CHEAP_MODEL = "minirocket"
MAIN_CHANNEL_SETS = ("realistic", "oracle")
DEPLOY_CHANNEL_SETS = ("portable", "realistic")
HEADLINE_RECIPE, DEPLOY_RECIPE = "held_out_host", "deploy"
SHORT_GRID_RECIPES = ("held_out_host", "held_out_sample", "held_out_both", "in_distribution", "random_windows")
REPEATED_RECIPES = ("held_out_host", "held_out_both")  # where the headline models get more seeds, tables and masks
N_EXTRA_SEEDS = 2  # beside the first


def build_short_grid(folds: FoldsByRecipe, *, seed: int = 0) -> tuple[Experiment, ...]:
    """Give the cells of the short grid (DESIGN section 16): one seed, the raw table.

    `gbt` answers for every recipe that the inflation meter shows, the six models for both threat models on the one
    fold that tests most, and the baselines for the headline's recipe.
    """
    cells = [*_plan_recipes(folds, SHORT_GRID_RECIPES, models=("gbt",), seed=seed)]
    cells += _plan_recipes(folds, (HEADLINE_RECIPE,), models=BASELINE_MODELS, seed=seed)
    cells += plan_experiments(find_widest_fold(folds), models=MAIN_MODELS, threats=MAIN_CHANNEL_SETS, seeds=(seed,))
    cells += _plan_recipes(folds, (DEPLOY_RECIPE,), models=("gbt",), threats=DEPLOY_CHANNEL_SETS, seed=seed)
    return tuple(sorted(set(cells)))


def build_full_grid(folds: FoldsByRecipe, *, seed: int = 0) -> tuple[Experiment, ...]:
    """Give the first pass of the full grid: every recipe, fold, model and both threat models, one seed, the raw table."""
    tested = tuple(row.name for row in SPLIT_RECIPES if row.tests)
    honest = tuple(row.name for row in SPLIT_RECIPES if row.tests and not row.leaky)
    cells = [*build_short_grid(folds, seed=seed)]
    cells += _plan_recipes(folds, tested, models=(*MAIN_MODELS, CHEAP_MODEL), threats=MAIN_CHANNEL_SETS, seed=seed)
    cells += _plan_recipes(folds, honest, models=tuple(b for b in BASELINE_MODELS if b != CHEAP_MODEL), seed=seed)
    cells += _plan_recipes(folds, (HEADLINE_RECIPE,), models=("gbt",), threats=list_sensor_channel_sets(), seed=seed)
    return tuple(sorted(set(cells)))


def build_headline_grid(folds: FoldsByRecipe, *, net: str, seed: int = 0) -> tuple[Experiment, ...]:
    """Give the second pass: seeds, tables and the portable mask for `gbt`, the best net and `minirocket`.

    Args:
        folds: As in the first pass.
        net: The net that validation A liked best; chosen before a test prediction is read.
        seed: Of the first pass.
    """
    models = tuple(dict.fromkeys(("gbt", net, CHEAP_MODEL)))
    tables = tuple(m for m in models if find_model(m).kind is InputKind.TABLE)
    cells: list[Experiment] = []
    for more in range(seed + 1, seed + 1 + N_EXTRA_SEEDS):
        cells += _plan_recipes(folds, REPEATED_RECIPES, models=models, seed=more)
    cells += _plan_recipes(folds, REPEATED_RECIPES, models=models, threats=("portable",), seed=seed)
    cells += _plan_recipes(folds, REPEATED_RECIPES, models=models, table=InputVariant.COMMISSIONED, seed=seed)
    cells += _plan_recipes(folds, REPEATED_RECIPES, models=tables, table=InputVariant.CONTEXT, seed=seed)
    cells += _plan_recipes(folds, (DEPLOY_RECIPE,), models=models, threats=DEPLOY_CHANNEL_SETS, seed=seed)
    return tuple(sorted(set(cells)))


def build_user_model_grid(
    folds: FoldsByRecipe, models: Sequence[str], *, recipes: Sequence[str] = (), seed: int = 0
) -> tuple[Experiment, ...]:
    """Give the cells of models that a user brings: realistic, over the headline's recipe or those asked for."""
    return _plan_recipes(folds, recipes or (HEADLINE_RECIPE,), models=models, seed=seed)


def build_channel_set_grid(
    folds: FoldsByRecipe,
    threats: Sequence[str],
    *,
    models: Sequence[str] = (),
    recipes: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Experiment, ...]:
    """Give the cells of masks that a user asks for: `gbt` on `deploy`, or the models and recipes named.

    Raises:
        UsageError: If a mask or a model is not registered, or no recipe of these could be built.
    """
    for name in threats:
        build_channel_mask(name)
    for name in models:
        find_model(name)
    cells = _plan_recipes(folds, recipes or (DEPLOY_RECIPE,), models=models or ("gbt",), threats=threats, seed=seed)
    if not cells:
        raise UsageError(
            f"there is no fold of {', '.join(recipes or (DEPLOY_RECIPE,))}; make it with `phasewatch split RUN`"
        )
    return cells


def list_sensor_channel_sets() -> tuple[str, ...]:
    """Name the threat models that tell what a source is worth, but for the one that is trained as `realistic` anyway."""
    return tuple(
        name for name in list_source_subsets() if build_channel_mask(name) != build_channel_mask(MAIN_CHANNEL_SETS[0])
    )


def find_widest_fold(folds: FoldsByRecipe) -> tuple[Fold, ...]:
    """Give the one fold of the headline's recipe that tests most profiles, then by name."""
    of = folds.get(HEADLINE_RECIPE, ())
    tested = {fold.fold: len({row.profile for row in fold.coverage if row.test}) for fold in of}
    return tuple(sorted(of, key=lambda fold: (-tested[fold.fold], fold.fold))[:1])


def _plan_recipes(
    folds: FoldsByRecipe,
    recipes: Sequence[str],
    *,
    models: Sequence[str],
    threats: Sequence[str] = ("realistic",),
    table: str = "raw",
    seed: int,
) -> tuple[Experiment, ...]:
    chosen = [fold for recipe in recipes for fold in folds.get(recipe, ())]
    return plan_experiments(chosen, models=models, threats=threats, table=table, seeds=(seed,))
