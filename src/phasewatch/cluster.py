"""The ordered map of `workers`, on Ray: for stores that one machine no longer sweeps in time. Same function, same results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from phasewatch.errors import MachineError
from phasewatch.workers import ONE_THREAD, START_S, Result, environment

T = TypeVar("T")
R = TypeVar("R")

_LOOK_AHEAD = 16  # tasks handed over and not yet given back, per worker
_FRESH = "PHASEWATCH_FRESH_PROCESS"  # another value of it, another process: Ray keeps one apart for each environment


@dataclass(slots=True)
class _Task:
    index: int
    item: Any
    ref: Any
    failures: int = 0


def map_on_ray(
    fn: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    timeout_s: float | None = None,
    retries: int = 1,
    address: str = "",
    start_s: float = START_S,
) -> Iterator[Result[R]]:
    """Apply a function to each item on a Ray cluster and give the results in the items' order.

    Args:
        fn: As `workers.map_ordered` wants it; every node needs the same phasewatch, and sees the same store.
        items: Read only as far ahead as the look-ahead needs.
        workers: CPUs that are used at a time; a local cluster is started with so many.
        timeout_s: How long an item may hold up all others before its worker is killed; None waits for ever.
        retries: How often an item is tried again, in a fresh process, after its worker died or hung.
        address: Of a running cluster (``auto``, ``ray://head:10001``); empty starts one here and ends it.
        start_s: How much longer it may take where a process has to be started first.

    Raises:
        MachineError: If Ray is not there, or no cluster answers.
    """
    with _cluster(workers, address) as ray:
        remote = ray.remote(num_cpus=1, max_retries=0)(_apply)
        shared = ray.put(fn)

        def start(task: _Task) -> None:
            options = {"runtime_env": {"env_vars": _fresh(task)}} if task.failures else {}
            task.ref = remote.options(**options).remote(shared, task.item)

        source = enumerate(items)
        waiting: deque[_Task] = deque()
        patience_s = start_s  # until the first result the cluster may still be starting its processes
        while True:
            while len(waiting) < workers * _LOOK_AHEAD and (pair := next(source, None)) is not None:
                waiting.append(_Task(index=pair[0], item=pair[1], ref=None))
                start(waiting[-1])
            if not waiting:
                return
            head = waiting[0]
            words = _wait(ray, head, None if timeout_s is None else timeout_s + patience_s)
            if words:
                head.failures += 1
                if head.failures <= retries:
                    start(head)
                    patience_s = start_s
                    continue
            waiting.popleft()
            patience_s = 0.0
            value = None if words else ray.get(head.ref)
            yield Result(index=head.index, value=value, error=f"{words}, {head.failures} times" if words else None)


def _apply(fn: Callable[[T], R], item: T) -> R:
    return fn(item)


def _fresh(task: _Task) -> dict[str, str]:
    return {**ONE_THREAD, _FRESH: f"{task.index}.{task.failures}"}


def _wait(ray: Any, task: _Task, limit_s: float | None) -> str:
    """Wait for the oldest task; give the words for it if its worker hung or died."""
    done, _ = ray.wait([task.ref], timeout=limit_s)
    if not done:
        ray.cancel(task.ref, force=True)
        return f"held up the others for {limit_s:g} s"
    try:
        ray.get(task.ref)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as exc:
        return f"the worker died ({type(exc).__name__})"
    except ray.exceptions.RayTaskError as exc:
        raise exc.cause from exc  # broken code is not data
    return ""


@contextmanager
def _cluster(workers: int, address: str) -> Iterator[Any]:
    """Join a cluster, or start one on this machine for as long as the block lasts."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    try:
        if address:
            ray.init(address=address, runtime_env={"env_vars": dict(ONE_THREAD)}, **quiet)
        else:
            with environment(ONE_THREAD):  # its processes inherit it
                ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
    except Exception as exc:  # Ray raises bare ones when a node does not come up
        where = address or "this machine"
        words = str(exc).partition("\n")[0]
        raise MachineError(f"no Ray cluster on {where}: {words}; check --address, or leave out --engine ray") from exc
    try:
        yield ray
    finally:
        ray.shutdown()
