"""A program that only shows its help, or completes a word, imports little: what is imported is tested, not the time."""

from __future__ import annotations

import json
import subprocess
import sys

from phasewatch.cli.groups import COMMANDS

# Limits of their options are constants of heavy modules; `doctor` asks the modules that start VMs.
HEAVY_COMMANDS = {"record", "image", "simulate", "alarms", "check-config", "doctor"}
HEAVY_MODULES = {"asyncio", "backports", "httpx", "msgspec", "numpy", "obstore", "pyarrow", "rich", "scipy", "ssl"}
# Typer, and what it brings.
LIGHT_PACKAGES = {"typer", "shellingham", "annotated_doc", "phasewatch"}

PROBE = """
import atexit, json, sys
before = set(sys.modules)
def report():
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(json.dumps(sorted(loaded)), file=sys.stderr)
atexit.register(report)
"""


def list_imports(code: str, *, env: dict[str, str] | None = None) -> set[str]:
    """Return the top-level modules that a piece of code imports in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE + code], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_help_imports_no_package_but_typer() -> None:
    loaded = list_imports("import sys; sys.argv = ['phasewatch', '--help']; from phasewatch.cli import main; main()")

    third_party = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert third_party == LIGHT_PACKAGES
    assert loaded & HEAVY_MODULES == set()


def test_completion_of_an_option_imports_nothing_heavy() -> None:
    asked = {"COMP_WORDS": "phasewatch run --wor", "COMP_CWORD": "2", "_PHASEWATCH_COMPLETE": "complete_bash"}

    loaded = list_imports("import sys; sys.argv = ['phasewatch']; from phasewatch.cli import main; main()", env=asked)

    assert "typer" in loaded
    assert loaded & HEAVY_MODULES == set()


def test_the_parser_of_a_command_imports_nothing_heavy() -> None:
    commands = sorted(set(COMMANDS) - HEAVY_COMMANDS)

    loaded = list_imports(f"from phasewatch.cli.groups import load_command\nfor c in {commands}: load_command(c)")

    assert loaded & HEAVY_MODULES == set()
