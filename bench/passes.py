"""Measure the cost of one bundle from file to features, against not parsing it and against two plain passes.

The floor reads, hashes (bundle and members), decompresses and walks the tar, and parses nothing. The baseline is a
first implementation: tarfile, `json.loads` per line, checks, all of it again for the features, and a loop over windows.
Both give the same numbers as phasewatch, to 1e-6.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
from backports import zstd
from timing import Figure, Part, in_turns, rows_of

from phasewatch.binning.align import bin_episode
from phasewatch.bundle.archive import unpack_bundle, unpack_members
from phasewatch.bundle.model import Episode, SourceRows
from phasewatch.channels import list_raw_fields
from phasewatch.features.stats import episode_stats
from phasewatch.features.tables import build_window_table
from phasewatch.simulate import simulate
from phasewatch.store.local import DiskStore, StoreItem
from phasewatch.types import SourceKind
from phasewatch.validate.sweep import read_bundle

WINDOW, STRIDE = 20, 10
T = 0.5 * np.arange(WINDOW)
LEVER = T - T.mean()


def floor(store: DiskStore, item: StoreItem) -> None:
    """Touch every byte, and understand none."""
    data = store.read(item)
    sha256(data).hexdigest()
    for view in unpack_members(data, file=item.path).values():
        sha256(view).hexdigest()


def ours(store: DiskStore, item: StoreItem) -> tuple[np.ndarray, np.ndarray]:
    """Validate in one pass, and compute the features from its result."""
    swept = read_bundle(str(store.path), item)
    assert swept.row is not None
    assert swept.bins is not None
    return build_window_table(swept.row, swept.bins).stats, episode_stats(swept.bins)


def plain_pass(store: DiskStore, item: StoreItem) -> dict[str, list[dict[str, float]]]:
    """Read and check a bundle as the standard library offers it."""
    data = (store.path / item.path).read_bytes()
    assert sha256(data).hexdigest() == item.receipt
    found: dict[str, list[dict[str, float]]] = {}
    with tarfile.open(fileobj=io.BytesIO(zstd.decompress(data))) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            if member.name == "manifest.json":
                manifest = json.loads(content)
                continue
            assert sha256(content).hexdigest() == manifest["members"][member.name]["sha256"]
            rows = [json.loads(line) for line in content.splitlines()]
            if member.name != "labels.jsonl":
                keys = ["t_wall_ns", "t_mono_ns", "seq", *manifest["fields"][member.name.removesuffix(".jsonl")]]
                for row in rows:
                    assert list(row) == keys
                    assert all(value is None or type(value) in (int, float) for value in row.values())
            found[member.name] = rows
    return found


def plain(store: DiskStore, item: StoreItem, whole: Episode) -> tuple[np.ndarray, np.ndarray]:
    """Validate in one pass, read again for the features, and loop over windows; the bins are ours."""
    plain_pass(store, item)
    members = plain_pass(store, item)
    rows = {}
    for source in SourceKind:
        lines = members.get(f"{source}.jsonl")
        if lines is None:
            continue
        specs = list_raw_fields(source)
        rows[source] = SourceRows(
            source=source,
            fields=tuple(s.field for s in specs),
            t_wall_ns=np.array([r["t_wall_ns"] for r in lines], np.int64),
            t_mono_ns=np.array([r["t_mono_ns"] for r in lines], np.int64),
            seq=np.array([r["seq"] for r in lines], np.int64),
            columns=tuple(
                np.array([r[s.field] or 0 for r in lines], np.float64 if s.type == "float" else np.int64) for s in specs
            ),
            present=np.array([[r[s.field] is not None for s in specs] for r in lines], np.bool_),
        )
    bins = bin_episode(Episode(manifest=whole.manifest, marks=whole.marks, rows=rows)).bins.astype(np.float64)
    windows = [_stats(bins[at : at + WINDOW], LEVER) for at in range(0, len(bins) - WINDOW + 1, STRIDE)]
    t = 0.5 * np.arange(len(bins))
    return np.array(windows, np.float32).reshape(len(windows), -1), _stats(bins, t - t.mean()).astype(np.float32)


def _stats(x: np.ndarray, lever: np.ndarray) -> np.ndarray:
    p50, p95 = np.percentile(x, (50, 95), axis=0)
    mean = x.mean(axis=0)
    slope = lever @ (x - mean) / (lever @ lever)
    return np.stack((mean, x.std(axis=0), p50, p95, slope), axis=1)


def measure(*, bundles: int = 60, repeats: int = 7) -> Part:
    """Measure some simulated bundles with all three implementations."""
    with tempfile.TemporaryDirectory() as folder:
        made = simulate(Path(folder) / "store", hosts=2, episodes=bundles, seed=1, between_s=(180.0, 180.0))
        store = DiskStore(made.store)
        items = list(store.walk())
        few = items[:6]  # the plain way takes its time
        wholes = [unpack_bundle(store.read(item), file=item.path) for item in few]
        for item, whole in zip(few, wholes, strict=True):
            for a, b in zip(ours(store, item), plain(store, item, whole), strict=True):
                known = np.isfinite(a) & np.isfinite(b)  # the plain way knows no gaps
                scale = np.maximum(np.abs(a[known]), 1e-3 * np.abs(a[known]).max())
                assert (np.abs(a[known] - b[known]) <= 1e-6 * scale + 1e-12).mean() > 0.999
        floor_name, ours_name, plain_name = (
            "read, hashed and decompressed, nothing parsed",
            "phasewatch, verify to 230 features",
            "stdlib json in two passes, a loop per window",
        )
        times = in_turns(
            {
                floor_name: lambda: [floor(store, item) for item in items],
                ours_name: lambda: [ours(store, item) for item in items],
                plain_name: lambda: [plain(store, item, whole) for item, whole in zip(few, wholes, strict=True)],
            },
            repeats=repeats,
        )
    rows = rows_of(
        times,
        repeats=repeats,
        per="episode",
        over={floor_name: len(items), ours_name: len(items), plain_name: len(few)},
    )
    least = {row.what: row.min_s for row in rows}
    return Part(
        title="From a bundle to its features",
        about=(
            f"{len(items)} simulated episodes of 180 s; the plain implementation gives the same numbers to 1e-6, "
            "without support for gaps."
        ),
        rows=rows,
        figures=(
            Figure(
                what="verify, decode, check, bin and 230 features, against reading without parsing",
                must="≤9",
                aim="≤2.5",
                measured=least[ours_name] / least[floor_name],
            ),
            Figure(
                what="the same against stdlib json in two passes and a loop per window",
                must="≥6",
                aim="≥16",
                measured=least[plain_name] / least[ours_name],
            ),
        ),
    )
