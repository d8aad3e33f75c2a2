"""Write labelled bundles into a store of their own, list their labels, and remove them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import msgspec

from phasewatch import atomic
from phasewatch.bundle.archive import encode_labels, pack_bundle, unpack_bundle, unpack_manifest, unpack_members
from phasewatch.bundle.container import LABELS_FILE, MANIFEST_FILE
from phasewatch.bundle.labels import list_phase_starts
from phasewatch.bundle.limits import MAX_LABEL_ROWS
from phasewatch.bundle.model import BUNDLE_FORMAT, Episode, LabellingMetadata, LabelMark, Manifest, OperatorLabel
from phasewatch.errors import DataError, StoreError, UsageError
from phasewatch.labelling.requests import EDGE_TOLERANCE_NS, LabelRequest, resolve_label_time
from phasewatch.parallel.pool import map_ordered
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.store.base import BundleStore, StoreLocation, open_store
from phasewatch.store.local import BUNDLE_SUFFIX, DiskStore, StoreItem
from phasewatch.types import BENIGN_PROFILE, UNKNOWN_PROFILE, EpisodeId, EpisodeRole, Phase, SampleKind, build_uuid7

__all__ = [
    "BundleSelection",
    "LabelPlan",
    "LabelSettings",
    "LabelSummary",
    "LabelledBundle",
    "list_labelled",
    "plan_labels",
    "undo_labels",
    "write_labels",
]

_MIN_LABEL_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSelection:
    """The bundles of a store that a command is about; empty names select all.

    Attributes:
        bundles: Episode ids, ``<host_id>/<episode_id>``, or paths of bundles.
        hosts: Host ids.
    """

    bundles: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def matches(self, host_id: str, *episode_ids: str) -> bool:
        """Whether a bundle with these ids is selected."""
        keys = {_split_name(name) for name in self.bundles}
        is_named = any(key in keys for episode_id in episode_ids for key in ((host_id, episode_id), ("", episode_id)))
        return (is_named or not self.bundles) and (host_id in self.hosts or not self.hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSettings:
    """What is labelled, and as what.

    Attributes:
        source: Store with the bundles.
        out: Folder of the store for the labelled bundles; another one.
        requests: The labels.
        selection: Bundles for labels that name none.
        profile: Profile of bundles with a malicious phase; bundles that are clean alone are `benign`.
        role: Role of the labelled bundles.
        workers: Number of processes.
    """

    source: StoreLocation
    out: Path
    requests: tuple[LabelRequest, ...]
    selection: BundleSelection = BundleSelection()
    profile: str = UNKNOWN_PROFILE
    role: EpisodeRole = EpisodeRole.LAB
    workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelPlan:
    """The labels of one bundle, checked.

    Attributes:
        item: The bundle in its store.
        host_id: Its host.
        episode_id: Episode id of the labelled bundle.
        duration_s: Length of the recording.
        labelling: What the manifest of the labelled bundle says.
        is_written: Whether the labelled bundle is in its store already, with the same labels.
    """

    item: StoreItem
    host_id: str
    episode_id: EpisodeId
    duration_s: float
    labelling: LabellingMetadata
    is_written: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledBundle:
    """A labelled bundle of a store: its path and its manifest."""

    path: str
    manifest: Manifest
    labelling: LabellingMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSummary:
    """The result of labelling.

    Attributes:
        plans: The labelled bundles, in the order of the source.
        paths: Paths of the bundles that were written.
        kept: Number of bundles that were labelled so before.
    """

    plans: tuple[LabelPlan, ...]
    paths: tuple[str, ...]
    kept: int


def _split_name(name: str) -> tuple[str, str]:
    """Return host id (empty if not named) and episode id of a bundle's name or path."""
    *folders, last = name.removesuffix(BUNDLE_SUFFIX).split("/")
    return (folders[-1] if folders else ""), last


def plan_labels(settings: LabelSettings) -> tuple[LabelPlan, ...]:
    """Find the bundles of the labels and check everything that can be checked; nothing is written.

    Raises:
        UsageError: If the two stores are the same folder.
        DataError: If a label names no bundle, lies outside its recording or overlaps another, or a bundle has labels.
    """
    if not isinstance(settings.source, str) and settings.source.resolve() == settings.out.resolve():
        raise UsageError(f"--out {settings.out}: the originals stay as they are; name another folder")
    store = open_store(settings.source)
    found = _select_items(store, settings)
    plans = [plan for item, requests in found if (plan := _plan_bundle(store, item, requests, settings)) is not None]
    if not plans:
        first = settings.requests[0]
        raise DataError(f"{first.where}: no bundle of {settings.source} lies in this time; see --dry-run without times")
    return tuple(plans)


