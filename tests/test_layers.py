"""The layout of the package: ranks, cycles, names, sizes, and who touches the world."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "phasewatch"
MAX_LINES = 600

# A package imports only packages of a lower rank; `__init__` is the package's front door and loads `load` on demand.
RANKS: dict[str, int] = {
    "_version": 0,
    "arrays": 0,
    "errors": 0,
    "http_server": 0,
    "identity": 0,
    "naming": 0,
    "progress": 0,
    "types": 0,
    "atomic": 1,
    "channels": 1,
    "http_client": 1,
    "metrics": 1,
    "parallel": 1,
    "parquet": 1,
    "profiles": 1,
    "toml_config": 1,
    "user_folders": 1,
    "artifacts": 2,
    "bundle": 2,
    "models": 2,
    "splits": 2,
    "telemetry": 2,
    "binning": 3,
    "store": 3,
    "features": 4,
    "importing": 4,
    "lab": 4,
    "simulate": 4,
    "validate": 4,
    "dataset": 5,
    "labelling": 5,
    "diagnostics": 5,
    "transfer": 5,
    "__init__": 6,
    "training": 6,
    "evaluation": 7,
    "inference": 7,
    "adaptation": 8,
    "audit": 8,
    "events": 8,
    "alarms": 9,
    "report": 9,
    "dashboard": 10,
    "live": 10,
    "pipeline": 10,
    "cli": 11,
    "__main__": 12,
}

# Modules that read and write, start processes or look at the clock; all others compute.
IMPURE = {
    "__init__",
    "alarms.alertmanager",
    "alarms.command",
    "alarms.config",
    "alarms.delivery",
    "alarms.ecs",
    "alarms.history",
    "alarms.keeper",
    "alarms.metrics_server",
    "alarms.outputs",
    "alarms.probe",
    "alarms.syslog",
    "alarms.webhook",
    "atomic",
    "audit.run",
    "binning.storage",
    "channels.custom",
    "dashboard.alarm_keeper",
    "dashboard.app",
    "dashboard.auth",
    "dashboard.hub",
    "dashboard.intake",
    "dashboard.server",
    "diagnostics",
    "events.demo",
    "events.perf",
    "events.publish",
    "http_client",
    "http_server.protocol",
    "importing.readers",
    "inference.onnx_export",
    "lab.campaign",
    "lab.cgroup",
    "lab.debian_image",
    "lab.debian_packages",
    "lab.guest_driver",
    "lab.guest_image",
    "lab.host",
    "lab.network.sink",
    "lab.process",
    "lab.recorder",
    "lab.session",
    "lab.vm",
    "live.access",
    "live.cleanup",
    "live.fleet",
    "live.fleet_member",
    "live.monitor_endpoints",
    "live.outputs",
    "live.ownership",
    "live.recording",
    "live.session",
    "live.survey",
    "live.watch_loop",
    "live.watcher",
    "parallel.pool",
    "pipeline.runner",
    "store.local",
    "store.s3",
    "telemetry.af_packet",
    "telemetry.base",
    "telemetry.capture",
    "telemetry.guest_agent",
    "telemetry.packet_socket",
    "telemetry.libvirt",
    "telemetry.libvirt_client",
    "telemetry.pcap",
    "telemetry.proc",
    "telemetry.process",
    "telemetry.qmp",
    "telemetry.tap",
    "telemetry.qmp_connection",
    "telemetry.monitor_queries",
    "telemetry.vcpu_threads",
    "transfer.admission",
    "transfer.receiver",
    "transfer.server",
    "transfer.shipper",
    "user_folders",
    "validate.sweep",
}

WORLD = {
    "os",
    "subprocess",
    "socket",
    "shutil",
    "tempfile",
    "threading",
    "multiprocessing",
    "signal",
    "time",
    "asyncio",
    "fcntl",
    "mmap",
    "httpx",
    "resource",
    "select",
    "urllib",
    "http",
}

# Modules with fewer than 110 lines and one importer; each stands for the reason given.
SMALL = {
    "importing.accesses": "the rule that makes requests of pieces, apart from files and clocks",
    "importing.patterns": "a language of its own, checked before any path is matched",
    "dashboard.alarm_keeper": "reads and writes the state folder, which the page does only if it is asked to",
    "cli.sparkline": "needs numpy, which `--help` may not load",
    "inference.batch": "windows of many VMs at once, apart from the predictor of one",
    "live.baseline": "the recording of a baseline, started by one command",
    "telemetry.vnet_header": "a kernel format, tested with captured frames",
    "simulate.extended": "the fields that joined later, drawn apart so that earlier simulated stores stay the same",
    "pipeline.publish": "the copy of a finished run to another store",
    "pipeline.other_store": "joins inference and evaluation, which do not import each other",
    "report.svg": "draws on a page, apart from what is drawn",
    "evaluation.selection": "the choice of a model, apart from the scores it is made by",
}

PATHS = sorted(SRC.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path) for path in PATHS}
TREES = {name_of(path): ast.parse(path.read_text()) for path in PATHS}
LINES = {name_of(path): len(path.read_text().splitlines()) for path in PATHS}


def imports_of(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module.removeprefix("phasewatch.") in MODULES else node.module)
    return found


def modules_imported_by(name: str) -> set[str]:
    ours = {target.removeprefix("phasewatch.") for target in IMPORTS[name] if target.startswith("phasewatch.")}
    return {target for target in ours if target in TREES and target != name}


IMPORTS = {name: imports_of(tree) for name, tree in TREES.items()}
GRAPH = {name: modules_imported_by(name) for name in TREES}


def package_of(name: str) -> str:
    return name.split(".")[0]


def test_every_package_has_a_rank() -> None:
    assert {package_of(name) for name in TREES} == set(RANKS)


def test_packages_import_only_what_is_more_basic() -> None:
    wrong = {
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if package_of(name) != package_of(target) and RANKS[package_of(target)] >= RANKS[package_of(name)]
    }

    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    without = dict(GRAPH)
    while free := [name for name, targets in without.items() if not targets & without.keys()]:
        for name in free:
            del without[name]

    assert not without


def test_class_names_are_unique() -> None:
    names = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))

    assert not [name for name, count in names.items() if count > 1]


def test_modules_are_of_a_readable_size_and_have_a_docstring() -> None:
    assert not [name for name, lines in LINES.items() if lines > MAX_LINES]
    assert not [name for name, tree in TREES.items() if not ast.get_docstring(tree)]


def test_small_modules_with_one_importer_have_a_reason() -> None:
    importers: dict[str, set[str]] = defaultdict(set)
    for name, targets in GRAPH.items():
        for target in targets:
            importers[target].add(name)
    small = {name for name, lines in LINES.items() if lines < 110 and len(importers[name]) == 1}
    packages = {package_of(name) for name in TREES if "." in name} | {"lab.guest", "lab.plans", "lab.network"}

    assert small - packages - {"_version"} == SMALL.keys()


def test_only_the_listed_modules_touch_the_world() -> None:
    def touches(name: str) -> bool:
        calls = {n.func.id for n in ast.walk(TREES[name]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        return bool({target.split(".")[0] for target in IMPORTS[name]} & WORLD or calls & {"open", "print", "input"})

    assert {name for name in TREES if package_of(name) != "cli" and touches(name)} == IMPURE


def test_no_deadline_swallows_a_cancellation() -> None:
    """`asyncio.wait_for` of Python 3.11 does, where both come at once; `asyncio.timeout` passes the cancellation on."""
    assert not [name_of(path) for path in PATHS if "wait_for(" in path.read_text()]


def test_one_module_loads_onnxruntime() -> None:
    """Its reports to its maker must be off before it is loaded, and it must run on one thread."""
    loaders = {name for name, targets in IMPORTS.items() if "onnxruntime" in {t.split(".")[0] for t in targets}}

    assert loaders == {"inference.onnx_session"}


def test_importing_phasewatch_turns_the_reports_of_onnxruntime_off() -> None:
    """The library reads the variable while it is loaded; torch's exporter loads it, too."""
    probe = "import os, phasewatch; print(os.environ['ORT_DISABLE_TELEMETRY'])"

    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env={}).stdout

    assert out == "1\n"


def test_nothing_unpickles() -> None:
    unpicklers = {"pickle", "dill", "shelve", "joblib", "marshal"}

    assert not [name for name, targets in IMPORTS.items() if {t.split(".")[0] for t in targets} & unpicklers]
