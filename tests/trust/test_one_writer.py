"""Every product (bundles, tables, models, reports) is written through `atomic`, so that crash tests reach it."""

from __future__ import annotations

import ast
from pathlib import Path

SRC = Path(__file__).parents[2] / "src" / "phasewatch"

# Packages whose files are no products: a VM's scratch files, sockets and logs, and captures in a private tmpfs.
OUTSIDE = {"lab", "live", "telemetry"}
# A secret, written once with mode 600 from its first byte; not a product either.
SECRETS = {"dashboard/auth.py"}
# A log to which lines are appended, and a database with transactions of its own: neither is published whole.
GROWING = {"alarms/ecs.py", "alarms/history.py"}
WRITES = {
    "write_bytes", "write_text", "touch", "unlink", "rename", "rmdir", "mkdir", "hardlink_to", "symlink_to", "rmtree",
    "makedirs", "remove", "truncate", "replace", "link", "symlink", "copy", "copyfile", "copytree", "move", "mkstemp",
}  # fmt: skip
# Objects whose methods of these names do not write, or are `atomic` itself.
INNOCENT = {"atomic", "structs", "dataclasses"}
MODULES = [
    p for p in sorted(SRC.rglob("*.py"))
    if p.relative_to(SRC).parts[0] not in OUTSIDE and str(p.relative_to(SRC)) not in {*SECRETS, *GROWING, "atomic.py"}
]  # fmt: skip


def writes_of(path: Path) -> list[str]:
    """List the calls of a module that change a file system."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        if name in ("open", "fdopen"):
            modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
            if owner == "os" and "devnull" not in ast.unparse(node):
                found.append(ast.unparse(node))
            if any(isinstance(mode, str) and set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes):
                found.append(ast.unparse(node))
        if (
            name in WRITES
            and owner.split(".")[-1] not in INNOCENT
            and (owner in ("os", "shutil") or is_path(owner, name))
        ):
            found.append(ast.unparse(node))
    return found


def is_path(owner: str, name: str) -> bool:
    """Whether a method of an ambiguous name is a path's; the others have no other meaning."""
    return name not in ("replace", "remove", "copy", "move", "link", "truncate") and bool(owner)


def test_products_are_written_by_atomic_alone() -> None:
    offenders = {str(path.relative_to(SRC)): writes for path in MODULES if (writes := writes_of(path))}

    assert offenders == {}
