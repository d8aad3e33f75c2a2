"""The checkpoint's file format alone: verified before any parser sees it, refused in words at the first departure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from phasewatch.errors import MismatchError, RunError
from phasewatch.models import checkpoint
from phasewatch.models.checkpoint import (
    CHECKPOINT_FILE,
    CHECKPOINT_FORMAT,
    CheckpointHeader,
    FileEntry,
    add_header_digest,
    collect_versions,
    read_checkpoint,
    write_checkpoint,
)
from phasewatch.types import PHASES


def header(**changes: object) -> CheckpointHeader:
    made = CheckpointHeader(
        format=CHECKPOINT_FORMAT,
        model="majority",
        input_kind="table",
        mask="realistic",
        columns=("proc.cpu_user.mean",),
        schema_hash="s" * 64,
        behaviour_fingerprint="b" * 64,
        classes=tuple(map(str, PHASES)),
        seen=(0, 1),
        seed=0,
        config={},
        temperature=1.0,
        history={},
        trained_on={},
        versions={},
        files={},
    )
    return msgspec.structs.replace(made, **changes)


def lay(folder: Path, made: CheckpointHeader) -> None:
    """Write a header that fits itself, whatever it says."""
    (folder / CHECKPOINT_FILE).write_bytes(msgspec.json.encode(add_header_digest(made)))


def test_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "deep" / "cell", header(), {"weights.bin": b"weights", "model.ubj": b""})

    found, files = read_checkpoint(tmp_path / "deep" / "cell")

    assert files == {"model.ubj": b"", "weights.bin": b"weights"}
    assert found.files["weights.bin"].bytes == 7
    assert add_header_digest(found) == found


def test_versions_of_packages_that_are_not_installed_are_left_out() -> None:
    assert set(collect_versions(("numpy", "no-such-distribution"))) == {"phasewatch", "numpy"}


REFUSED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no file": (lambda f: (f / CHECKPOINT_FILE).unlink(), RunError, "not found"),
    "a folder in its place": (
        lambda f: ((f / CHECKPOINT_FILE).unlink(), (f / CHECKPOINT_FILE).mkdir()),
        RunError,
        "cannot be read",
    ),
    "no JSON": (lambda f: (f / CHECKPOINT_FILE).write_bytes(b"\x80\x04K\x01."), RunError, "not a checkpoint"),
    "bytes that are no text": (
        lambda f: (f / CHECKPOINT_FILE).write_bytes(b'{"format": "\xff"}'),
        RunError,
        "not a checkpoint",
    ),
    "too large": (
        lambda f: (f / CHECKPOINT_FILE).write_bytes(b" " * (checkpoint.MAX_CHECKPOINT_HEADER_BYTES + 1)),
        RunError,
        "more than",
    ),
    "a later format": (lambda f: lay(f, header(format="phasewatch-checkpoint/9")), MismatchError, "found format"),
    "an unknown key": (
        lambda f: (f / CHECKPOINT_FILE).write_bytes((f / CHECKPOINT_FILE).read_bytes().replace(b'"seed"', b'"need"')),
        RunError,
        "not a checkpoint",
    ),
    "an edit": (
        lambda f: (f / CHECKPOINT_FILE).write_bytes(
            (f / CHECKPOINT_FILE).read_bytes().replace(b"majority", b"minority")
        ),
        MismatchError,
        "edited",
    ),
    "too many files": (
        lambda f: lay(
            f,
            header(
                files={f"w{i}": FileEntry(sha256="0" * 64, bytes=1) for i in range(checkpoint.MAX_CHECKPOINT_FILES + 1)}
            ),
        ),
        RunError,
        "files",
    ),
    "a negative seed": (lambda f: lay(f, header(seed=-1)), RunError, "seed"),
    "no columns": (lambda f: lay(f, header(columns=())), RunError, "columns"),
    "a scale of zero": (lambda f: lay(f, header(floors={"proc.cpu_user": 0.0})), RunError, "floors"),
    "other classes": (lambda f: lay(f, header(classes=("clean",))), MismatchError, "found classes"),
    "no class seen": (lambda f: lay(f, header(seen=())), RunError, "invalid value"),
    "a class that there is not": (lambda f: lay(f, header(seen=(5,))), RunError, "invalid value"),
    "a scale of nothing": (lambda f: lay(f, header(floors={"proc.cpu_user": 0.0})), RunError, "floors"),
    "no temperature": (lambda f: lay(f, header(temperature=0.0)), RunError, "invalid value"),
    "a name that leads elsewhere": (
        lambda f: lay(f, header(files={"../weights": FileEntry(bytes=1, sha256="0")})),
        RunError,
        "invalid file name",
    ),
    "a file that is gone": (lambda f: (f / "weights.bin").unlink(), RunError, "not found"),
    "a file that was cut": (lambda f: (f / "weights.bin").write_bytes(b"weigh"), MismatchError, "changed or cut"),
    "a file of other bytes": (lambda f: (f / "weights.bin").write_bytes(b"WEIGHTS"), MismatchError, "changed or cut"),
}


@pytest.mark.parametrize(("spoil", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_departs_is_refused_in_words(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], words: str
) -> None:
    write_checkpoint(tmp_path, header(), {"weights.bin": b"weights"})
    spoil(tmp_path)

    with pytest.raises(error, match=words):
        read_checkpoint(tmp_path)
