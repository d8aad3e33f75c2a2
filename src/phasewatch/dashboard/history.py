"""Hold the last hour of each machine at three resolutions, in bounded memory (pure).

A page shows the telemetry of one machine at a time. So telemetry is not streamed to the pages: it is kept here, and a
page asks for the machine and the time span that it shows.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.events.schema import EventEnvelope, PhaseEvent, TelemetryEvent
from phasewatch.types import PHASES

__all__ = ["LIVE_RUN", "MAX_MACHINES", "SPANS", "HistorySpan", "MachineHistory", "MachineKey", "build_machine_key"]

MAX_MACHINES = 1024
LIVE_RUN = "live"  # `run` of the events of a watcher
_MAX_JUMP_NS = 3_600_000_000_000  # a longer jump of the clock is a new recording
_MAX_SILENCE_NS = 3_600_000_000_000  # a machine that sent nothing for this long is forgotten
_PRUNE_INTERVAL_NS = 60_000_000_000
_SIGNIFICANT_DIGITS = 4  # of the values that a page gets
_N_PHASES = len(PHASES)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistorySpan:
    """One time span that a page can show.

    Attributes:
        span_s: Its length, seconds.
        cell_ns: Resolution of the telemetry: a cell holds the mean of its bins.
        window_cell_ns: Resolution of the predictions: a cell holds the mean of their probabilities.
    """

    span_s: int
    cell_ns: int
    window_cell_ns: int


SPANS = (
    HistorySpan(span_s=60, cell_ns=500_000_000, window_cell_ns=500_000_000),
    HistorySpan(span_s=600, cell_ns=2_500_000_000, window_cell_ns=5_000_000_000),
    HistorySpan(span_s=3600, cell_ns=30_000_000_000, window_cell_ns=30_000_000_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineKey:
    """Identity of a machine on the page.

    Attributes:
        run: Run of its events; a replay and a watch of machines with the same name stay two.
        vm: Name of the machine.
        host: Id of the VM for a watched one, because two VMs may have one name; empty for a replay.
    """

    run: str
    vm: str
    host: str


def build_machine_key(event: EventEnvelope) -> MachineKey | None:
    """Return the machine of an event; None for an event that belongs to no machine."""
    data = event.data
    if not isinstance(data, TelemetryEvent | PhaseEvent):
        return None
    return MachineKey(run=event.run, vm=data.vm, host=(data.host or "") if event.run == LIVE_RUN else "")


class _CellRing:
    """The newest cells of one series; each cell is the mean of the rows in it.

    Args:
        cell_ns: Width of a cell.
        n_cells: Number of cells that are kept.
        n_columns: Number of columns of a row.
        finer: Passes every cell that it closes to this one as a row; None for the finest ring.
    """

    def __init__(self, cell_ns: int, n_cells: int, n_columns: int, finer: _CellRing | None) -> None:
        self._cell_ns, self._n_cells, self._finer = cell_ns, n_cells, finer
        self._coarser: _CellRing | None = None
        if finer is not None:
            finer._coarser = self
        self._times = np.zeros(n_cells, np.int64)
        self._cells = np.full((n_cells, n_columns), np.nan, np.float32)
        self._n_closed = 0
        self._open_ns = -1
        self._open_rows: list[NDArray[np.float32]] = []

    def add(self, t_ns: int, row: NDArray[np.float32]) -> None:
        """Add a row of ``(columns,)`` float32 with NaN where unknown; times never decrease."""
        cell_ns = t_ns - t_ns % self._cell_ns
        if cell_ns != self._open_ns and self._open_rows:
            mean = _compute_mean(self._open_rows)
            at = self._n_closed % self._n_cells
            self._times[at], self._cells[at] = self._open_ns, mean
            self._n_closed += 1
            self._open_rows = []
            if self._coarser is not None:
                self._coarser.add(self._open_ns, mean)
        self._open_ns = cell_ns
        self._open_rows.append(row)

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the start times and the rows of the cells in order; the last one may still grow."""
        order = np.arange(max(0, self._n_closed - self._n_cells), self._n_closed) % self._n_cells
        times, cells = self._times[order], self._cells[order]
        for t_ns, mean in self._list_open_cells():
            times, cells = np.append(times, t_ns), np.vstack([cells, mean[None]])
        return times, cells

    def _list_open_cells(self) -> list[tuple[int, NDArray[np.float32]]]:
        """Return start and mean of the cells that are not closed, with what the finer rings have not passed on yet."""
        rows = {self._open_ns: list(self._open_rows)} if self._open_rows else {}
        for t_ns, row in self._finer._list_open_cells() if self._finer is not None else ():
            rows.setdefault(t_ns - t_ns % self._cell_ns, []).append(row)
        return [(t_ns, _compute_mean(found)) for t_ns, found in rows.items()]


