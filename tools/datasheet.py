"""Write the generated half of a corpus's datasheet and its index: `python -m tools.datasheet [CORPUS]`.

The counts come from the validator, the leakage figures from the audit, the cost of the agent from `tools/footprint.py`.
`--check` compares the digest of the bundles with that of the page.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from phasewatch.artifacts import VALIDATION_FILE
from phasewatch.audit.leakage import LeakageResult, probe_leakage, read_leakage_windows
from phasewatch.bundle.archive import unpack_manifest
from phasewatch.store.local import DiskStore
from phasewatch.validate.index import write_index
from phasewatch.validate.sweep import sweep
from phasewatch.validate.verdict import USABLE_STATUSES, BundleVerdict
from tools import datasheet_tables
from tools.datasheet_tables import AgentFootprint, EpisodeStart, build_footprint_path, compute_separations
from tools.recordings import read_episodes
from tools.results import table
from tools.standing_checks import check_counts, check_shortcuts, render_checks

CORPUS = Path(__file__).parents[1] / "corpus" / "lab-v1"


def compute_corpus_digest(corpus: Path) -> str:
    """Return the digest of the bundles in a corpus."""
    return datasheet_tables.compute_bundles_digest((item.path, item.receipt or "") for item in DiskStore(corpus).walk())


def read_footprint(corpus: Path) -> AgentFootprint | None:
    """Read the cost of the agent; None if it was not measured."""
    path = build_footprint_path(corpus)
    return msgspec.json.decode(path.read_bytes(), type=AgentFootprint) if path.is_file() else None


def read_starts(corpus: Path, verdicts: Sequence[BundleVerdict]) -> list[EpisodeStart]:
    """Read the start of each usable episode from its manifest."""
    found = []
    for verdict in verdicts:
        if verdict.status in USABLE_STATUSES:
            manifest = unpack_manifest((corpus / verdict.path).read_bytes(), file=verdict.path)
            recording = manifest.recording
            throttled_s = recording.throttled_s if recording else None
            found.append(
                EpisodeStart(
                    host_id=verdict.host_id,
                    started_s=verdict.started_wall_ns / 1e9,
                    recorder=manifest.host.recorder,
                    boot_s=recording.boot_s if recording else None,
                    shape=recording.shape if recording else None,
                    throttled_share=None if throttled_s is None else throttled_s / manifest.duration_s,
                )
            )
    return found


def render_standing_checks(
    corpus: Path, run: Path, verdicts: Sequence[BundleVerdict], leaks: Sequence[LeakageResult]
) -> str:
    """Render the standing checks of a corpus whose hosts were drawn; empty for lab-v1, which was recorded before them.

    Args:
        run: The folder into which the corpus was validated.
    """
    episodes = read_episodes(corpus, run, verdicts)
    if not any(e.manifest.recording is not None and e.manifest.recording.shape is not None for e in episodes):
        return ""
    return render_checks(check_counts(verdicts, episodes), check_shortcuts(episodes, leaks), table)


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with `--check` return 1 if it is of other bundles."""
    named = [a for a in arguments if not a.startswith("-")]
    corpus = Path(named[0]) if named else CORPUS
    page = corpus / "README.md"
    text, digest = page.read_text(encoding="utf-8"), compute_corpus_digest(corpus)
    if "--check" in arguments:
        if datasheet_tables.parse_bundles_digest(text) == digest:
            return 0
        print(f"{page} does not describe these bundles; run `make datasheet`", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="phasewatch-datasheet-") as folder:
        run = Path(folder)
        verdicts = sweep(corpus, run, workers=2).verdicts
        windows = read_leakage_windows(run)
        leaks = probe_leakage(windows)
        checks = render_standing_checks(corpus, run, verdicts, leaks)
    body = datasheet_tables.render_datasheet(
        verdicts,
        leaks,
        compute_separations(windows),
        read_footprint(corpus),
        digest=digest,
        starts=read_starts(corpus, verdicts),
        checks=checks,
    )
    write_index(corpus / VALIDATION_FILE, verdicts)
    page.write_text(datasheet_tables.render_page(text, body), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
