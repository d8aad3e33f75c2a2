"""Whatever lies where a bundle should be: one clear line, the right exit code, and the good ones are used all the
same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.factories.bundles import episode, members_of, with_rows
from tests.factories.stores import put, put_bytes, put_members, write_store
from typer.testing import CliRunner, Result

from phasewatch.bundle.archive import pack_bundle
from phasewatch.cli import app
from phasewatch.store.local import RECEIPT_SUFFIX
from phasewatch.types import SourceKind


def phasewatch(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def validated(store: Path, run: Path) -> dict[str, object]:
    """Validate, and give the JSON result."""
    done = phasewatch("validate", store, "--out", run, "--workers", 1, "--json")
    assert done.exit_code == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)["result"]
    return result


def _relabelled(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], Mapping[str, bytes]]:
    """Change the labels, and let the manifest's digest of them stand."""
    return lambda members: {**members, "labels.jsonl": members["labels.jsonl"].replace(old, new)}


def _marked(store: Path, mangle: Callable[[bytes], bytes]) -> Path:
    """Store an episode with other labels, the manifest in agreement with them."""
    whole = episode()
    members = members_of(whole)
    data = pack_bundle(whole.manifest, {**members, "labels.jsonl": mangle(members["labels.jsonl"])}, level=3)
    return put_bytes(put(store, whole), data)


def _turned(labels: bytes) -> bytes:
    first, second, *rest = labels.splitlines(keepends=True)
    return b"".join([second, first, *rest])


SPOILT: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "not a bundle": (lambda s: put_bytes(put(s, episode()), b"hello, I am a text file\n"), "errored", "zstd-magic"),
    "truncated": (
        lambda s: put_bytes(p := put(s, episode()), p.read_bytes()[:-500]),
        "errored",
        "zstd-truncated",
    ),
    "empty": (lambda s: put_bytes(put(s, episode()), b""), "errored", "compressed-size"),
    "the receipt of another file": (
        lambda s: (p := put(s, episode())).with_name(p.name + RECEIPT_SUFFIX).write_text(f"{'0' * 64}  {p.name}\n"),
        "rejected",
        "receipt",
    ),
    "an unknown member": (
        lambda s: put_members(s, episode(), lambda m: {**m, "notes.txt": b"hi\n"}),
        "rejected",
        "member-unknown",
    ),
    "a member that is not what the manifest says": (
        lambda s: put_members(s, episode(), _relabelled(b"active", b"clean ")),
        "rejected",
        "member-sha256",
    ),
    "an unknown phase": (
        lambda s: _marked(s, lambda labels: labels.replace(b'"active"', b'"zombie"')),
        "rejected",
        "label-phase",
    ),
    "labels whose time goes backwards": (lambda s: _marked(s, _turned), "rejected", "label-order"),
    "no proc at all": (
        lambda s: put(s, with_rows(episode(), without=[SourceKind.PROC])),
        "rejected",
        "rows:proc",
    ),
    "no netflow": (
        lambda s: put(s, with_rows(episode(), without=[SourceKind.NETFLOW])),
        "degraded",
        "missing:netflow",
    ),
    "no receipt": (
        lambda s: (p := put(s, episode())).with_name(p.name + RECEIPT_SUFFIX).unlink(),
        "degraded",
        "no-receipt",
    ),
    "a receipt whose bundle is gone": (lambda s: put(s, episode()).unlink(), "errored", "bundle-missing"),
    "another file name": (
        lambda s: (p := put(s, episode())).rename(p.with_name("first.tar.zst")),
        "rejected",
        "identity",
    ),
}


@pytest.mark.parametrize("case", SPOILT.values(), ids=SPOILT)
def test_validate_reports_a_damaged_bundle_and_continues(
    case: tuple[Callable[[Path], object], str, str], tmp_path: Path
) -> None:
    spoil, status, reason = case
    spoil(tmp_path / "store")

    result = validated(tmp_path / "store", tmp_path / "run")

    assert result[status] == 1
    assert reason in result["reasons"]  # type: ignore[operator]


def test_one_valid_bundle_among_nine_broken_ones_is_used(tmp_path: Path) -> None:
    store = tmp_path / "store"
    put(store, episode(number=1))
    for number in range(2, 11):
        put_bytes(put(store, episode(number=number)), bytes([number]) * 40)

    result = validated(store, tmp_path / "run")
    done = phasewatch("features", tmp_path / "run", "--json")

    assert (result["in"], result["accepted"], result["errored"]) == (10, 1, 9)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["result"]["episodes"] == 1