def _compute_mean(rows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the mean of the known values of each column; NaN without one."""
    if len(rows) == 1:
        return rows[0]
    stacked = np.stack(rows)
    is_known = np.isfinite(stacked)
    total = np.where(is_known, stacked, np.float32(0)).sum(axis=0, dtype=np.float64)
    count = is_known.sum(axis=0)
    mean: NDArray[np.float32] = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return mean


# Columns of the prediction series: probabilities, predicted and true phase (one column a phase, so that the mean of a
# cell is a share), infection and activity alarm.
_PREDICTED, _TRUE, _ALARMS = slice(_N_PHASES, 2 * _N_PHASES), slice(2 * _N_PHASES, 3 * _N_PHASES), 3 * _N_PHASES
_N_WINDOW_COLUMNS = 3 * _N_PHASES + 2


class _MachineSeries:
    """Telemetry and predictions of one machine."""

    def __init__(self) -> None:
        self.origin: str | None = None
        self.heard_ns = self.telemetry_ns = 0  # wall time at which the newest event, and the newest telemetry, arrived
        self.telemetry: TelemetryEvent | None = None
        self.epoch = 0  # changes when a new recording begins
        self._channels: tuple[str, ...] = ()
        self._bins: tuple[_CellRing, ...] = ()
        self._windows = _make_rings(_N_WINDOW_COLUMNS, is_windows=True)
        self._bin_ns, self._window_ns = -1, -1  # newest time

    def add_telemetry(self, data: TelemetryEvent) -> None:
        self.origin, self.telemetry = data.origin, data
        if data.channels != self._channels:
            self._channels, self._bins = data.channels, _make_rings(len(data.channels))
            self.epoch += 1
        step_ns = round(data.bin_s * 1e9)
        for i, values in enumerate(data.values):
            t_ns = data.t0_ns + i * step_ns
            if self._bin_ns >= 0 and not 0 < t_ns - self._bin_ns <= _MAX_JUMP_NS:
                self._bins = _make_rings(len(self._channels))
                self._windows = _make_rings(_N_WINDOW_COLUMNS, is_windows=True)
                self._window_ns = -1
                self.epoch += 1
            self._bin_ns = t_ns
            row = np.array(values, np.float32)
            self._bins[0].add(t_ns, row)

    def add_window(self, data: PhaseEvent) -> None:
        t_ns = (data.t_start_ns + data.t_end_ns) // 2
        if self._window_ns >= 0 and not 0 < t_ns - self._window_ns <= _MAX_JUMP_NS:
            self._windows = _make_rings(_N_WINDOW_COLUMNS, is_windows=True)
            self.epoch += 1
        self._window_ns = t_ns
        row = np.full(_N_WINDOW_COLUMNS, np.nan, np.float32)
        row[:_N_PHASES] = data.p
        row[_PREDICTED] = _ONE_HOT[data.decision]
        if data.truth is not None:
            row[_TRUE] = _ONE_HOT[data.truth]
        row[_ALARMS:] = _to_number(data.alarm), _to_number(data.activity_alarm)
        self._windows[0].add(t_ns, row)

    def read(self, level: int, after_ns: int) -> dict[str, object]:
        """Return the cells of one span from `after_ns` on, as the page gets them."""
        span = SPANS[level]
        names: list[str] = []
        bins: list[list[object]] = []
        if self._bins:
            times, cells = self._bins[level].read()
            newest = times[-1] if len(times) else 0
            is_shown = times > newest - span.span_s * 1_000_000_000
            has_data = np.asarray(np.isfinite(cells[is_shown]).any(axis=0))
            names = [name for name, is_known in zip(self._channels, has_data.tolist(), strict=True) if is_known]
            is_wanted = is_shown & (times >= after_ns)
            rows = _round_cells(cells[is_wanted][:, has_data])
            bins = [[t / 1e6, row] for t, row in zip(times[is_wanted].tolist(), rows, strict=True)]
        times, cells = self._windows[level].read()
        newest = times[-1] if len(times) else 0
        is_wanted = (times > newest - span.span_s * 1_000_000_000) & (times >= after_ns)
        windows = [_describe_window(t, row) for t, row in zip(times[is_wanted].tolist(), cells[is_wanted], strict=True)]
        return {
            "epoch": self.epoch,
            "span_s": span.span_s,
            "cell_ms": span.cell_ns / 1e6,
            "window_ms": span.window_cell_ns / 1e6,
            "channels": names,
            "n_channels": len(self._channels),
            "bins": bins,
            "windows": windows,
        }


class MachineHistory:
    """The history of all machines; the machine that was silent for longest makes room for a new one."""

    def __init__(self, max_machines: int = MAX_MACHINES) -> None:
        self._max_machines = max_machines
        self._machines: OrderedDict[MachineKey, _MachineSeries] = OrderedDict()  # the least recently heard first
        self._forgotten: list[MachineKey] = []
        self._pruned_ns = 0

    def __len__(self) -> int:
        return len(self._machines)

    def add(self, key: MachineKey, event: EventEnvelope, *, now_ns: int) -> bool:
        """Add an event of a machine; return whether the machine is new, or its origin has changed.

        Args:
            key: Its machine, from `build_machine_key`.
            event: A telemetry or phase event.
            now_ns: Wall time of its arrival.
        """
        series = self._machines.get(key)
        is_new = series is None
        if series is None:
            series = self._machines[key] = _MachineSeries()
            if len(self._machines) > self._max_machines:
                self._forgotten.append(self._machines.popitem(last=False)[0])
        self._machines.move_to_end(key)
        series.heard_ns = now_ns
        origin = series.origin
        if isinstance(event.data, TelemetryEvent):
            series.telemetry_ns = now_ns
            series.add_telemetry(event.data)
        elif isinstance(event.data, PhaseEvent):
            series.add_window(event.data)
        self._forget_silent(now_ns)
        return is_new or series.origin != origin

    def get_origin(self, key: MachineKey) -> str | None:
        """Return the origin of a machine's telemetry; None if it is not known."""
        series = self._machines.get(key)
        return None if series is None else series.origin

    def pop_forgotten(self) -> list[MachineKey]:
        """Return the machines that were forgotten since the last call."""
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def read(self, key: MachineKey, *, span_s: int, after_ns: int = 0) -> dict[str, object] | None:
        """Return a machine's history as the page gets it, or None if the machine or the span is unknown.

        Args:
            key: The machine.
            span_s: Length of the time span, one of `SPANS`.
            after_ns: Start of the first cell that is wanted; 0 returns the whole span.
        """
        series = self._machines.get(key)
        level = next((i for i, span in enumerate(SPANS) if span.span_s == span_s), None)
        if series is None or level is None:
            return None
        newest = series.telemetry
        facts: dict[str, object] = {"origin": series.origin, "telemetry_ms": None}
        if newest is not None:
            facts |= {"telemetry_ms": series.telemetry_ns / 1e6}
            facts |= {"late_rows": newest.late_rows, "lost_rows": newest.lost_rows, "lateness_s": newest.lateness_s}
        return facts | series.read(level, after_ns)

    def _forget_silent(self, now_ns: int) -> None:
        if now_ns - self._pruned_ns < _PRUNE_INTERVAL_NS:
            return
        self._pruned_ns = now_ns
        while self._machines:
            key, series = next(iter(self._machines.items()))
            if now_ns - series.heard_ns <= _MAX_SILENCE_NS:
                return
            del self._machines[key]
            self._forgotten.append(key)


_ONE_HOT = {str(phase): np.eye(_N_PHASES, dtype=np.float32)[code] for code, phase in enumerate(PHASES)}


def _make_rings(n_columns: int, *, is_windows: bool = False) -> tuple[_CellRing, ...]:
    """Return one ring for each of `SPANS`; rows are added to the first."""
    rings: list[_CellRing] = []
    for span in SPANS:
        width_ns = span.window_cell_ns if is_windows else span.cell_ns
        n_cells = span.span_s * 1_000_000_000 // width_ns
        rings.append(_CellRing(width_ns, n_cells, n_columns, rings[-1] if rings else None))
    return tuple(rings)


def _describe_window(t_ns: int, row: NDArray[np.float32]) -> list[object]:
    """Return time (ms), code of the most frequent predicted and true phase (null if unknown), alarms, probabilities.

    An alarm counts if it was raised at any time in the cell.
    """
    truth = None if np.isnan(row[_TRUE]).any() else int(row[_TRUE].argmax())
    alarms = [None if np.isnan(v) else bool(v > 0) for v in row[_ALARMS:]]
    p = [round(v, _SIGNIFICANT_DIGITS) for v in row[:_N_PHASES].tolist()]
    return [t_ns / 1e6, int(row[_PREDICTED].argmax()), truth, *alarms, p]


def _to_number(value: bool | None) -> float:
    return float("nan") if value is None else float(value)


def _round_cells(cells: NDArray[np.float32]) -> list[list[float | None]]:
    return [[float(f"{v:.{_SIGNIFICANT_DIGITS}g}") if v == v else None for v in row] for row in cells.tolist()]
