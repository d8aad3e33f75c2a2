"""The ordered map of `workers`, on Ray: for stores that one machine no longer sweeps in time. Same function, same results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from phasewatch.errors import MachineError
from phasewatch.parallel.pool import ONE_THREAD_ENVIRONMENT, WORKER_START_TIMEOUT_S, ItemResult, set_environment

T = TypeVar("T")
R = TypeVar("R")

_MAX_PENDING_PER_WORKER = 16  # tasks handed over and not yet given back, per worker
_FRESH_VARIABLE = (
    "PHASEWATCH_FRESH_PROCESS"  # another value of it, another process: Ray keeps one apart for each environment
)


@dataclass(slots=True)
class _RayTask:
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
    start_s: float = WORKER_START_TIMEOUT_S,
) -> Iterator[ItemResult[R]]:
    """Apply a function to each item on a Ray cluster and give the results in the items' order.

    Args:
        fn: As `workers.map_ordered` wants it; every node needs the same phasewatch, and sees the same store.
        items: Read only as far ahead as the look-ahead needs.
        workers: CPUs that are used at a time; a local cluster is started with so many.
        timeout_s: How long an item that all others wait for may take before its worker is killed; None waits for ever.
        retries: How often an item is tried again, in a fresh process, after its worker died or hung.
        address: Of a running cluster (``auto``, ``ray://head:10001``); empty starts one here and ends it.
        start_s: How long a worker may take to begin with it.

    Raises:
        MachineError: If Ray is not there, or no cluster answers.
    """
    with _connect_cluster(workers, address) as ray:
        remote = ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")(_apply_after_start)
        shared = ray.put(fn)

        def start(task: _RayTask) -> None:
            options = {"runtime_env": {"env_vars": _fresh_environment(task)}} if task.failures else {}
            task.ref = remote.options(**options).remote(shared, task.item)

        source = enumerate(items)
        waiting: deque[_RayTask] = deque()
        while True:
            while len(waiting) < workers * _MAX_PENDING_PER_WORKER and (pair := next(source, None)) is not None:
                waiting.append(_RayTask(index=pair[0], item=pair[1], ref=None))
                start(waiting[-1])
            if not waiting:
                return
            head = waiting[0]
            value, words = _wait_for_result(ray, head, timeout_s, start_s)
            if words:
                head.failures += 1
                if head.failures <= retries:
                    start(head)
                    continue
            waiting.popleft()
            yield ItemResult(index=head.index, value=value, error=f"{words}, {head.failures} times" if words else None)


def _apply_after_start(fn: Callable[[T], R], item: T) -> Iterator[R | None]:
    """Say that the work begins, then give its value: only then does its time run."""
    yield None
    yield fn(item)


def _fresh_environment(task: _RayTask) -> dict[str, str]:
    return {**ONE_THREAD_ENVIRONMENT, _FRESH_VARIABLE: f"{task.index}.{task.failures}"}


def _wait_for_result(ray: Any, task: _RayTask, timeout_s: float | None, start_s: float) -> tuple[Any, str]:
    """Wait for the oldest task; give its value, or the words for it if its worker hung or died."""
    value = None
    for limit_s, what in ((start_s if timeout_s else None, "did not start in"), (timeout_s, "took longer than")):
        done, _ = ray.wait([task.ref], timeout=limit_s)
        if not done:
            ray.cancel(task.ref, force=True)
            return None, f"{what} {limit_s:g} s"
        try:
            value = ray.get(next(task.ref))
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError,
        ) as exc:
            return None, f"the worker died ({type(exc).__name__})"
        except ray.exceptions.RayTaskError as exc:
            raise exc.cause from exc  # broken code is not data
    return value, ""


@contextmanager
def _connect_cluster(workers: int, address: str) -> Iterator[Any]:
    """Join a cluster, or start one on this machine for as long as the block lasts; the process's own, if it has one."""
    import ray

    if ray.is_initialized():
        yield ray
        return

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    try:
        if address:
            ray.init(address=address, runtime_env={"env_vars": dict(ONE_THREAD_ENVIRONMENT)}, **quiet)
        else:
            with set_environment(ONE_THREAD_ENVIRONMENT):  # its processes inherit it
                ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
    except Exception as exc:  # Ray raises bare ones when a node does not come up
        where = address or "this machine"
        words = str(exc).partition("\n")[0]
        raise MachineError(f"no Ray cluster on {where}: {words}; check --ray-address, or leave out --engine ray") from exc
    try:
        yield ray
    finally:
        ray.shutdown()