def test_a_file_name_that_is_not_utf8_does_not_stop_validate(tmp_path: Path) -> None:
    store = tmp_path / "store"
    put(store, episode())

    with open(os.fsencode(store) + b"/h1/caf\xe9.tar.zst", "wb") as file:  # noqa: PTH123  a path of bytes
        file.write(b"x")

    result = validated(store, tmp_path / "run")

    assert (result["in"], result["accepted"]) == (2, 1)


def test_control_characters_of_a_file_name_are_escaped(tmp_path: Path) -> None:
    store = tmp_path / "store"
    put(store, episode())
    (store / "h1" / "\x1b[2Jgone.tar.zst").write_bytes(b"x")

    done = phasewatch("validate", store, "--out", tmp_path / "run", "--workers", 1)

    assert done.exit_code == 0
    assert "\x1b" not in done.stdout + done.stderr


REFUSED = {
    "no such store": (("validate", "STORE/none", "--out", "RUN"), 3, "no such folder"),
    "an empty store": (("validate", "STORE", "--out", "RUN"), 3, "empty"),
    "an empty store, the whole way": (("run", "STORE", "--out", "RUN"), 3, "empty"),
    "no store, the whole way": (("run", "STORE/none", "--out", "RUN"), 3, "no such"),
    "a store to record": (("run", "STORE/none", "--out", "RUN"), 3, "`phasewatch record --plan smoke --out"),
    "an unknown model, before a long sweep": (
        ("run", "STORE", "--out", "RUN", "--models", "gtb"),
        2,
        "did you mean gbt?",
    ),
    "an unknown recipe, before a long sweep": (
        ("run", "STORE", "--out", "RUN", "--recipes", "held_out"),
        2,
        "held_out_",
    ),
    "no run": (("train", "RUN/none"), 3, "no such run"),
    "a run that was not validated": (("features", "RUN"), 3, "not a run: it holds no file of a run"),
    "a bundle to score": (("predict", "STORE/h1/none.tar.zst", "--out", "RUN/x.parquet"), 3, "no such bundle"),
    "a table that would be no parquet": (("predict", "STORE", "--out", "RUN/x.csv"), 2, "X.parquet"),
    "no bundle": (("inspect", "STORE/h1/none.tar.zst"), 3, "no such bundle"),
    "neither store nor code": (("validate",), 2, "phasewatch validate STORE --out RUN"),
    "an unknown code": (("validate", "--explain", "silense"), 2, "silence"),
    "an unknown plan": (("record", "--plan", "none", "--out", "STORE"), 3, "none"),
    "a host that a plan lacks": (
        ("record", "--plan", "smoke", "--out", "STORE", "--dry-run", "--hosts", "pc,mircovm"),
        2,
        "did you mean microvm?",
    ),
    "a role that a plan lacks": (
        ("record", "--plan", "smoke", "--out", "STORE", "--dry-run", "--role", "soak", "--hosts", "pc"),
        2,
        "--role soak --hosts pc: plan smoke has no such session",
    ),
    "an image that is not there": (
        ("record", "--image", "STORE/none.qcow2", "--out", "STORE"),
        3,
        "--image names a qcow2",
    ),
    "the longest before the shortest": (
        ("simulate", "--out", "STORE/x", "--seconds", "200", "100"),
        2,
        "--seconds 200 100: the shortest, then the longest",
    ),
    "more hosts than episodes": (
        ("simulate", "--out", "STORE/x", "--hosts", "4", "--episodes", "2"),
        2,
        "--hosts 4 --episodes 2: ",
    ),
    "two machines at once": (("watch", "--pid", "1", "--name", "web01"), 2, "--name goes with no --pid"),
    "a measure too short to give a number": (
        ("baseline", "--name", "x", "--minutes", "0.1", "--out", "RUN/x.json"),
        2,
        "--minutes",
    ),
    "no number of seconds": (("watch", "--name", "x", "--seconds", "nan"), 2, "--seconds nan: a finite number"),
    "no end of a measure": (
        ("baseline", "--name", "x", "--minutes", "inf", "--out", "RUN/x.json"),
        2,
        "--minutes inf: a finite number",
    ),
    "no number in a pair": (
        ("simulate", "--out", "STORE/x", "--seconds", "60", "nan"),
        2,
        "--seconds nan: a finite number",
    ),
    "an episode where nothing is played": (("dashboard", "--no-produce", "--episode", "x"), 2, "--episode needs"),
    "a pace where nothing is played": (("dashboard", "--no-produce", "--speed", "2"), 2, "--speed needs"),
    "a moment of no episode": (("explain", "RUN", "x"), 2, "--at"),
    "a port of no page": (("demo", "--port", "8000"), 2, "--port needs --live"),
    "a store beside a run": (("features", "RUN", "--store", "STORE"), 2, "leave out --store, or the run"),
    "a subset of a run": (("features", "RUN", "--limit", "3"), 2, "leave out --limit, or the run"),
    "a word for a number": (("validate", "STORE", "--out", "RUN", "--workers", "many"), 2, "--workers"),
    "an unknown command": (("vaildate", "STORE"), 2, "vaildate"),
}


