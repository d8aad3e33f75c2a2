"""Built-in recording plans, and plan files of the user."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from phasewatch.errors import PlanError
from phasewatch.lab.plan import PlanSpec, parse_plan

__all__ = ["list_plans", "read_plan"]


def list_plans() -> tuple[str, ...]:
    """Return the names of the built-in plans."""
    folder = resources.files(__name__)
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


def read_plan(name_or_path: str) -> PlanSpec:
    """Read a built-in plan by name, or a TOML file by path.

    Raises:
        PlanError: If neither exists, or the plan is not valid.
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
