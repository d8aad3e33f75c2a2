"""An episode of a run as the events that a watcher would have sent: its bins, and what a model said of its windows.

The probabilities are those of the fold that never saw the episode, read from the run; nothing is predicted anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.dataset.run import need_columns, open_parquet
from phasewatch.errors import RunError
from phasewatch.grid.files import GridRow, open_grids, rows_by_id
from phasewatch.live.events import Data, PhaseSeen, Telemetry
from phasewatch.models.alarm import DECISION_NS, NEVER, AlarmRule, heat_of, run_alarm
from phasewatch.models.checkpoint import HEADER, read_header
from phasewatch.models.filter import NONE, PHASE
from phasewatch.parquet import parquet_errors
from phasewatch.report.evidence import PLACE
from phasewatch.train.cell import Cell
from phasewatch.train.predictions import PREDICTIONS, PROBABILITIES
from phasewatch.vocab import BIN_NS, PHASES, WINDOW_BINS, Phase

_KEYS = ("recipe", "threat", "model", "table", "filter")
_COLUMNS = (*_KEYS, "fold", "seed", "part", "episode_id", "host_id", "t_center_ns", "y_true", "y_pred", *PROBABILITIES)
_DIGITS = 5  # of a value on its way to a picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Whose predictions are replayed; the lowest seed, and the phase filter where the run has it."""

    recipe: str = PLACE.recipe
    threat: str = PLACE.threat
    model: str = PLACE.model
    table: str = PLACE.table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """What a model said of the ``w`` windows of one episode, in time's order.

    Attributes:
        t_center_ns: ``(w,)`` int64.
        p: ``(w, 5)`` float64 in the order of PHASES.
        y_pred, y_true: ``(w,)`` int64, −1 = unknown.
        alarm: ``(w,)`` whether it rings; None where no threshold was trained.
        caveat: What a reader must know of all of it.
    """

    choice: Choice
    fold: str
    seed: int
    filter: str
    t_center_ns: NDArray[np.int64]
    p: NDArray[np.float64]
    y_pred: NDArray[np.int64]
    y_true: NDArray[np.int64]
    alarm: NDArray[np.bool_] | None = None
    threshold: float | None = None
    caveat: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recording:
    """One episode, ready to be played: ``(n, 46)`` bins in the order of CHANNELS, and what was said of them."""

    row: GridRow
    bins: NDArray[np.float32]
    judged: Judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Something to send, `at_s` after the episode's first label."""

    at_s: float
    data: Data

    @property
    def is_window(self) -> bool:
        """Whether it is a judgement, not telemetry."""
        return isinstance(self.data, PhaseSeen)


def list_episodes(run: Path, choice: Choice = Choice()) -> tuple[tuple[str, str], ...]:
    """Give the (host, episode) that the run has test predictions of, in order.

    Raises:
        RunError: If there are none, or the run has no predictions.
    """
    table = _read(run, choice)
    found = sorted(set(zip(table.column("host_id").to_pylist(), table.column("episode_id").to_pylist(), strict=True)))
    return tuple(found)


def read_recordings(run: Path, episodes: Sequence[str], choice: Choice = Choice()) -> tuple[Recording, ...]:
    """Read some episodes of a run, in the order asked for.

    Raises:
        RunError: If the run lacks one of them (names those it has), its grids or its predictions.
    """
    table = _read(run, choice)
    grids = open_grids(run / "grids")
    rows = rows_by_id(grids)
    ids = np.asarray(table.column("episode_id").to_pylist())
    found = []
    for episode in episodes:
        own = np.flatnonzero(ids == episode)
        if not len(own) or episode not in rows:
            some = ", ".join(sorted(set(ids.tolist()))[:3])
            raise RunError(f"{run}: no test predictions of episode {episode} by {_words(choice)}; there are {some} …")
        row = rows[episode]
        found.append(Recording(row=row, bins=grids.bins_of(row), judged=_judged(table.take(own), choice)))
    return tuple(found)


def cell_of(recording: Recording, run: Path) -> Path:
    """Give the folder of the very model that judged a recording."""
    said = recording.judged
    cell = Cell(
        recipe=said.choice.recipe, fold=said.fold, threat=said.choice.threat, model=said.choice.model,
        table=said.choice.table, seed=said.seed,
    )  # fmt: skip
    return cell.folder(run)


def read_rule(recording: Recording, run: Path) -> AlarmRule | None:
    """Read the alarm's rule as it was fixed when the recording's model was trained; None where none was, or is kept.

    Raises:
        RunError, MismatchError: If the checkpoint is there and cannot be used.
    """
    folder = cell_of(recording, run)
    if not (folder / HEADER).is_file():
        return None
    return read_header(folder).alarm.get(recording.judged.filter)


def with_alarm(recording: Recording, rule: AlarmRule) -> Recording:
    """Add when the alarm rings."""
    said = recording.judged
    rings = run_alarm(rule, heat_of(said.p), np.zeros(len(said.p), np.int64))
    return replace(recording, judged=replace(said, alarm=rings, threshold=rule.theta))