def _select_items(store: BundleStore, settings: LabelSettings) -> list[tuple[StoreItem, list[LabelRequest]]]:
    """Return the bundles of the labels, each with its labels, in the order of the store."""
    by_key: dict[tuple[str, str], list[LabelRequest]] = {}
    for request in settings.requests:
        by_key.setdefault(_split_name(request.bundle) if request.bundle else ("", ""), []).append(request)
    common = by_key.pop(("", ""), [])
    selection, matched = settings.selection, set[tuple[str, str]]()
    found: list[tuple[StoreItem, list[LabelRequest]]] = []
    for item in store.walk():
        if item.host_id is None or item.episode_id is None or item.is_missing:
            continue
        keys = ((item.host_id, item.episode_id), ("", item.episode_id))
        requests = [request for key in keys for request in by_key.get(key, ())]
        matched.update(keys)
        if common and selection.matches(item.host_id, item.episode_id):
            requests += common
        if requests:
            found.append((item, requests))
    for key, requests in by_key.items():
        if key not in matched:
            words = f"bundle: {requests[0].bundle[:120]!r} is not in {settings.source}"
            raise DataError(f"{requests[0].where}: {words}; name an episode id, or <host_id>/<episode_id>")
    for name in selection.bundles:
        if _split_name(name) not in matched:
            raise DataError(f"{name}: there is no such bundle in {settings.source}")
    if not found:
        hosts = f" of {', '.join(selection.hosts)}" if selection.hosts else ""
        raise StoreError(f"{settings.source}: there is no bundle{hosts}; name the folder of `watch --save`")
    return found


def _plan_bundle(
    store: BundleStore, item: StoreItem, requests: Sequence[LabelRequest], settings: LabelSettings
) -> LabelPlan | None:
    """Return the checked labels of one bundle; None if a range of many bundles does not touch it."""
    data = store.read(item)
    episode = unpack_bundle(data, file=item.path)
    _check_ancestor(episode, item)
    is_one = len(settings.selection.bundles) == 1
    placed = [
        (label, request)
        for request in requests
        if (label := _place_label(request, episode, item, clips=not request.bundle and not is_one)) is not None
    ]
    if not placed:
        return None
    placed.sort(key=lambda pair: (pair[0].start_wall_ns, pair[0].end_wall_ns))
    for (before, first), (after, second) in pairwise(placed):
        if after.start_wall_ns < before.end_wall_ns:
            words = f"overlaps the label {before.phase} of {first.where} in {item.path}; labels may not overlap"
            raise DataError(f"{second.where}: start: the label {after.phase} {words}")
    digest = sha256(data).hexdigest()
    labelling = LabellingMetadata(
        ancestor_id=episode.manifest.episode_id, ancestor_sha256=digest, labels=tuple(label for label, _ in placed)
    )
    starts = list_phase_starts(labelling.labels, episode.t0_ns, episode.t_end_ns)
    if len(starts) >= MAX_LABEL_ROWS:
        words = f"{item.path} would have {len(starts)} phases; a bundle holds {MAX_LABEL_ROWS - 1}"
        raise DataError(f"{placed[-1][1].where}: {words}; join neighbouring labels")
    plan = LabelPlan(
        item=item,
        host_id=episode.manifest.host.host_id,
        episode_id=_build_labelled_id(episode.manifest.episode_id, digest),
        duration_s=episode.manifest.duration_s,
        labelling=labelling,
    )
    return _find_written(plan, settings)


def _check_ancestor(episode: Episode, item: StoreItem) -> None:
    manifest = episode.manifest
    if (manifest.host.host_id, manifest.episode_id) != (item.host_id, item.episode_id):
        raise DataError(f"{item.path}: the manifest names {manifest.host.host_id}/{manifest.episode_id}")
    if manifest.labelling is not None:
        raise DataError(f"{item.path}: it is a labelled bundle; label its original {manifest.labelling.ancestor_id}")
    known = sorted({str(mark.phase) for mark in episode.marks if mark.phase not in (None, Phase.UNKNOWN)})
    if known:
        raise DataError(
            f"{item.path}: the recording has labels of its own ({', '.join(known)}); only recordings of unknown phase, "
            "such as those of `watch --save`, can be labelled; leave it out with --bundle or --host"
        )


