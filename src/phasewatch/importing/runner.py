"""Run an import: find the inputs, convert each in a worker, and keep the import log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path

import msgspec

from phasewatch import atomic
from phasewatch.channels import get_custom_channels_digest
from phasewatch.errors import DataError, IdConflictError, StoreError
from phasewatch.importing.builder import PackedEpisode
from phasewatch.importing.cis490 import import_episode
from phasewatch.importing.cis490_store import EpisodeInput, Neighbours, find_neighbours, list_inputs
from phasewatch.importing.labels import LabelMode, read_ranges
from phasewatch.importing.mapping import MapPlan, parse_map
from phasewatch.importing.problems import ImportCode, ImportOutcome, ImportRecord, ImportRefusal
from phasewatch.importing.readers import SourceFile, compute_file_digest, list_files
from phasewatch.importing.table import TableGroup, TableImport, group_files
from phasewatch.parallel.pool import map_ordered
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.store.local import DiskStore

__all__ = [
    "IMPORT_LOG_FILE",
    "ImportLayout",
    "ImportSettings",
    "ImportSummary",
    "list_source",
    "read_log",
    "run_import",
]

IMPORT_LOG_FILE = "import_v1.jsonl"
MAX_LOG_BYTES = 1 << 30
CHECKPOINT_INPUTS = 50  # inputs after which the log is written, so that a killed import does not read them again
_IMPORT_VERSION = "1"  # raised when equal inputs become other bundles
_ENCODER = msgspec.json.Encoder(order="deterministic")
_DECODER = msgspec.json.Decoder(ImportRecord)

ImportLayout = str  # "table" or "cis490"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSettings:
    """What is imported.

    Attributes:
        layout: ``table`` or ``cis490``.
        source: Folder or file.
        out: Folder of the store.
        map_text: Content of the map; for CIS490 the shipped one, or the user's.
        map_name: Name of the map in messages.
        mode: Which labels are kept.
        workers: Number of processes.
    """

    layout: ImportLayout
    source: Path
    out: Path
    map_text: bytes
    map_name: str
    mode: LabelMode = LabelMode.PROVEN
    workers: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSummary:
    """The result of an import.

    Attributes:
        records: The import log.
        inputs: Number of groups of files.
        kept: Inputs that were imported before and are unchanged.
        unmatched: Files that no pattern matches.
        log: Path of the log.
    """

    records: tuple[ImportRecord, ...]
    inputs: int
    kept: int
    unmatched: tuple[str, ...]
    log: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One input, with what the log says of it."""

    name: str
    files: tuple[SourceFile, ...]
    content: TableGroup | EpisodeInput
    neighbours: Neighbours
    known: tuple[ImportRecord, ...]


@dataclass(slots=True, kw_only=True)
class _JobResult:
    records: list[ImportRecord] = field(default_factory=list)
    is_kept: bool = False


@lru_cache(maxsize=2)
def _parse_map_cached(text: bytes, where: str) -> MapPlan:
    return parse_map(text, where=where)


