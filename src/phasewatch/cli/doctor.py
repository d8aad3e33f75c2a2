"""The command `doctor`; it needs nothing but the standard library, because it reports what is missing."""

from __future__ import annotations

from dataclasses import asdict

import typer

from phasewatch.cli import common
from phasewatch.cli.folders import find_bundled_corpus
from phasewatch.cli.options import AsJson
from phasewatch.diagnostics import describe_installation, has_blocking_problem, hide_home, inspect_system
from phasewatch.errors import StoreError

__all__ = ["doctor"]


def doctor(as_json: AsJson = False) -> None:
    """Check the installation and this machine.

    Attach the output to a bug report. The exit code is 1 only if something is missing that every command needs; what
    one task needs (an extra, QEMU) is listed with the way to install it.

    Example: phasewatch doctor
    """
    installation, checks = describe_installation(), inspect_system()
    try:
        corpus = hide_home(str(find_bundled_corpus()))
    except StoreError:
        corpus = "not here"
    packages = {p.name: p for p in installation.packages if p.version}.values()
    about = [
        ("phasewatch", f"{installation.version}, {installation.place}"),
        ("Python", installation.python),
        ("system", installation.system),
        ("machine", installation.machine),
        ("corpus", corpus),
        *(("extra " + extra, state) for extra, state in installation.extras.items()),
        ("packages", " ".join(f"{p.name}={p.version}" for p in packages)),
        *((name, value) for name, value in installation.settings.items()),
    ]
    rows = [
        ("ok" if c.ok else "--", c.name, c.found, "" if c.ok else f"for {c.needed_for}: {c.remedy}") for c in checks
    ]
    is_broken = has_blocking_problem(checks)
    if is_broken:
        summary = "phasewatch cannot work here: see the lines with `for all`"
    elif missing := sum(not c.ok for c in checks):
        summary = f"{missing} of {len(checks)} checks failed, each only for the task that its line names"
    else:
        without = ",".join(extra for extra, state in installation.extras.items() if state != "installed")
        summary = "all checks passed" + (f"; not installed: pip install 'phasewatch[{without}]'" if without else "")
    result = {
        "checks": [asdict(c) for c in checks],
        "corpus": corpus,
        "installation": asdict(installation) | {"extras": installation.extras},
    }
    lines = [*common.render_table(about), "", *common.render_table(rows), summary]
    common.print_result(result, as_json=as_json, lines=lines)
    if is_broken:
        raise typer.Exit(1)
