"""The house's plan: who may import whom, who touches the world, how long a file may be, what `--help` may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "phasewatch"

# Folders and files in the order in which the data passes them; rooms on one rank do not know each other.
RANKS: dict[str, int] = {
    "__init__": 0, "errors": 0, "vocab": 0,
    "extras": 1, "http_client": 1, "http_server": 1, "user_folders": 1, "channels": 1, "parquet": 1, "profiles": 1, "walk": 1,
    "identity": 1, "naming": 1, "atomic": 1, "workers": 1, "cluster": 1, "installation": 1,
    "episode": 2,
    "store": 3, "grid": 3,
    "record": 4, "simulate": 4, "validate": 4,
    "features": 5,
    "split": 6, "measures": 6,
    "dataset": 7, "models": 7,
    "train": 8, "export": 8,
    "evaluate": 9,
    "report": 10, "audit": 10, "live": 10,
    "predict": 11, "stages": 11, "produce": 11, "dashboard": 11, "pipeline": 12,
    "cli": 13, "__main__": 14,
}  # fmt: skip

# Rooms of one rank that may know each other all the same, each with its reason.
NEIGHBOURS = {
    ("channels", "profiles"), ("channels", "extras"), ("cluster", "workers"), ("dataset", "models"), ("models", "dataset"),
    ("report", "audit"),  # a run that fails its audit has no headline on its page
    ("__init__", "dataset"),  # the package's door: `phasewatch.load`, imported when it is asked for
    ("export", "train"),  # an export finds the cells where train put them
}  # fmt: skip

# Everything else computes: gets time, randomness and bytes handed in, and opens nothing.
WORLDLY = {
    "__init__", "__main__", "http_client", "user_folders", "atomic", "parquet", "workers", "cluster", "extras", "installation",
    "episode.bundle", "grid.files", "simulate", "validate.admission",
    "store.disk", "store.objects", "store.receiver", "store.serving", "store.shipper", "store.admission", "store.tokens",
    "store.published", "store.place_lock", "validate.parts", "http_server.protocol",
    "record.proc", "record.process", "record.qmp", "record.netflow", "record.guest", "record.sink", "record.vm", "record.image",
    "record.recorder", "record.base", "record.accel", "record.doctor", "record.campaign", "record.driver",
    "record.flows", "record.idle", "record.installed", "record.own", "record.session", "record.spawn", "record.questions", "record.threads",
    "validate.index", "validate.sweep", "features.tables", "dataset.run",
    "dataset.splits", "dataset.windows", "models.checkpoint", "train.predictions",
    "train.cells", "export.graph", "export.run", "live.edge", "live.models",
    "live.find", "live.doors", "live.reach", "live.ownership", "live.lines", "live.dump", "live.capture", "live.tap", "live.guard", "live.attach", "live.watcher", "live.save", "live.webhook", "live.session", "live.clean_day",
    "dashboard.hub", "dashboard.token", "dashboard.app", "dashboard.gate", "dashboard.server", "dashboard.watching",
    "produce.loop", "produce.perf", "produce.send",
    "predict", "evaluate.score", "report.page", "audit.run", "stages", "pipeline",
}  # fmt: skip

WORLD = {"os", "subprocess", "socket", "shutil", "tempfile", "threading", "multiprocessing", "signal", "time", "asyncio",
         "fcntl", "mmap", "httpx", "resource", "select", "urllib", "http"}  # fmt: skip
TABLES = {"channels", "profiles"}
MODULES = sorted(SRC.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(name: str) -> str:
    return name.split(".")[0]


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "phasewatch":
                found |= {f"phasewatch.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_imports_only_what_the_data_has_passed(path: Path) -> None:
    here = room_of(name_of(path))
    for target in imports_of(path):
        if not target.startswith("phasewatch."):
            continue
        room = target.split(".")[1]
        if room == here or room not in RANKS:
            continue

        assert RANKS[room] < RANKS[here] or (here, room) in NEIGHBOURS, f"{name_of(path)} reaches for {target}"


def test_every_room_has_a_rank() -> None:
    assert {room_of(name_of(path)) for path in MODULES} <= set(RANKS)


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(name_of(p)) != "cli"], ids=name_of)
def test_only_the_listed_files_touch_the_world(path: Path) -> None:
    if name_of(path) in WORLDLY:
        return
    tree = ast.parse(path.read_text())
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}

    assert not {target.split(".")[0] for target in imports_of(path)} & WORLD
    assert not calls & {"open", "print", "input"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_is_one_sitting_and_says_its_reason_first(path: Path) -> None:
    text = path.read_text()

    assert len(text.splitlines()) <= 600 or name_of(path) in TABLES
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_deadline_never_swallows_a_cancellation(path: Path) -> None:
    """`asyncio.wait_for` of Python 3.11 does, where both come at once: a watch that was told to end went on for ever."""
    assert "wait_for(" not in path.read_text(), "asyncio.timeout does the same and passes a cancellation on"


def test_help_loads_nothing_heavy() -> None:
    heavy = {
        "numpy",
        "torch",
        "xgboost",
        "sklearn",
        "scipy",
        "pyarrow",
        "plotly",
        "rich",
        "qemu",
        "onnxruntime",
        "httpx",
        "pydantic",
    }
    probe = (
        "import sys, contextlib, io\n"
        "from phasewatch.cli import main\n"
        "sys.argv = ['phasewatch', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main()\n"
        f"print(sorted({heavy!r} & set(sys.modules)))\n"
    )

    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout

    assert out.strip() == "[]"


def test_one_module_loads_onnxruntime() -> None:
    """Its reports to its maker must be off before it is loaded, and it must run on one thread."""
    loaders = {name_of(path) for path in MODULES if "onnxruntime" in {t.split(".")[0] for t in imports_of(path)}}

    assert loaders == {"models.onnxsession"}


def test_whoever_imports_phasewatch_has_onnxruntimes_reports_off() -> None:
    """The library reads the variable while it is loaded; torch's exporter loads it, too."""
    probe = "import os, phasewatch; print(os.environ['ORT_DISABLE_TELEMETRY'])"

    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env={}).stdout

    assert out == "1\n"


def test_nothing_unpickles_but_the_pool_what_it_pickled_itself() -> None:
    for path in MODULES:
        if name_of(path) == "workers":
            continue
        assert not {target.split(".")[0] for target in imports_of(path)} & {
            "pickle",
            "dill",
            "shelve",
            "joblib",
            "marshal",
        }
