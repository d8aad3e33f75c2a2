"""Built-in recording plans, and plan files of the user."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import msgspec

from phasewatch.errors import PlanError
from phasewatch.lab.plan import PlanSpec, parse_plan
from phasewatch.lab.slots import PlanPart
from phasewatch.toml_config import parse_toml

__all__ = ["list_plans", "read_plan"]

_PART_PATTERN = re.compile(r"^part_of\s*=", re.MULTILINE)


def list_plans() -> tuple[str, ...]:
    """Return the names of the built-in plans."""
    folder = resources.files(__name__)
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


def read_plan(name_or_path: str) -> PlanSpec:
    """Read a built-in plan by name, or a TOML file by path; either may be a part of a built-in plan.

    Raises:
        PlanError: If neither exists, or the plan is not valid.
    """
    if name_or_path in list_plans():
        text = resources.files(__name__).joinpath(f"{name_or_path}.toml").read_text("utf-8")
        return _parse(text, where=f"{name_or_path}.toml")
    try:
        text = Path(name_or_path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        known = ", ".join(list_plans())
        raise PlanError(f"{name_or_path}: neither a readable file ({exc}) nor one of the plans {known}") from exc
    return _parse(text, where=name_or_path)


def _parse(text: str, *, where: str) -> PlanSpec:
    """Parse a plan, or the part of a built-in plan: a file with the key ``part_of``."""
    if not _PART_PATTERN.search(text):
        return parse_plan(text, where=where)
    part = parse_toml(text, PlanPart, where=where)
    if part.part_of not in list_plans():
        raise PlanError(f"{where}: part_of: {part.part_of!r} is not one of the plans {', '.join(list_plans())}")
    whole = read_plan(part.part_of)
    if whole.part is not None:
        raise PlanError(f"{where}: part_of: {part.part_of!r} is a part of a plan itself; name the whole plan")
    return msgspec.structs.replace(whole, part=part)
