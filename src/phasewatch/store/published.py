"""Copies a finished run to a folder or into an object store, its `run.json` last: who sees that sees the whole run."""

from __future__ import annotations

from pathlib import Path

from phasewatch.atomic import make_folder, remove, writer
from phasewatch.errors import RunError
from phasewatch.store.base import open_store
from phasewatch.store.objects import ObjectStore

LAST = "run.json"


def publish_run(run: Path, uri: str) -> int:
    """Copy all files of a run but its own notes (names that begin with a dot); give how many.

    Args:
        run: The run's folder.
        uri: A folder, ``file:///folder`` or ``s3://bucket/prefix``; what stands there under the same names is replaced.

    Raises:
        RunError: If the run is not finished.
        StoreError: If nothing can be put there.
    """
    if not (run / LAST).is_file():
        raise RunError(f"{run}: it is not finished; take it the whole way with `phasewatch run STORE --out {run}`")
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and not _is_note(path.relative_to(run))]
    ordered = [*(path for path in files if path != run / LAST), run / LAST]
    store, folder = open_store(uri), Path(uri.removeprefix("file://"))
    if isinstance(store, ObjectStore):  # first the last word of an older run: it must not vouch for a mixture
        store.remove_key(LAST)
    else:
        remove(folder / LAST)
    for path in ordered:
        name = path.relative_to(run).as_posix()
        if isinstance(store, ObjectStore):
            store.put_file(name, path)
        else:
            _copy(path, folder / name)
    return len(ordered)


def _is_note(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _copy(source: Path, target: Path) -> None:
    make_folder(target.parent)
    with source.open("rb") as file, writer(target) as out:
        while piece := file.read(1 << 20):
            out.write(piece)