def _place_label(request: LabelRequest, episode: Episode, item: StoreItem, *, clips: bool) -> OperatorLabel | None:
    """Return a label with its times in a bundle.

    Args:
        request: The label.
        episode: The bundle.
        item: Its place in the store.
        clips: Whether the range may reach beyond the bundle, because it is about many.

    Returns:
        None if less than a second of the range is in the bundle, and `clips`.

    Raises:
        DataError: If the range is empty, or outside the recording.
    """
    t0_ns, t_end_ns = episode.t0_ns, episode.t_end_ns
    start_ns = t0_ns if request.start is None else resolve_label_time(request.start, t0_ns)
    end_ns = t_end_ns if request.end is None else resolve_label_time(request.end, t0_ns)
    for key, at_ns in (("start", start_ns), ("end", end_ns)):
        if not clips and not t0_ns - EDGE_TOLERANCE_NS <= at_ns <= t_end_ns + EDGE_TOLERANCE_NS:
            words = f"{(at_ns - t0_ns) / 1e9:.3f} s after the start of {item.path} is outside the recording"
            raise DataError(f"{request.where}: {key}: {words}, which has {episode.manifest.duration_s:.3f} s")
    if request.start is not None and request.end is not None and end_ns <= start_ns:
        raise DataError(f"{request.where}: end: it is not after the start")
    start_ns, end_ns = max(start_ns, t0_ns), min(end_ns, t_end_ns)
    if end_ns - start_ns < _MIN_LABEL_NS:
        if clips:
            return None
        raise DataError(f"{request.where}: end: a label lasts at least 1 s; this one {(end_ns - start_ns) / 1e9:.3f} s")
    return OperatorLabel(
        start_wall_ns=start_ns,
        end_wall_ns=end_ns,
        phase=request.phase,
        by=request.by,
        when_wall_ns=request.when_ns,
        why=request.why,
    )


def _build_labelled_id(ancestor_id: str, ancestor_sha256: str) -> EpisodeId:
    """Return the id of the labelled bundle: the ancestor's time, and a digest of its content.

    It does not depend on the labels, so that a store holds one labelled bundle of each original.
    """
    unix_ms = int(ancestor_id.replace("-", "")[:12], 16)
    return build_uuid7(unix_ms, sha256(f"labelled {ancestor_sha256}".encode()).digest())


def _find_written(plan: LabelPlan, settings: LabelSettings) -> LabelPlan:
    """Return the plan with what an earlier run wrote; the time of labelling is that of the earlier run.

    Raises:
        DataError: If the bundle is there with other labels.
    """
    store = DiskStore(settings.out)
    item = store.find(plan.host_id, plan.episode_id)
    if item is None or item.is_missing:
        return plan
    manifest = unpack_manifest(store.read(item), file=f"{settings.out}/{item.path}")
    before = manifest.labelling
    is_same = (
        before is not None
        and _strip_times(before) == _strip_times(plan.labelling)
        and (manifest.role, manifest.profile) == (settings.role, _choose_profile(plan.labelling, settings.profile))
    )
    if before is None or not is_same:
        ancestor = plan.labelling.ancestor_id
        raise DataError(
            f"{settings.out}/{item.path}: {ancestor} is labelled already, and differently; remove that with "
            f"`phasewatch label {settings.out} --undo --bundle {ancestor}`, then give all its labels at once"
        )
    # Without its receipt the same bytes are stored again, which completes it.
    return replace(plan, labelling=before, is_written=item.receipt is not None)


def _strip_times(labelling: LabellingMetadata) -> LabellingMetadata:
    labels = tuple(msgspec.structs.replace(label, when_wall_ns=0) for label in labelling.labels)
    return msgspec.structs.replace(labelling, labels=labels)


def _choose_profile(labelling: LabellingMetadata, profile: str) -> str:
    """Return the profile of a labelled bundle: benign if nothing but clean time is known of it."""
    return BENIGN_PROFILE if all(label.phase is Phase.CLEAN for label in labelling.labels) else profile


