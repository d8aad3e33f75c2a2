"""The ordered map of `parallel.pool` on a Ray cluster, for stores that are too large for one machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from phasewatch.errors import MachineError
from phasewatch.parallel.pool import ONE_THREAD_ENVIRONMENT, WORKER_START_TIMEOUT_S, ItemResult, set_environment

__all__ = ["map_on_ray"]

T = TypeVar("T")
R = TypeVar("R")

_MAX_PENDING_PER_WORKER = 16  # tasks submitted without a result, per worker
_FRESH_VARIABLE = "PHASEWATCH_FRESH_PROCESS"  # another value starts another process: Ray keeps one per environment


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
    """Apply a function to each item on a Ray cluster and yield the results in the order of the items.

    Args:
        fn: Picklable function, as for `parallel.pool.map_ordered`; every node needs the same phasewatch and store.
        items: Read lazily, at most `_MAX_PENDING_PER_WORKER` items for each worker ahead of the last result.
        workers: CPUs used at a time; a local cluster is started with this number.
        timeout_s: Seconds that the oldest item may take before its worker is killed; None for no limit.
        retries: Number of further tries of an item whose worker died or hung, each in a fresh process.
        address: Address of a running cluster (``auto``, ``ray://head:10001``); empty starts one here and ends it.
        start_s: Seconds that a worker may take to start an item.

    Raises:
        MachineError: If no cluster can be reached or started.
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
            value, problem = _wait_for_result(ray, head, timeout_s, start_s)
            if problem is not None:
                head.failures += 1
                if head.failures <= retries:
                    start(head)
                    continue
            waiting.popleft()
            error = None if problem is None else f"{problem}, {head.failures} times"
            yield ItemResult(index=head.index, value=value, error=error)


def _apply_after_start(fn: Callable[[T], R], item: T) -> Iterator[R | None]:
    """Yield None when the work starts, so that its time can be measured from there, then its value."""
    yield None
    yield fn(item)


def _fresh_environment(task: _RayTask) -> dict[str, str]:
    return {**ONE_THREAD_ENVIRONMENT, _FRESH_VARIABLE: f"{task.index}.{task.failures}"}


def _wait_for_result(ray: Any, task: _RayTask, timeout_s: float | None, start_s: float) -> tuple[Any, str | None]:
    """Wait for the oldest task; return its value and None, or None and the reason why its worker was lost."""
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
            raise exc.cause from exc  # an exception of the function is raised here
    return value, None


@contextmanager
def _connect_cluster(workers: int, address: str) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine for the block; use the process's connection if it has one."""
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
        reason = str(exc).partition("\n")[0]
        raise MachineError(
            f"no Ray cluster on {where}: {reason}; check --ray-address, or leave out --engine ray"
        ) from exc
    try:
        yield ray
    finally:
        ray.shutdown()