def list_source(source: Path) -> tuple[list[SourceFile], list[ImportRefusal]]:
    """Return the files of a source, and what was refused of it.

    Raises:
        DataError: If there is no such file or folder.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; name the folder that holds the files to import")
    files: list[SourceFile] = []
    refused: list[ImportRefusal] = []
    for each in list_files(source):
        (refused if isinstance(each, ImportRefusal) else files).append(each)  # type: ignore[arg-type]
    return files, refused


def run_import(settings: ImportSettings, *, progress: Progress = NO_PROGRESS) -> ImportSummary:
    """Import a source into a store and write `import_v1.jsonl` there.

    Each bundle appears whole or not at all. An input that the log names with the same content, map and options is not
    read again if its bundles are there.

    Raises:
        DataError: If there is no source, or the map is malformed.
        BusyError: If another import writes into the store.
    """
    plan = parse_map(settings.map_text, where=settings.map_name)
    files, refused = list_source(settings.source)
    if plan.rules.labels is not None and plan.rules.labels.file:
        files = [f for f in files if f.relative != plan.rules.labels.file]
        _read_label_file(settings, plan)
    if not refused:
        _check_matches(settings, plan, files)
    atomic.make_folder(settings.out)
    with atomic.lock(settings.out):
        log = settings.out / IMPORT_LOG_FILE
        known: dict[str, list[ImportRecord]] = {}
        for record in read_log(log):
            known.setdefault(record.input, []).append(record)
        jobs, unmatched = _list_jobs(settings, plan, files, known)
        records = [_build_refusal(bad, bad.file, "") for bad in refused]
        # Inputs of earlier imports stay in the log, because their bundles stay in the store.
        names = {job.name for job in jobs} | {r.input for r in records}
        records = [r for name, kept in sorted(known.items()) if name not in names for r in kept] + records
        kept = 0
        results = map_ordered(partial(_run_job, settings), jobs, workers=settings.workers)
        for done, (job, result) in enumerate(zip(jobs, results, strict=True), 1):
            if result.value is None:
                words = result.error or "the worker was lost"
                records.append(_build_refusal(ImportRefusal(ImportCode.WORKER_LOST, words), job.name, ""))
            else:
                records += result.value.records
                kept += result.value.is_kept
            if done % CHECKPOINT_INPUTS == 0:
                _write_log(log, [*records, *(r for j in jobs[done:] for r in j.known)])
            progress.update("import", done, len(jobs), "")
        _write_log(log, records)
    return ImportSummary(
        records=tuple(records), inputs=len(jobs), kept=kept, unmatched=tuple(f.relative for f in unmatched), log=log
    )


def _check_matches(settings: ImportSettings, plan: MapPlan, files: Sequence[SourceFile]) -> None:
    """Raise if nothing of a source can be imported, before a store is made.

    Raises:
        DataError: If no file matches.
    """
    is_table = settings.layout == "table"
    found, unmatched = group_files(plan, files) if is_table else list_inputs(files)
    if not found:
        wanted = " or ".join(t.pattern.text for t in plan.tables) if is_table else "<host>/<ULID>/ or <ULID>.tar.zst"
        such = f", such as {unmatched[0].relative}," if unmatched else ""
        raise DataError(
            f"{settings.source}: none of its {len(files):,} files{such} matches {wanted}; "
            "name the folder that holds the recordings"
        )


def _read_label_file(settings: ImportSettings, plan: MapPlan) -> Path:
    labels = plan.rules.labels
    base = settings.source if settings.source.is_dir() else settings.source.parent
    path = base / (labels.file if labels is not None else "")
    if path.is_symlink():
        raise DataError(f"{path}: a symbolic link; copy the file of labels")
    read_ranges(path, tuple(sorted(labels.values.items())) if labels is not None else ())
    return path


def _list_jobs(
    settings: ImportSettings, plan: MapPlan, files: Sequence[SourceFile], known: Mapping[str, Sequence[ImportRecord]]
) -> tuple[list[_Job], list[SourceFile]]:
    if settings.layout == "cis490":
        inputs, unmatched = list_inputs(files)
        neighbours = find_neighbours(inputs)
        jobs = [
            _Job(
                name=each.name,
                files=each.files,
                content=each,
                neighbours=neighbours.get(each.name, Neighbours()),
                known=tuple(known.get(each.name, ())),
            )
            for each in inputs
        ]
        return jobs, unmatched
    groups, unmatched = group_files(plan, files)
    return [
        _Job(
            name=group.name,
            files=tuple(file for _, file in group.files),
            content=group,
            neighbours=Neighbours(),
            known=tuple(known.get(group.name, ())),
        )
        for group in groups
    ], unmatched


def _run_job(settings: ImportSettings, job: _Job) -> _JobResult:
    """Import one input; runs in a worker process."""
    plan = _parse_map_cached(settings.map_text, settings.map_name)
    store = DiskStore(settings.out)
    try:
        digest = _compute_input_digest(settings, plan, job)
    except ImportRefusal as bad:
        return _JobResult(records=[_build_refusal(bad, job.name, "")])
    if job.known and all(r.input_sha256 == digest and _is_stored(store, r) for r in job.known):
        return _JobResult(records=list(job.known), is_kept=True)
    result = _JobResult()

    def emit(key: str, packed: PackedEpisode) -> None:
        try:
            store.put(packed.host_id, packed.episode_id, packed.data)
        except IdConflictError:
            words = f"{packed.host_id}/{packed.episode_id} holds other bytes; import into a new store"
            raise ImportRefusal(ImportCode.ID_CONFLICT, words) from None
        except StoreError as exc:
            raise ImportRefusal(ImportCode.BUNDLE, str(exc)) from None
        result.records.append(
            ImportRecord(
                outcome=ImportOutcome.IMPORTED,
                input=job.name,
                input_sha256=digest,
                host_id=packed.host_id,
                episode_id=packed.episode_id,
                key=key,
                bytes=len(packed.data),
                duration_s=packed.duration_s,
                labels=packed.labels,
            )
        )

    def refuse(key: str, bad: ImportRefusal) -> None:
        result.records.append(_build_refusal(bad, job.name, digest, key=key))

    skipped = _import_content(settings, plan, job, emit, refuse)
    if not result.records:
        refuse("", ImportRefusal(ImportCode.NO_ROWS, "the files hold no row"))
    if skipped:
        result.records[0] = msgspec.structs.replace(result.records[0], skipped_lines=skipped)
    return result


def _import_content(
    settings: ImportSettings,
    plan: MapPlan,
    job: _Job,
    emit: Callable[[str, PackedEpisode], None],
    refuse: Callable[[str, ImportRefusal], None],
) -> int:
    """Import one input and return the number of lines that were left out."""
    try:
        if isinstance(job.content, EpisodeInput):
            packed = import_episode(job.content, plan, mode=settings.mode, neighbours=job.neighbours)
            emit(job.content.ulid, packed)
            return 0
        table = TableImport(plan, settings.source, job.content, mode=settings.mode, emit=emit, refuse=refuse)
        try:
            table.run()
        finally:
            skipped = len(table.skipped)
    except ImportRefusal as bad:
        refuse(job.content.ulid if isinstance(job.content, EpisodeInput) else "", bad)
        return 0
    return skipped


def _is_stored(store: DiskStore, record: ImportRecord) -> bool:
    return record.outcome is ImportOutcome.REFUSED or store.find(record.host_id, record.episode_id) is not None


def _compute_input_digest(settings: ImportSettings, plan: MapPlan, job: _Job) -> str:
    digest = sha256(
        "\0".join(
            (_IMPORT_VERSION, settings.layout, plan.digest, settings.mode, get_custom_channels_digest(), job.name)
        ).encode("utf-8", "backslashreplace")
    )
    digest.update(_ENCODER.encode([job.neighbours.session, job.neighbours.ids]))
    for file in job.files:
        digest.update(file.relative.encode() + b"\0" + compute_file_digest(file))
    if plan.rules.labels is not None and plan.rules.labels.file:
        path = _read_label_file(settings, plan)
        digest.update(compute_file_digest(SourceFile(relative=path.name, path=path)))
    return digest.hexdigest()


def _build_refusal(bad: ImportRefusal, name: str, digest: str, *, key: str = "") -> ImportRecord:
    return ImportRecord(
        outcome=ImportOutcome.REFUSED,
        input=name,
        input_sha256=digest,
        key=key,
        code=bad.code,
        words=bad.words,
        file=bad.file,
        line=bad.line,
    )


def read_log(path: Path) -> Iterator[ImportRecord]:
    """Yield the lines of an import log; none without a file.

    Raises:
        DataError: If it is malformed.
    """
    if not path.exists():
        return
    text = atomic.read_regular(path, MAX_LOG_BYTES)
    if len(text) > MAX_LOG_BYTES:
        raise DataError(f"{path}: larger than {MAX_LOG_BYTES:,} bytes; import into a new store")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield _DECODER.decode(line)
        except msgspec.DecodeError as exc:
            raise DataError(f"{path}:{number}: {exc}; remove the log, and every input is read again") from None


def _write_log(path: Path, records: Iterable[ImportRecord]) -> None:
    atomic.write_atomic(path, b"".join(_ENCODER.encode(r) + b"\n" for r in records))