@pytest.mark.parametrize(("args", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_call_prints_one_error_and_its_exit_code(
    args: tuple[str, ...], code: int, words: str, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "run").mkdir()
    places = {"STORE": str(tmp_path / "store"), "RUN": str(tmp_path / "run")}

    done = phasewatch(*(arg.replace("STORE", places["STORE"]).replace("RUN", places["RUN"]) for arg in args))

    assert done.exit_code == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert code == 2 or len(done.stderr.strip().splitlines()) == 1


def test_a_locked_run_is_not_changed(tmp_path: Path) -> None:
    from phasewatch.atomic import lock

    put(tmp_path / "store", episode())
    with lock(tmp_path / "run"):
        done = phasewatch("validate", tmp_path / "store", "--out", tmp_path / "run")

    assert done.exit_code == 5
    assert "another process" in done.stderr


def test_a_store_that_no_recipe_can_be_built_from_is_reported(tmp_path: Path) -> None:
    write_store(tmp_path / "store", hosts=1, sessions=1)

    done = phasewatch("run", tmp_path / "store", "--out", tmp_path / "run", "--workers", 1)

    assert done.exit_code == 4
    assert "at least 2 hosts" in done.stderr
    assert "splits_v1.json has the reason of each" in done.stderr
    assert "held_out_sample" not in done.stderr
    assert "held_out_sample" in (tmp_path / "run" / "splits_v1.json").read_text()


def test_validate_fails_on_findings_only_with_fail_on_or_a_budget(tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    put_bytes(put(store, episode()), b"x")
    base = ("validate", store, "--out", run, "--workers", 1)

    assert phasewatch(*base).exit_code == 0
    assert phasewatch(*base, "--fail-on", "errored").exit_code == 1
    assert phasewatch(*base, "--budget-errored", 0).exit_code == 1
    assert phasewatch(*base, "--budget-errored", 1).exit_code == 0
    assert phasewatch(*base, "--fail-on", "awful").exit_code == 2


def test_inspect_shows_a_damaged_bundle(tmp_path: Path) -> None:
    path = put_bytes(put(tmp_path / "store", episode()), b"hello")

    done = phasewatch("inspect", path)

    assert done.exit_code == 1
    assert "zstd-magic" in done.stdout
    assert "profile    unknown: no manifest" in done.stdout


def test_validate_reads_a_replaced_bundle_again(tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    path = put(store, episode())
    before = validated(store, run)
    put_bytes(path, path.read_bytes()[:-100])

    after = validated(store, run)

    assert (before["accepted"], after["accepted"], after["errored"]) == (1, 0, 1)


def test_validate_force_finds_damage_that_keeps_size_and_time(tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    path = put(store, episode())
    stamp = path.stat()
    validated(store, run)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    kept = validated(store, run)
    done = phasewatch("validate", store, "--out", run, "--workers", 1, "--force", "--json")

    assert kept["accepted"] == 1
    assert json.loads(done.stdout)["result"]["accepted"] == 0


def test_a_copied_bundle_is_rejected_with_the_name_of_the_original(tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    first = episode(number=1)
    put(store, first)
    second = episode(number=2)
    put(store, replace(first, manifest=second.manifest))

    result = validated(store, run)

    assert (result["accepted"], result["rejected"]) == (1, 1)
    assert "duplicate" in result["reasons"]  # type: ignore[operator]
