"""export, predict, commission and watch as a user meets them: what they print, what they leave, what they refuse."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.cli.conftest import Said
from tests.factories.qemu import FakeQemu
from tests.factories.trained_runs import FOLD, RECIPE, write_trained_run

from phasewatch.alarms.history import read_alarms
from phasewatch.bundle.archive import unpack_bundle
from phasewatch.features.windows import FLAG_MIXED
from phasewatch.live.baseline import read_baseline_file
from phasewatch.types import PHASES

Run = Callable[..., Said]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("cli") / "run", threats=("realistic", "proc", "oracle"))


@pytest.fixture(scope="module")
def edge(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from phasewatch.inference.export import ExportRequest, export_run

    return export_run(run, tmp_path_factory.mktemp("edge") / "x.zip", ExportRequest(recipe=RECIPE, fold=FOLD)).path


def cell(run: Path, threat: str) -> Path:
    return run / "models" / RECIPE / FOLD / threat / "gbt" / "raw-s0"


def test_export_prints_the_parity_and_the_path(phasewatch: Run, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.zip"
    said = phasewatch("export", run, "--recipe", RECIPE, "--fold", FOLD, "--out", out)

    assert said.code == 0
    assert said.lines[-1] == str(out)
    assert "gbt, realistic, proc" in said.lines[-2]


def test_export_prints_json(phasewatch: Run, run: Path, tmp_path: Path) -> None:
    said = phasewatch(
        "export",
        run,
        "--recipe",
        RECIPE,
        "--fold",
        FOLD,
        "--channels",
        "oracle",
        "--out",
        tmp_path / "x.onnx",
        "--json",
    )

    assert json.loads(said.out)["result"]["threats"] == ["oracle"]
    assert json.loads(said.out)["result"]["parity"] <= 1e-5


def test_predict_lists_bundles_that_it_could_not_read(
    phasewatch: Run, run: Path, edge: Path, store: Path, tmp_path: Path
) -> None:
    import shutil

    mine = shutil.copytree(store, tmp_path / "store")
    spoilt = sorted(mine.glob("*/*.tar.zst"))[0]
    spoilt.write_bytes(b"no bundle")
    out = tmp_path / "said.parquet"
    said = phasewatch("predict", mine, "--model", edge, "--out", out)

    table = pq.read_table(out).to_pylist()
    assert said.code == 1
    assert spoilt.name in said.err
    assert said.lines[-1] == str(out)
    assert {row["filter"] for row in table} == {"none"}
    assert len({row["episode_id"] for row in table}) == len(list(mine.glob("*/*.tar.zst"))) - 1
    assert all(abs(sum(row[f"p_{p}"] for p in PHASES) - 1) < 1e-5 for row in table)
    assert {row["threat"] for row in table} == {"realistic"}
    assert {type(row[name]) for row in table for name in ("alarm", "activity_alarm")} == {bool}


def test_predict_decides_every_second_or_every_five_and_shows_filtered_phases_on_request(
    phasewatch: Run, run: Path, store: Path, tmp_path: Path
) -> None:
    bundle = sorted(store.glob("*/*.tar.zst"))[0]
    model = cell(run, "realistic")
    options = {"1": (), "5": ("--stride", "5"), "phase": ("--smoothing", "phase")}
    tables = {}
    for name, option in options.items():
        assert phasewatch("predict", bundle, "--model", model, "--out", tmp_path / "x.parquet", *option).code == 0
        tables[name] = pq.read_table(tmp_path / "x.parquet").to_pylist()
    times = {name: sorted({row["t_center_ns"] for row in table}) for name, table in tables.items()}
    p = {row["t_center_ns"]: [row[f"p_{phase}"] for phase in PHASES] for row in tables["1"]}

    assert set(np.diff(times["1"])) == {10**9}
    assert times["5"] == times["1"][::5]
    assert all(p[row["t_center_ns"]] == [row[f"p_{phase}"] for phase in PHASES] for row in tables["5"])
    assert {row["filter"] for row in tables["phase"]} == {"none", "phase"}
    plain, smooth = ([r["alarm"] for r in tables["phase"] if r["filter"] == name] for name in ("none", "phase"))
    assert plain == smooth == [row["alarm"] for row in tables["1"]]


def test_a_checkpoint_and_its_edge_bundle_predict_the_same(
    phasewatch: Run, run: Path, edge: Path, tmp_path: Path
) -> None:
    corpus = Path(__file__).parents[2] / "corpus" / "lab-v1"
    bundle = sorted(corpus.glob("pc/*.tar.zst"))[0]
    tables = []
    for number, model in enumerate((cell(run, "realistic"), edge)):
        assert phasewatch("predict", bundle, "--model", model, "--out", tmp_path / f"{number}.parquet").code == 0
        tables.append(pq.read_table(tmp_path / f"{number}.parquet").to_pylist())

    one, two = tables
    assert len(one) == len(two) > 20
    for a, b in zip(one, two, strict=True):
        assert max(abs(a[f"p_{p}"] - b[f"p_{p}"]) for p in PHASES) < (1e-3 if a["filter"] == "phase" else 1e-5)
        assert (a["t_center_ns"], a["y_true"]) == (b["t_center_ns"], b["y_true"])


def test_predict_flags_windows_of_two_phases_as_a_run_does(
    phasewatch: Run, edge: Path, store: Path, tmp_path: Path
) -> None:
    phasewatch("predict", store, "--model", edge, "--out", tmp_path / "said.parquet")

    table = pq.read_table(tmp_path / "said.parquet").to_pylist()
    assert {row["purity"] < 1 for row in table} == {True, False}
    assert all(bool(row["flags"] & FLAG_MIXED) is (row["purity"] < 1) for row in table)


def test_a_run_without_a_deploy_model_is_an_error_that_names_the_remedy(
    phasewatch: Run, run: Path, store: Path, tmp_path: Path
) -> None:
    said = phasewatch("predict", store, "--model", run, "--out", tmp_path / "x.parquet")

    assert said.code == 3
    assert "no deployed model; train one" in said.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        pytest.param(("--pid", "4194305"), 5, "there is no such process", id="a dead pid"),
        pytest.param(("--pid", "1"), 5, "the process is not QEMU", id="another program"),
        pytest.param(("--name", "nobody"), 5, "no running machine has it", id="no such name"),
        pytest.param(("--qmp", "/nonexistent"), 5, "no running machine has it", id="no such socket"),
        pytest.param((), 2, "--pid N", id="nothing said"),
    ],
)
@pytest.mark.parametrize("command", ["watch", "baseline"])
def test_an_unknown_vm_is_one_line_with_its_code(
    phasewatch: Run, tmp_path: Path, command: str, arguments: tuple[str, ...], code: int, words: str
) -> None:
    more = ("--out", tmp_path / "host.json") if command == "baseline" else ()
    said = phasewatch(command, *arguments, *more)

    assert said.code == code
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_watch_list_lists_the_running_vms(phasewatch: Run) -> None:
    assert phasewatch("watch", "--list").code == 0
    assert "machines" in json.loads(phasewatch("watch", "--list", "--json").out)["result"]


@pytest.fixture
def pretender(tmp_path: Path) -> Any:
    """A process that calls itself QEMU, with a monitor that answers for it."""
    qemu = tmp_path / "qemu-system-x86_64"
    qemu.symlink_to(sys.executable)
    door = tmp_path / "q.sock"
    child = subprocess.Popen(
        [
            str(qemu),
            "-c",
            "print(flush=True); input()",
            "-name",
            f"pretender-{os.getpid()}",
            "-qmp",
            f"unix:{door},server=on",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    with FakeQemu(door, tids=(child.pid,)) as fake:
        yield child, fake
    child.kill()
    child.communicate()


def watched(pretender: Any, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    child, _ = pretender
    command = [sys.executable, "-m", "phasewatch", "watch", "--pid", str(child.pid), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def wait_for_attachment(qemu: FakeQemu) -> None:
    until = time.monotonic() + 60
    while not qemu.objects and time.monotonic() < until:
        time.sleep(0.05)


def test_watch_json_prints_event_lines_and_the_result_last(pretender: Any, edge: Path) -> None:
    done = watched(pretender, "--model", edge, "--seconds", "13.5", "--json")

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert {line["type"] for line in lines[:-1]} >= {"telemetry", "phase"}
    result = lines[-1]["result"]
    assert (result["threat"], result["left_as_found"]) == ("proc", True)  # realistic needs translation counters
    assert result["watched"]["windows"] >= 1
    assert pretender[1].objects == {}
    assert pretender[1].interval == 7


def test_a_watch_with_a_configuration_serves_its_figures_and_keeps_a_history(
    pretender: Any, edge: Path, tmp_path: Path
) -> None:
    child, _ = pretender
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    config = tmp_path / "watch.toml"
    config.write_text(f'[watch]\nmodel = "{edge}"\nstate = "{tmp_path / "state"}"\n[outputs.metrics]\nport = {port}\n')
    command = [sys.executable, "-m", "phasewatch", "watch", "--pid", str(child.pid), "--config", str(config)]
    page = ""
    with subprocess.Popen([*command, "--seconds", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watcher:
        until = time.monotonic() + 55
        while "phasewatch_vm_phase_probability{" not in page and time.monotonic() < until:
            time.sleep(0.2)
            with suppress(httpx.HTTPError):
                page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(timeout=30) == 0

    assert f'vm="pretender-{os.getpid()}"' in page
    assert read_alarms(tmp_path / "state") == ()
    assert (tmp_path / "state" / "alarms.sqlite").is_file()


def test_many_vms_are_watched_by_names_patterns_or_a_configuration(pretender: Any, edge: Path, tmp_path: Path) -> None:
    name = f"pretender-{os.getpid()}"
    (tmp_path / "watch.toml").write_text(f'[watch]\nmatch = ["{name}*"]\nmodel = "{edge}"\n')
    command = [sys.executable, "-m", "phasewatch", "watch", "--seconds", "14", "--json"]
    state = tmp_path / "state"
    for arguments in ((f"{name}*", "--model", edge, "--state", state), ("--config", tmp_path / "watch.toml")):
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)

        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 0, done.stderr
        result = lines[-1]["result"]
        assert [(vm["name"], vm["threat"], vm["reason"]) for vm in result["vms"]] == [(name, "proc", "")]
        assert [line["vm"]["kind"] for line in lines if "vm" in line][:2] == ["attaching", "watched"]
        assert {line["type"] for line in lines if "type" in line} >= {"telemetry", "phase"}
        assert result["left_as_found"] is True
        assert (pretender[1].objects, pretender[1].interval) == ({}, 7)
    assert (state / "watch_v1.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [("a*", "--name", "b"), ("--all", "--pid", "7"), ("a*", "--baseline", "x.json")],
)
def test_options_of_one_vm_do_not_go_with_many(phasewatch: Run, arguments: tuple[str, ...]) -> None:
    said = phasewatch("watch", *arguments)

    assert said.code == 2
    assert len(said.err.strip().splitlines()) == 1


def test_a_configuration_with_a_fault_is_refused_before_the_vm_is_touched(pretender: Any, tmp_path: Path) -> None:
    (tmp_path / "watch.toml").write_text("[outputs.webhok]\n")

    done = watched(pretender, "--config", tmp_path / "watch.toml")

    assert done.returncode == 2
    assert "did you mean webhook?" in done.stderr
    assert pretender[1].objects == {}


def test_a_closed_pipe_ends_the_watch_and_readings_are_saved(pretender: Any, edge: Path, tmp_path: Path) -> None:
    child, qemu = pretender
    command = [sys.executable, "-m", "phasewatch", "watch", "--pid", str(child.pid), "--model", str(edge), "--json"]
    with subprocess.Popen(
        [*command, "--save", str(tmp_path / "kept")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        while "phase" not in json.loads(watcher.stdout.readline())["type"]:
            pass
        time.sleep(4)
        watcher.stdout.close()
        assert watcher.wait(timeout=30) == 0

    assert len(list((tmp_path / "kept").glob("*/*.tar.zst"))) == 1
    assert qemu.objects == {}


def test_a_hangup_ends_the_watch_cleanly(pretender: Any, edge: Path, tmp_path: Path) -> None:
    child, qemu = pretender
    command = ["env", "--default-signal=HUP", sys.executable, "-m", "phasewatch", "watch"]  # under nohup it is ignored
    command += ["--pid", str(child.pid), "--model", str(edge), "--json", "--save", str(tmp_path / "kept")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        while json.loads(watcher.stdout.readline())["type"] != "phase":
            pass
        time.sleep(4)
        watcher.send_signal(signal.SIGHUP)
        *_, last = watcher.stdout

    assert json.loads(last)["result"]["watched"]["why"] == "interrupted"
    assert len(list((tmp_path / "kept").glob("*/*.tar.zst"))) == 1
    assert qemu.objects == {}


def test_baseline_measures_for_the_given_time(pretender: Any, phasewatch: Run, tmp_path: Path) -> None:
    child, qemu = pretender
    out = tmp_path / "host.json"
    said = phasewatch("baseline", "--pid", child.pid, "--minutes", "0.2", "--out", out, "--json")

    result = json.loads(said.out)["result"]
    assert (said.code, result["file"]) == (0, str(out)), said.err
    assert 20 <= result["bins"] <= 28
    assert result["channels"] > 20
    assert read_baseline_file(out).bins == result["bins"]
    assert (qemu.objects, qemu.interval) == ({}, 7)


@pytest.mark.parametrize(("ended", "after_s"), [("Ctrl-C", 3), ("the VM is gone", 14)])
def test_an_interrupted_baseline_keeps_the_old_file(pretender: Any, tmp_path: Path, ended: str, after_s: float) -> None:
    child, qemu = pretender
    out = tmp_path / "host.json"
    out.write_text("of last week")
    command = [sys.executable, "-m", "phasewatch", "baseline", "--pid", str(child.pid), "--minutes", "1"]
    with subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as p:
        wait_for_attachment(qemu)
        time.sleep(after_s)
        (p if ended == "Ctrl-C" else child).send_signal(signal.SIGINT if ended == "Ctrl-C" else signal.SIGKILL)
        _, err = p.communicate(timeout=30)

    assert p.returncode == (130 if ended == "Ctrl-C" else 3)
    assert ended == "Ctrl-C" or "the VM is gone after 1" in err
    assert out.read_text() == "of last week"


def test_a_stalled_reader_blocks_neither_the_watch_nor_its_end(pretender: Any, edge: Path, tmp_path: Path) -> None:
    child, qemu = pretender
    command = [sys.executable, "-m", "phasewatch", "watch", "--pid", str(child.pid), "--model", str(edge), "--json"]
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # two or three events fill it
    with subprocess.Popen([*command, "--save", str(tmp_path / "kept")], stdout=writer, stderr=subprocess.DEVNULL) as p:
        os.close(writer)
        wait_for_attachment(qemu)
        time.sleep(16)
        p.send_signal(signal.SIGTERM)
        assert p.wait(timeout=20) == 0
    os.close(reader)

    (bundle,) = (tmp_path / "kept").glob("*/*.tar.zst")
    assert unpack_bundle(bundle.read_bytes(), file="x").manifest.duration_s >= 12
    assert qemu.objects == {}


def test_two_interrupts_while_the_monitor_hangs_still_restore_the_vm(pretender: Any, edge: Path) -> None:
    child, qemu = pretender
    command = [sys.executable, "-m", "phasewatch", "watch", "--pid", str(child.pid), "--model", str(edge), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert "telemetry" in watcher.stdout.readline()
        qemu.mute.set()
        watcher.send_signal(signal.SIGTERM)
        time.sleep(1.0)  # it asks the monitor to take the filter out, and waits for the answer
        watcher.send_signal(signal.SIGTERM)
        watcher.communicate(timeout=30)
    assert len(qemu.objects) == 2  # one filter a direction
    qemu.mute.clear()

    until = time.monotonic() + 30
    while (qemu.objects or qemu.interval != 7) and time.monotonic() < until:
        time.sleep(0.05)
    assert qemu.objects == {}
    assert qemu.interval == 7


def test_watch_with_an_edge_bundle_loads_no_training_packages_and_stays_small(pretender: Any, edge: Path) -> None:
    code = (
        "import sys\n"
        "from phasewatch.cli import app\n"
        "try:\n"
        "    app(sys.argv[1:], prog_name='phasewatch', standalone_mode=False)\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch','lightgbm','sklearn','scipy','pyarrow','plotly','pandas','onnx','skl2onnx','numba','ray'}\n"
        "peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "sys.stderr.write('\\n%s %d\\n' % (sorted(heavy & {m.split('.')[0] for m in sys.modules}), peak))\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "watch",
        "--pid",
        str(pretender[0].pid),
        "--model",
        str(edge),
        "--seconds",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    loaded, peak_kib = done.stderr.strip().splitlines()[-1].rsplit(" ", 1)
    assert loaded == "[]", done.stderr
    assert int(peak_kib) < 150 * 1024


def test_watch_refuses_an_oracle_model_and_does_not_touch_the_vm(pretender: Any, run: Path) -> None:
    done = watched(pretender, "--model", cell(run, "oracle"))

    assert done.returncode == 4
    assert "needs channels that the guest reports" in done.stderr
    assert pretender[1].objects == {}
    assert pretender[1].interval == 7


def test_watch_names_the_channel_set_to_train_when_channels_are_missing(pretender: Any, run: Path) -> None:
    pretender[1].accel = "kvm"
    done = watched(pretender, "--model", cell(run, "realistic"))

    assert done.returncode == 4
    assert "realistic needs qmp.jit_tb" in done.stderr
    assert "--channels portable" in done.stderr


def test_every_output_warns_about_an_accelerator_unknown_to_training(pretender: Any, edge: Path) -> None:
    pretender[1].accel = "kvm"
    done = watched(pretender, "--model", edge, "--seconds", "13.5", "--json")

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    seen = [line["data"] for line in lines[:-1] if line["type"] == "phase"]
    assert lines[-1]["result"]["threat"] == "proc"
    assert seen
    assert all("never saw a VM under kvm" in data["caveat"] for data in seen)
    assert "never saw a VM under kvm" in done.stderr


@pytest.mark.parametrize("kind", ["no socket", "mute"])
def test_a_given_qmp_socket_that_does_not_answer_is_one_line(
    pretender: Any, edge: Path, tmp_path: Path, kind: str
) -> None:
    door = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "mute":
            listener.bind(str(door))
            listener.listen()
        done = watched(pretender, "--qmp", door, "--model", edge)

    assert done.returncode == 5
    assert "did not answer" in done.stderr
    assert ("within 2 s" in done.stderr) == (kind == "mute")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_baseline_for_a_model_of_raw_input_is_refused(pretender: Any, edge: Path, tmp_path: Path) -> None:
    (tmp_path / "host.json").write_text('{"format":"phasewatch-commission/1","host_id":"h","bins":1,"channels":[]}')
    done = watched(pretender, "--model", edge, "--baseline", tmp_path / "host.json")

    assert done.returncode == 4
    assert "raw values" in done.stderr


def two_outputs(monkeypatch: pytest.MonkeyPatch, *, is_only: bool, lines: int) -> list[str]:
    """Print lines to a stdout whose reader has left; return what was said on stderr."""
    from phasewatch.cli.live import _open_outputs

    reader, writer = os.pipe()
    os.close(reader)
    said, log = os.pipe()
    with os.fdopen(writer, "w") as out, os.fdopen(log, "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        try:
            with _open_outputs(is_only=is_only) as (put, _):
                for _ in range(lines):
                    put("an event")
                    time.sleep(0.05)
        finally:
            monkeypatch.undo()
    with os.fdopen(said) as text:
        return text.read().splitlines()


def test_a_closed_pipe_ends_a_watch_without_webhook(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrokenPipeError):
        two_outputs(monkeypatch, is_only=True, lines=20)


def test_a_closed_pipe_does_not_end_a_watch_with_webhook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(two_outputs(monkeypatch, is_only=False, lines=20)) == 2  # once when it happened, once how much was lost


def test_predict_scores_a_store_of_other_hosts_on_request(
    phasewatch: Run, edge: Path, store: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "m.json"
    said = phasewatch(
        "predict", store, "--model", edge, "--out", tmp_path / "p.parquet", "--metrics", metrics, "--json"
    )

    result = json.loads(said.out)["result"]
    rows = json.loads(metrics.read_bytes())["metrics"]
    assert said.code == 0
    assert {row["recipe"] for row in rows} == {"other_store"}
    assert 0 <= result["scores"]["macro_f1"]["value"] <= 1
    assert any("only hosts were compared" in (row["note"] or "") for row in rows)
