"""No command opens a connection or writes a file that nobody asked for, nor does any library that it loads.

`CI` is unset, because some libraries send reports only where it is.
"""

from __future__ import annotations

import getpass
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.environment.commands import EDGE, one_bundle
from tests.environment.traced import Traced, need_tracing, trace
from tests.factories.alarms import raised
from tests.factories.jumpy_models import write_jumpy_model
from tests.factories.trained_runs import FOLD, RECIPE, write_trained_run
from tests.requirements import need_program

from phasewatch.alarms.history import AlarmHistory

pytestmark = pytest.mark.slow
VISITOR = (sys.executable, str(Path(__file__).with_name("visitor.py")))


@pytest.fixture(scope="module", autouse=True)
def _tracing() -> None:
    need_tracing()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small store and a trained run."""
    path = tmp_path_factory.mktemp("traced")
    trace_checked(path, "simulate", "--hosts", "3", "--episodes", "12", "--out", "store")
    write_trained_run(path / "run", models=("gbt", "mlp"), threats=("realistic",))
    return path


def trace_checked(folder: Path, *arguments: str | Path, before: tuple[str, ...] = (), code: int = 0) -> Traced:
    """Run a command and hold it to the promise."""
    seen = trace(folder, arguments, before=before)

    assert seen.code == code, seen.output
    assert not seen.is_name_asked
    assert not {path for path in seen.outside if not is_scratch(path)}
    # torch makes an empty folder for its compiler, which nothing here uses, when an optimizer or an exporter is loaded.
    assert set(seen.left) <= {f"temporary/torchinductor_{getpass.getuser()}"}
    return seen


def is_scratch(path: str) -> bool:
    """Whether it is memory that processes share: a semaphore, or the folder of a watch, which goes with it."""
    return path.startswith(("/dev/shm/sem.", "/dev/shm/phasewatch-")) and not Path(path).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("doctor",),
        ("channels",),
        ("inspect", one_bundle()),
        ("predict", one_bundle(), "--model", EDGE, "--out", "windows.parquet"),
        ("validate", "store", "--out", "validated"),
        ("run", "store", "--out", "whole", "--recipes", "random_windows", "--models", "gbt,mlp", "--workers", "1"),
        ("export", "run", "--recipe", RECIPE, "--fold", FOLD, "--out", "gbt.zip"),
        ("export", "run", "--recipe", RECIPE, "--fold", FOLD, "--model", "mlp", "--out", "mlp.zip"),
        ("report", "run"),
        ("record", "--plan", "smoke", "--dry-run", "--out", "recorded"),
    ],
    ids=lambda arguments: " ".join(str(a) for a in arguments if not Path(str(a)).is_absolute()),
)
def test_a_command_speaks_to_nobody_and_writes_only_where_it_was_told(
    folder: Path, arguments: tuple[str | Path, ...]
) -> None:
    seen = trace_checked(folder, *arguments)

    assert seen.addresses == set()


def test_a_dashboard_speaks_to_its_viewers_alone(folder: Path) -> None:
    arguments = ("dashboard", "--no-produce", "--port", "0", "--json", "--token-file", "token")

    seen = trace_checked(folder, *arguments, before=VISITOR)

    assert seen.addresses <= {"127.0.0.1"}


def test_a_shipper_speaks_to_its_receiver_alone(folder: Path) -> None:
    (folder / "tokens").write_text("sim-00: a-long-enough-token\nsim-01: another-long-token\n")
    (folder / "tokens").chmod(0o600)
    subprocess.run(["cp", "-r", "store", "outbox"], cwd=folder, check=True)
    arguments = (
        "ship",
        "--outbox",
        "outbox",
        "--to",
        "http://127.0.0.1:9",
        "--tokens",
        "tokens",
        "--give-up-after",
        "0.1",
    )

    seen = trace_checked(folder, *arguments, code=5)

    assert seen.addresses == {"127.0.0.1"}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Path]:
    """Start a QEMU without a guest, and return its monitor's socket."""
    socket = tmp_path / "qmp"
    words = [need_program("qemu-system-x86_64", "qemu-system-x86"), "-name", "still,debug-threads=on", "-accel", "tcg"]
    words += ["-m", "32", "-nodefaults", "-display", "none", "-qmp", f"unix:{socket},server=on,wait=off"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        while not socket.exists() and process.poll() is None:
            pass
        yield socket
        process.kill()


@pytest.mark.vm
def test_a_watch_speaks_to_nobody(folder: Path, machine: Path) -> None:
    """Twelve seconds: a library that reports every ten would be seen."""
    seen = trace_checked(folder, "watch", "--qmp", machine, "--seconds", "12", "--model", EDGE, "--json")

    assert seen.addresses == set()


@pytest.mark.vm
def test_a_watch_with_outputs_speaks_to_its_receivers_alone(folder: Path, machine: Path) -> None:
    """Every receiver has an address of its own; both alarms are raised by the first windows."""
    (folder / "watch.toml").write_text(
        "[watch]\nstate = 'state'\nsave = 'kept'\n"
        "[outputs.webhook]\nurl = 'http://127.0.0.2:9/x'\n"
        "[outputs.alertmanager]\nurls = ['http://127.0.0.3:9']\n"
        "[outputs.syslog]\naddress = 'udp://127.0.0.4:9'\n"
        "[outputs.ecs]\nfile = 'alarms.json'\n"
        "[outputs.metrics]\nport = 39177\n"
        "[outputs.command]\ncommand = 'true'\n"
    )
    model = write_jumpy_model(folder / "jumpy.zip")
    arguments = ("watch", "--qmp", machine, "--seconds", "25", "--model", model, "--config", "watch.toml", "--json")

    seen = trace_checked(folder, *arguments)

    assert seen.addresses == {"127.0.0.2", "127.0.0.3", "127.0.0.4"}
    assert (folder / "state" / "alarms.sqlite").is_file()
    assert (folder / "alarms.json").read_text().count("alarm-raised") == 2


@pytest.mark.vm
def test_a_dashboard_of_a_vm_speaks_to_its_viewers_alone(folder: Path, machine: Path) -> None:
    name = "still"  # of `machine`
    arguments = ("dashboard", "--watch", name, "--port", "0", "--json", "--token-file", "token")

    seen = trace_checked(folder, *arguments, before=VISITOR)

    assert seen.addresses <= {"127.0.0.1"}


def test_the_alarms_of_a_state_folder_are_read_without_a_trace(folder: Path) -> None:
    with AlarmHistory(folder / "kept-alarms") as history:
        history.record([raised()])
    (folder / "check.toml").write_text(
        "[watch]\nstate = 'kept-alarms'\n[outputs.webhook]\nurl = 'http://127.0.0.2:9'\n"
    )

    for arguments in (("alarms", "list", "--state", "kept-alarms"), ("check-config", "check.toml")):
        assert trace_checked(folder, *arguments).addresses == set()


def test_the_proof_can_fail(folder: Path) -> None:
    """The tracer sees a lookup, a connection and a file, so their absence above means something."""
    code = (
        "import os, pathlib, socket\n"
        "pathlib.Path.home().joinpath('id').touch()\n"
        "try: socket.create_connection(('192.0.2.1', 9), timeout=1)\n"
        "except OSError: pass\n"
        "try: socket.getaddrinfo('host.invalid', 9)\n"
        "except OSError: pass\n"
    )

    seen = trace(folder, ["--version"], before=(sys.executable, "-c", code))

    assert "192.0.2.1" in seen.addresses
    assert seen.is_name_asked
    assert seen.left == ("home/id",)