def play(recording: Recording, *, vm: str, bins_per_event: int = 1) -> Iterator[Step]:
    """Give an episode's events in the order in which a watcher would have sent them.

    Args:
        recording: The episode.
        vm: The key under which it is shown.
        bins_per_event: Bins that go together.
    """
    steps = [*_telemetry(recording, vm, bins_per_event), *_phases(recording, vm)]
    # A bin is out before the window that it closes is judged.
    yield from sorted(steps, key=lambda step: (step.at_s, step.is_window))


def _telemetry(recording: Recording, vm: str, bins_per_event: int) -> Iterator[Step]:
    row, names = recording.row, tuple(c.full_name for c in CHANNELS)
    flags = row.bin_flags
    masked = tuple(names[i] for i in np.flatnonzero(~np.isfinite(recording.bins).any(axis=0)))
    for start in range(0, row.n_bins, bins_per_event):
        stop = min(start + bins_per_event, row.n_bins)
        yield Step(
            at_s=stop * BIN_NS / 1e9,
            data=Telemetry(
                vm=vm, host=row.host_id, origin=str(row.origin), t0_ns=row.t0_ns + start * BIN_NS, bin_s=BIN_NS / 1e9,
                channels=names, values=tuple(_values(line) for line in recording.bins[start:stop]),
                flags=tuple(int(f) for f in flags[start:stop]), masked=masked,
            ),
        )  # fmt: skip


def _phases(recording: Recording, vm: str) -> Iterator[Step]:
    row, said = recording.row, recording.judged
    half_ns = WINDOW_BINS * BIN_NS // 2
    since: int | None = None
    for i, center in enumerate(said.t_center_ns.tolist()):
        end_ns = center + half_ns
        stands = None if said.alarm is None else bool(said.alarm[i])
        since = (since or end_ns) if stands else None
        yield Step(
            at_s=(center + DECISION_NS - row.t0_ns) / 1e9,
            data=PhaseSeen(
                vm=vm, host=row.host_id, t_start_ns=center - half_ns, t_end_ns=end_ns, p=_shares(said.p[i]),
                decision=str(PHASES[said.y_pred[i]]),
                truth=str(PHASES[said.y_true[i]]) if said.y_true[i] >= 0 else str(Phase.UNKNOWN),
                alarm=stands, alarm_since_ns=since, threshold=said.threshold, model=said.choice.model,
                threat=said.choice.threat, table=said.choice.table, filter=said.filter, caveat=_caveat(said),
            ),
        )  # fmt: skip


def _caveat(said: Judged) -> str | None:
    words = [said.caveat] if said.caveat else []
    if said.threshold is not None and said.threshold >= NEVER:
        words.append("no threshold met the budget of false alarms: this alarm never rings")
    return "; ".join(words) or None


def _values(line: NDArray[np.float32]) -> tuple[float | None, ...]:
    """Five digits are finer than any picture, and the page stays quick."""
    return tuple(float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None for v in line.tolist())


def _shares(p: NDArray[np.float64]) -> tuple[float, float, float, float, float]:
    a, b, c, d, e = (min(1.0, max(0.0, round(v, _DIGITS))) for v in p.tolist())
    return a, b, c, d, e


def _judged(table: Any, choice: Choice) -> Judged:
    order = np.argsort(table.column("t_center_ns").to_numpy(), kind="stable")
    table = table.take(order)

    def numbers(name: str) -> NDArray[np.int64]:
        return np.asarray(table.column(name).to_numpy(), np.int64)

    return Judged(
        choice=choice,
        fold=table.column("fold")[0].as_py(),
        seed=table.column("seed")[0].as_py(),
        filter=table.column("filter")[0].as_py(),
        t_center_ns=numbers("t_center_ns"),
        p=np.stack([np.asarray(table.column(name).to_numpy(), np.float64) for name in PROBABILITIES], axis=1),
        y_pred=numbers("y_pred"),
        y_true=numbers("y_true"),
    )


def _read(run: Path, choice: Choice) -> Any:
    """Read the test rows of a choice: the lowest seed, the phase filter where there is one."""
    import pyarrow.parquet as pq

    path = run / PREDICTIONS
    with open_parquet(path, "train") as file:
        need_columns(path, file.schema_arrow.names, _COLUMNS, "train")
    wanted = [(key, "==", getattr(choice, key)) for key in _KEYS[:4]]
    with parquet_errors(path, hint="phasewatch train"):
        table = pq.read_table(path, columns=list(_COLUMNS), filters=[*wanted, ("part", "==", "test")])
    filters, seeds = np.asarray(table.column("filter").to_pylist()), table.column("seed").to_numpy()
    if not len(seeds):
        raise RunError(f"{path}: no test predictions by {_words(choice)}; choose another --model, --threat or --recipe")
    kind = PHASE if PHASE in filters else NONE
    keep = filters == kind
    return table.take(np.flatnonzero(keep & (seeds == seeds[keep].min())))


def _words(choice: Choice) -> str:
    return f"{choice.model} ({choice.recipe}, {choice.threat}, {choice.table})"