def write_labels(
    settings: LabelSettings, plans: Sequence[LabelPlan], *, progress: Progress = NO_PROGRESS
) -> LabelSummary:
    """Write the labelled bundles; each appears whole or not at all, and the originals are only read.

    Raises:
        BusyError: If another process labels into the store.
        DataError: If an original changed meanwhile.
        MachineError: If a worker was lost.
    """
    atomic.make_folder(settings.out)
    with atomic.lock(settings.out):
        wanted = [plan for plan in plans if not plan.is_written]
        paths: list[str] = []
        results = map_ordered(partial(_write_bundle, settings), wanted, workers=settings.workers)
        for done, (plan, result) in enumerate(zip(wanted, results, strict=True), 1):
            paths.append(result.unwrap(plan.item.path))
            progress.update("label", done, len(wanted), plan.item.path)
    return LabelSummary(plans=tuple(plans), paths=tuple(paths), kept=len(plans) - len(wanted))


def _write_bundle(settings: LabelSettings, plan: LabelPlan) -> str:
    """Write one labelled bundle and return its path; runs in a worker process."""
    data = open_store(settings.source).read(plan.item)
    if sha256(data).hexdigest() != plan.labelling.ancestor_sha256:
        raise DataError(f"{plan.item.path}: it changed while the command ran; run it again")
    episode = unpack_bundle(data, file=plan.item.path)
    members = {
        name: bytes(content)
        for name, content in unpack_members(data, file=plan.item.path).items()
        if name != MANIFEST_FILE
    }
    members[LABELS_FILE] = encode_labels(_build_marks(episode, plan.labelling))
    profile = _choose_profile(plan.labelling, settings.profile)
    manifest = msgspec.structs.replace(
        episode.manifest,
        format=BUNDLE_FORMAT,
        episode_id=plan.episode_id,
        profile=profile,
        sample_kind=SampleKind.BENIGN if profile == BENIGN_PROFILE else SampleKind.LIVE,
        role=settings.role,
        labelling=plan.labelling,
    )
    path = DiskStore(settings.out).put(plan.host_id, plan.episode_id, pack_bundle(manifest, members))
    return str(path)


def _build_marks(episode: Episode, labelling: LabellingMetadata) -> tuple[LabelMark, ...]:
    """Return the marks of a labelled bundle; between the original's first and last mark the clocks run evenly."""
    first, last = episode.marks[0], episode.marks[-1]
    wall_ns, mono_ns = last.t_wall_ns - first.t_wall_ns, last.t_mono_ns - first.t_mono_ns
    starts = list_phase_starts(labelling.labels, first.t_wall_ns, last.t_wall_ns)
    marks = [
        LabelMark(
            t_wall_ns=at_ns,
            t_mono_ns=first.t_mono_ns + (at_ns - first.t_wall_ns) * mono_ns // wall_ns,
            phase=phase,
        )
        for at_ns, phase in starts
    ]
    return (*marks, last)


def list_labelled(place: StoreLocation, selection: BundleSelection = BundleSelection()) -> Iterator[LabelledBundle]:
    """Yield the labelled bundles of a store, in its order; an id of the original selects, too.

    Raises:
        StoreError: If there is no such folder.
        BundleError: If a bundle cannot be read.
    """
    store = open_store(place)
    for item in store.walk():
        if item.host_id is None or item.episode_id is None or item.is_missing:
            continue
        manifest = unpack_manifest(store.read(item), file=item.path)
        labelling = manifest.labelling
        if labelling is not None and selection.matches(item.host_id, item.episode_id, labelling.ancestor_id):
            yield LabelledBundle(path=item.path, manifest=manifest, labelling=labelling)


def undo_labels(
    place: StoreLocation, selection: BundleSelection, *, is_dry: bool = False
) -> tuple[LabelledBundle, ...]:
    """Remove labelled bundles from their store; no other bundle is ever removed.

    Args:
        place: The store of the labelled bundles.
        selection: Which ones, by their own id or that of the original.
        is_dry: Only return what would be removed.

    Raises:
        UsageError: If the store is not a folder.
        DataError: If none is selected.
    """
    store = open_store(place)
    if not isinstance(store, DiskStore):
        raise UsageError(f"{place}: --undo removes from folders only; remove the objects with the bucket's tools")
    found = tuple(list_labelled(place, selection))
    if not found:
        names = ", ".join((*selection.bundles, *selection.hosts))
        raise DataError(f"{place}: {names} selects no labelled bundle; originals are never removed (see --list)")
    if not is_dry:
        with atomic.lock(store.path):
            for bundle in found:
                store.remove(bundle.manifest.host.host_id, bundle.manifest.episode_id)
    return found
