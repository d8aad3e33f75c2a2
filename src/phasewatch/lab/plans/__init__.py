"""The plans that come with the package, and the way to a plan of one's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from phasewatch.errors import PlanError
from phasewatch.lab.plan import PlanSpec, parse_plan


def list_plans() -> tuple[str, ...]:
    """Name the plans that come with the package."""
    folder = resources.files(__name__)
    return tuple(sorted(each.name.removesuffix(".toml") for each in folder.iterdir() if each.name.endswith(".toml")))


def read_plan(name_or_path: str) -> PlanSpec:
    """Read a built-in plan by name, or a TOML file.

    Raises:
        PlanError: If there is neither, or the plan is not valid.
    """
    if name_or_path in list_plans():
        text = resources.files(__name__).joinpath(f"{name_or_path}.toml").read_text("utf-8")
        return parse_plan(text, where=f"{name_or_path}.toml")
    try:
        text = Path(name_or_path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        known = ", ".join(list_plans())
        raise PlanError(f"{name_or_path}: neither a readable file ({exc}) nor one of the plans {known}") from exc
    return parse_plan(text, where=name_or_path)
