"""An ordered map over items in single-threaded processes; a hang or crash of a worker loses one item (ADR 0070)."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

from phasewatch.errors import MachineError

__all__ = ["ONE_THREAD_ENVIRONMENT", "WORKER_START_TIMEOUT_S", "ItemResult", "map_ordered", "set_environment"]

T = TypeVar("T")
R = TypeVar("R")

# One thread in each worker: two experiments or sweeps at a time are faster than two threads in one (measured).
ONE_THREAD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_MAX_QUEUED_PER_WORKER = 3  # items sent to a worker at once, so that it never waits for the next
_MAX_QUEUED_BYTES = 16 << 10  # a larger item waits for an idle worker: two ends that write to full pipes would hang
_MAX_WAITING_PER_WORKER = 16  # results that may wait for an earlier one, per worker
WORKER_START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemResult(Generic[R]):
    """The result of one item: its value, or why its workers were lost.

    Attributes:
        index: Position of the item in the input.
        value: Return value of the function; None with an error.
        error: Reason, for people; None if there is a value.
    """

    index: int
    value: R | None
    error: str | None

    def unwrap(self, work: str) -> R:
        """Return the value.

        Args:
            work: What was computed, for the message.

        Raises:
            MachineError: If the workers were lost.
        """
        if self.value is None:
            raise MachineError(f"{work}: {self.error or 'the worker was lost'}; run the command again")
        return self.value


@dataclass(slots=True, kw_only=True)
class _WorkerProcess:
    process: BaseProcess
    pipe: Connection
    since_s: float
    is_ready: bool = False
    is_fresh: bool = True  # no item has run in it
    queue: deque[int] = field(default_factory=deque)  # indices of items sent; the first one is running


def map_ordered(
    fn: Callable[[T], R], items: Iterable[T], *, workers: int, timeout_s: float | None = None, retries: int = 1
) -> Iterator[ItemResult[R]]:
    """Apply a function to each item in processes and yield the results in the order of the items.

    Args:
        fn: Picklable function. An exception that it raises is raised here, in the order of the items; the function
            returns a value for invalid data.
        items: Read lazily, at most `_MAX_WAITING_PER_WORKER` items for each worker ahead of the last result.
        workers: Number of processes. With 1 and no time-out the function runs in the caller's process.
        timeout_s: Seconds that one item may take before its worker is killed; None for no limit.
        retries: Number of further tries of an item whose worker died or hung, each in a process in which nothing else
            has run.

    Raises:
        MachineError: If no worker can be started.
        ValueError: If `workers` is below 1.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers; expected at least 1")
    if workers == 1 and timeout_s is None:
        return (ItemResult(index=i, value=fn(item), error=None) for i, item in enumerate(items))
    return _WorkerPool(fn, items, workers=workers, timeout_s=timeout_s, retries=retries).run()


