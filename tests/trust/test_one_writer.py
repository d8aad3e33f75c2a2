"""Only `atomic` writes files: stores, runs, checkpoints and reports go through it and its fault injection."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "phasewatch"

# What stands outside: a VM's scratch files, sockets and logs, a live tap in a private tmpfs. No product is among them.
OUTSIDE = {"record", "live"}
# Written once, of mode 600 from its first byte, and never again: not a product either.
SECRETS = {"dashboard/auth.py"}
WRITES = {
    "write_bytes",
    "write_text",
    "touch",
    "unlink",
    "rename",
    "rmdir",
    "mkdir",
    "hardlink_to",
    "symlink_to",
    "rmtree",
    "makedirs",
    "remove",
    "truncate",
    "replace",
    "link",
    "symlink",
    "copy",
    "copyfile",
    "copytree",
    "move",
    "mkstemp",
}
# Whose methods of that name are no writes, or are the one module's own.
INNOCENT = {"atomic", "structs", "dataclasses"}
MODULES = [
    p
    for p in sorted(SRC.rglob("*.py"))
    if p.relative_to(SRC).parts[0] not in OUTSIDE and str(p.relative_to(SRC)) not in {*SECRETS, "atomic.py"}
]


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


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_only_atomic_changes_the_file_system(path: Path) -> None:
    assert writes_of(path) == []


def test_the_test_sees_what_it_looks_for(tmp_path: Path) -> None:
    module = tmp_path / "x.py"
    lines = [
        "path.write_bytes(b'')",
        "os.replace(a, b)",
        "path.open('wb')",
        "open('x', 'a')",
        "os.open(p, 1)",
        "shutil.move(a, b)",
        "folder.mkdir()",
    ]
    module.write_text("\n".join(lines))

    assert len(writes_of(module)) == len(lines)
