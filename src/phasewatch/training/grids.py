"""Experiment grids: the short grid of `make demo`, and the full grid in two passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phasewatch.channels import build_channel_mask, list_source_subsets
from phasewatch.errors import UsageError
from phasewatch.models.base import InputVariant
from phasewatch.models.registry import BASELINE_MODELS, find_model
from phasewatch.splits import SINGLE_HOST_RECIPE, SPLIT_RECIPES, Fold
from phasewatch.training.experiment import Experiment, plan_experiments

__all__ = [
    "CONTEXT_MODELS",
    "DEPLOY_CHANNEL_SETS",
    "DEPLOY_RECIPE",
    "GRID_MODELS",
    "HARDEST_RECIPE",
    "HEADLINE_BASELINES",
    "HEADLINE_RECIPE",
    "MAIN_CHANNEL_SETS",
    "MAIN_MODELS",
    "N_BEST_MODELS",
    "N_EXTRA_SEEDS",
    "REPEATED_RECIPES",
    "SHORT_GRID_MODELS",
    "SHORT_GRID_RECIPES",
    "FoldsByRecipe",
    "build_channel_set_grid",
    "build_full_grid",
    "build_headline_grid",
    "build_short_grid",
    "build_user_model_grid",
    "find_widest_fold",
    "list_sensor_channel_sets",
]

FoldsByRecipe = Mapping[str, Sequence[Fold]]  # recipe → its folds; a recipe that could not be built is absent

MAIN_MODELS = ("gbt", "mlp", "cnn", "gru", "lstm", "transformer")
SHORT_GRID_MODELS = ("gbt", "mlp", "minirocket")  # two fits of each: the dearer nets are left out
CONTEXT_MODELS = ("gbt", "tcn")
_CHEAP_MODELS = ("gbt", "minirocket")  # a fit of another model costs up to nine times as much (measured)
GRID_MODELS = (*MAIN_MODELS, "minirocket", *BASELINE_MODELS)  # every other model is trained only if it is named
MAIN_CHANNEL_SETS = ("realistic", "oracle")
DEPLOY_CHANNEL_SETS = ("portable", "realistic")
HEADLINE_RECIPE, HARDEST_RECIPE, DEPLOY_RECIPE = "held_out_host", "held_out_both", "deploy"
HEADLINE_BASELINES = ("elapsed_time", "load_only")
SHORT_GRID_RECIPES = ("held_out_host", "held_out_sample", "held_out_both", "in_distribution", "random_windows")
REPEATED_RECIPES = ("held_out_host", "held_out_both")  # with more seeds, input variants and channel sets
N_EXTRA_SEEDS = 2  # of the best model, after the first
N_BEST_MODELS = 2  # of the second pass


def build_short_grid(folds: FoldsByRecipe, *, seed: int = 0) -> tuple[Experiment, ...]:
    """Build the short grid: one seed, raw values.

    It has `gbt` on every recipe of the comparison of split protocols, one model of each family on the fold with the
    most test profiles, `gbt` there with the guest's channels too, the baselines on the headline's recipe, and the two
    that the headline quotes on unseen hosts and samples. Where no host can be held out, `gbt` and the baselines are
    tested on the episodes that were recorded last.
    """
    cells = [*_plan_recipes(folds, SHORT_GRID_RECIPES, models=("gbt",), seed=seed)]
    if not folds.get(HEADLINE_RECIPE):
        cells += _plan_recipes(folds, (SINGLE_HOST_RECIPE,), models=("gbt", *BASELINE_MODELS), seed=seed)
    cells += _plan_recipes(folds, (HEADLINE_RECIPE,), models=BASELINE_MODELS, seed=seed)
    cells += _plan_recipes(folds, (HARDEST_RECIPE,), models=HEADLINE_BASELINES, seed=seed)
    widest = find_widest_fold(folds)
    cells += plan_experiments(widest, models=SHORT_GRID_MODELS, seeds=(seed,))
    cells += plan_experiments(widest, models=("gbt",), threats=MAIN_CHANNEL_SETS, seeds=(seed,))
    cells += _plan_recipes(folds, (DEPLOY_RECIPE,), models=("gbt",), threats=DEPLOY_CHANNEL_SETS, seed=seed)
    return tuple(sorted(set(cells)))


def build_full_grid(folds: FoldsByRecipe, *, seed: int = 0) -> tuple[Experiment, ...]:
    """Build the first pass of the full grid: one seed; what the second pass chooses from, and the comparisons.

    Every model is trained on unseen hosts, those of `CONTEXT_MODELS` with context too; only the cheap ones on every
    recipe. The second pass trains the best of them on unseen hosts and samples.
    """
    tested = tuple(row.name for row in SPLIT_RECIPES if row.tests)
    cells = [*build_short_grid(folds, seed=seed)]
    cells += _plan_recipes(folds, (HEADLINE_RECIPE,), models=(*MAIN_MODELS, *_CHEAP_MODELS), seed=seed)
    cells += _plan_recipes(folds, tested, models=_CHEAP_MODELS, seed=seed)
    cells += _plan_recipes(folds, REPEATED_RECIPES, models=("gbt",), threats=MAIN_CHANNEL_SETS, seed=seed)
    cells += _plan_recipes(folds, (HEADLINE_RECIPE,), models=_CHEAP_MODELS, threats=MAIN_CHANNEL_SETS, seed=seed)
    cells += _plan_recipes(folds, REPEATED_RECIPES, models=BASELINE_MODELS, seed=seed)
    cells += _plan_recipes(folds, (HEADLINE_RECIPE,), models=CONTEXT_MODELS, table=InputVariant.CONTEXT, seed=seed)
    cells += _plan_recipes(folds, (HARDEST_RECIPE,), models=("gbt",), table=InputVariant.CONTEXT, seed=seed)
    cells += _plan_recipes(folds, (HEADLINE_RECIPE,), models=("gbt",), threats=list_sensor_channel_sets(), seed=seed)
    return tuple(sorted(set(cells)))


def build_headline_grid(folds: FoldsByRecipe, *, best: Sequence[str], seed: int = 0) -> tuple[Experiment, ...]:
    """Build the second pass: the best models on unseen hosts and samples too, with other inputs; the best with seeds.

    The other inputs are the portable channels, and values relative to a baseline.

    Args:
        folds: As in the first pass.
        best: The best models, best first, chosen on validation B of the first pass's unseen hosts.
        seed: Seed of the first pass.
    """
    raw = InputVariant.RAW
    cells = [*_plan_recipes(folds, REPEATED_RECIPES, models=best, table=raw, seed=seed)]
    for more in range(seed + 1, seed + 1 + N_EXTRA_SEEDS):
        cells += _plan_recipes(folds, REPEATED_RECIPES, models=best[:1], table=raw, seed=more)
    cells += _plan_recipes(folds, (HEADLINE_RECIPE,), models=best, threats=("portable",), table=raw, seed=seed)
    cells += _plan_recipes(folds, (HEADLINE_RECIPE,), models=best, table=InputVariant.COMMISSIONED, seed=seed)
    cells += _plan_recipes(folds, (DEPLOY_RECIPE,), models=best, threats=DEPLOY_CHANNEL_SETS, table=raw, seed=seed)
    return tuple(sorted(set(cells)))


def build_user_model_grid(
    folds: FoldsByRecipe, models: Sequence[str], *, recipes: Sequence[str] = (), seed: int = 0
) -> tuple[Experiment, ...]:
    """Build the grid of a user's models: realistic channels, on the headline's recipe or the named ones."""
    return _plan_recipes(folds, recipes or (HEADLINE_RECIPE,), models=models, seed=seed)


def build_channel_set_grid(
    folds: FoldsByRecipe,
    threats: Sequence[str],
    *,
    models: Sequence[str] = (),
    recipes: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Experiment, ...]:
    """Build the grid of named channel sets: `gbt` on `deploy`, or the named models and recipes.

    Raises:
        UsageError: If a channel set or model is unknown, or none of the recipes has a fold.
    """
    for name in threats:
        build_channel_mask(name)
    for name in models:
        find_model(name)
    cells = _plan_recipes(folds, recipes or (DEPLOY_RECIPE,), models=models or ("gbt",), threats=threats, seed=seed)
    if not cells:
        raise UsageError(
            f"no fold of {', '.join(recipes or (DEPLOY_RECIPE,))} in this run; make one with `phasewatch split RUN`"
        )
    return cells


def list_sensor_channel_sets() -> tuple[str, ...]:
    """Return the channel sets for the ablation by source, without the one that equals `realistic`."""
    return tuple(
        name for name in list_source_subsets() if build_channel_mask(name) != build_channel_mask(MAIN_CHANNEL_SETS[0])
    )


def find_widest_fold(folds: FoldsByRecipe) -> tuple[Fold, ...]:
    """Return the fold of the headline's recipe with the most test profiles, or nothing; ties go to the first name."""
    candidates = folds.get(HEADLINE_RECIPE, ())
    tested = {fold.fold: len({row.profile for row in fold.coverage if row.test}) for fold in candidates}
    return tuple(sorted(candidates, key=lambda fold: (-tested[fold.fold], fold.fold))[:1])


def _plan_recipes(
    folds: FoldsByRecipe,
    recipes: Sequence[str],
    *,
    models: Sequence[str],
    threats: Sequence[str] = ("realistic",),
    table: str | None = None,
    seed: int,
) -> tuple[Experiment, ...]:
    chosen = [fold for recipe in recipes for fold in folds.get(recipe, ())]
    return plan_experiments(chosen, models=models, threats=threats, table=table, seeds=(seed,))