class _WorkerPool(Generic[T, R]):
    """The parent's side of the pool: workers, items in work, and results that wait for an earlier one."""

    def __init__(
        self, fn: Callable[[T], R], items: Iterable[T], *, workers: int, timeout_s: float | None, retries: int
    ) -> None:
        self._fn = fn
        self._source = enumerate(items)
        self._size, self._timeout_s, self._retries = workers, timeout_s, retries
        self._workers: list[_WorkerProcess] = []
        self._items: dict[int, bytes] = {}  # read from the input and pickled, not finished
        self._requeued: deque[int] = deque()  # sent before any new item, lowest index first
        self._suspects: deque[int] = deque()  # items on which a worker was lost
        self._failures: dict[int, int] = {}
        self._done: dict[int, tuple[bool, Any]] = {}  # index → (has a value, value or exception or reason)
        self._next = 0
        self._is_drained = False
        self._failed_starts = 0

    def run(self) -> Iterator[ItemResult[R]]:
        """Yield results until every item has one."""
        try:
            while True:
                while self._next in self._done:
                    yield self._next_result()
                self._hand_out()
                if self._is_drained and not self._items and not self._done:
                    return
                self._wait_for_workers()
        finally:
            for worker in self._workers:
                _stop_worker(worker, kill=bool(worker.queue))

    def _next_result(self) -> ItemResult[R]:
        has_value, value = self._done.pop(self._next)
        index = self._next
        self._next += 1
        if isinstance(value, _RemoteException):
            raise value.exception from _RemoteTraceback(value.text)
        return ItemResult(index=index, value=value if has_value else None, error=None if has_value else value)

    def _hand_out(self) -> None:
        if self._suspects:
            self._hand_out_suspect()
            return  # the other workers drain meanwhile: losses are rare, and a suspect item runs alone
        starting = sum(not worker.is_ready for worker in self._workers)
        while len(self._workers) < self._size:
            if len(self._requeued) <= starting:  # no process without an item for it
                if (index := self._new_index()) is None:
                    break
                self._requeued.append(index)
            self._start_worker()
            starting += 1
        for depth in range(_MAX_QUEUED_PER_WORKER):  # breadth first, so that no worker waits while another has many
            for worker in self._workers:
                if worker.is_ready and len(worker.queue) == depth:
                    index = self._requeued.popleft() if self._requeued else self._new_index()
                    if index is None:
                        return
                    if depth and len(self._items[index]) > _MAX_QUEUED_BYTES:
                        self._requeued.appendleft(index)
                        return
                    self._send_item(worker, index)

    def _hand_out_suspect(self) -> None:
        """Send an item that lost a worker to a process in which nothing else has run, and nothing else to that one."""
        idle = [worker for worker in self._workers if worker.is_ready and not worker.queue]
        for worker in idle:
            if worker.is_fresh:
                self._send_item(worker, self._suspects.popleft())
                return
        if all(worker.is_ready for worker in self._workers):
            if len(self._workers) >= self._size:
                if not idle:
                    return
                self._workers.remove(idle[0])
                _stop_worker(idle[0], kill=False)
            self._start_worker()

    def _send_item(self, worker: _WorkerProcess, index: int) -> None:
        if not worker.queue:
            worker.since_s = time.monotonic()
        worker.queue.append(index)
        worker.is_fresh = False
        with suppress(BrokenPipeError, ConnectionResetError):  # `_wait_for_workers` handles the end of the worker
            worker.pipe.send_bytes(self._items[index])

    def _new_index(self) -> int | None:
        if self._is_drained or len(self._items) + len(self._done) >= self._size * _MAX_WAITING_PER_WORKER:
            return None
        try:
            index, item = next(self._source)
        except StopIteration:
            self._is_drained = True
            return None
        self._items[index] = bytes(ForkingPickler.dumps((index, item)))
        return index

    def _start_worker(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_run_worker, args=(theirs, self._fn), daemon=True)
        with set_environment(ONE_THREAD_ENVIRONMENT):
            process.start()
        theirs.close()
        self._workers.append(_WorkerProcess(process=process, pipe=ours, since_s=time.monotonic()))

    def _wait_for_workers(self) -> None:
        pipes = {worker.pipe: worker for worker in self._workers}
        for ready in wait(list(pipes), timeout=self._wait_timeout_s()):
            self._receive_result(pipes[ready])  # type: ignore[index]
        now = time.monotonic()
        for worker in list(self._workers):
            limit_s = self._time_limit_s(worker)
            if limit_s is not None and now - worker.since_s > limit_s and not worker.pipe.poll():
                reason = f"took longer than {limit_s:g} s" if worker.is_ready else f"did not start in {limit_s:g} s"
                self._drop_worker(worker, reason)

    def _time_limit_s(self, worker: _WorkerProcess) -> float | None:
        if not worker.is_ready:
            return WORKER_START_TIMEOUT_S
        return self._timeout_s if worker.queue else None

    def _wait_timeout_s(self) -> float | None:
        now = time.monotonic()
        left = [
            worker.since_s + limit - now
            for worker in self._workers
            if (limit := self._time_limit_s(worker)) is not None
        ]
        return max(0.0, min(left)) + 0.01 if left else None

    def _receive_result(self, worker: _WorkerProcess) -> None:
        try:
            index, value = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            code = worker.process.exitcode
            how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
            self._drop_worker(worker, f"the worker died {how}")
            return
        worker.since_s = time.monotonic()
        if index is None:  # the first message: the worker is ready
            worker.is_ready, self._failed_starts = True, 0
            return
        worker.queue.popleft()
        self._record_result(index, True, value)
        if self._failures.get(index):
            self._workers.remove(worker)  # an item that lost a worker ran in it: the next item gets another process
            _stop_worker(worker, kill=False)

    def _drop_worker(self, worker: _WorkerProcess, reason: str) -> None:
        """End a worker that hung or died; count a failure of its running item, and requeue its other items."""
        self._workers.remove(worker)
        _stop_worker(worker, kill=True)
        if not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts > self._size:
                raise MachineError(f"no worker process could be started: {reason}")
        elif worker.queue:
            index = worker.queue.popleft()
            self._failures[index] = self._failures.get(index, 0) + 1
            if self._failures[index] > self._retries:
                self._record_result(index, False, f"{reason}, {self._failures[index]} times")
            else:
                self._suspects.append(index)
        self._requeued = deque(sorted((*worker.queue, *self._requeued)))

    def _record_result(self, index: int, has_value: bool, value: Any) -> None:
        del self._items[index]
        self._done[index] = (has_value, value)


@dataclass(frozen=True, slots=True)
class _RemoteException:
    """An exception of a worker, with its traceback."""

    exception: BaseException
    text: str


class _RemoteTraceback(Exception):
    """The traceback of an exception in a worker, as its cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _run_worker(pipe: Connection, fn: Callable[[Any], Any]) -> None:
    """Run the worker's loop: send the value of each item until the parent closes the pipe."""
    # A user's model may start processes (a DataLoader, a grid search), which `multiprocessing` forbids to a daemon.
    # For its parent this process stays a daemon, so that it ends with it.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        pipe.send((None, None))
        while True:
            index, item = pipe.recv()
            try:
                answer: object = fn(item)
            except Exception as exc:
                answer = _pack_exception(exc)
            pipe.send((index, answer))


def _pack_exception(exc: Exception) -> _RemoteException:
    """Wrap an exception for the parent; one that cannot be pickled becomes a RuntimeError with its message."""
    text = traceback.format_exc()
    try:
        ForkingPickler.loads(ForkingPickler.dumps(exc))
    except Exception:
        return _RemoteException(RuntimeError(f"{type(exc).__name__}: {exc}"), text)
    return _RemoteException(exc, text)


def _stop_worker(worker: _WorkerProcess, *, kill: bool) -> None:
    worker.pipe.close()  # an idle worker sees the end of its input and returns
    if not kill:
        worker.process.join(2)
    if worker.process.is_alive():
        worker.process.kill()
    worker.process.join(5)
    with suppress(ValueError):  # it hangs in the kernel and survived the kill; nothing more can be done here
        worker.process.close()


@contextmanager
def set_environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables in the block, for a process that must see them before it imports numpy."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
