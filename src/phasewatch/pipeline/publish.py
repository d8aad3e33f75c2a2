"""Publication: copy a finished run to a folder or an object store, ``run.json`` last.

A reader that finds ``run.json`` therefore has the whole run.
"""

from __future__ import annotations

import json
from pathlib import Path

from phasewatch.atomic import make_folder, open_atomic, remove, write_atomic
from phasewatch.errors import RunError
from phasewatch.store.base import open_store
from phasewatch.store.s3 import ObjectStore

__all__ = ["publish_run"]

_LAST_FILE = "run.json"
_PRIVATE_KEYS = frozenset({"run", "ray_address", "address"})  # `address`: of runs before 0.3


def publish_run(run: Path, uri: str) -> int:
    """Copy the files of a run, without hidden ones, and return their number.

    The copy of ``run.json`` names no folder, cluster or host of this machine (see `_redact_run_log`).

    Args:
        run: The run's folder.
        uri: A folder, ``file:///folder`` or ``s3://bucket/prefix``; files of the same names are replaced.

    Raises:
        RunError: If the run is not finished.
        StoreError: If nothing can be written there.
    """
    if not (run / _LAST_FILE).is_file():
        raise RunError(f"{run}: the run is not finished; finish it with `phasewatch run STORE --out {run}`")
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(run))]
    ordered = [*(path for path in files if path != run / _LAST_FILE), run / _LAST_FILE]
    store, folder = open_store(uri), Path(uri.removeprefix("file://"))
    if isinstance(store, ObjectStore):  # that of an older run goes first: it must not stand for a mixture of two
        store.remove_key(_LAST_FILE)
    else:
        remove(folder / _LAST_FILE)
    for path in ordered[:-1]:
        name = path.relative_to(run).as_posix()
        if isinstance(store, ObjectStore):
            store.put_file(name, path)
        else:
            _copy_file(path, folder / name)
    last = _redact_run_log((run / _LAST_FILE).read_bytes())
    if isinstance(store, ObjectStore):
        store.put_key(_LAST_FILE, last)
    else:
        make_folder(folder)
        write_atomic(folder / _LAST_FILE, last)
    return len(ordered)


def _redact_run_log(data: bytes) -> bytes:
    """Return ``run.json`` without what is private to this machine: host name, local paths, address of a Ray cluster.

    A store at ``s3://`` stays: the bundles of the published run are there. A file that is not a JSON object becomes an
    empty one.
    """
    try:
        log = json.loads(data)
    except ValueError:
        log = {}
    if not isinstance(log, dict):
        log = {}
    if isinstance(host := log.get("host"), dict):
        log["host"] = {key: value for key, value in host.items() if key != "name"}
    if isinstance(asked := log.get("configuration"), dict):
        private = {key for key, value in asked.items() if key in _PRIVATE_KEYS or _is_local_store(key, value)}
        log["configuration"] = {key: value for key, value in asked.items() if key not in private}
    return (json.dumps(log, indent=1, sort_keys=True) + "\n").encode()


def _is_local_store(key: str, value: object) -> bool:
    return key == "store" and not str(value).startswith("s3://")


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _copy_file(source: Path, target: Path) -> None:
    make_folder(target.parent)
    with source.open("rb") as file, open_atomic(target) as out:
        while piece := file.read(1 << 20):
            out.write(piece)
