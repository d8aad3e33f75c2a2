"""A pool that keeps the order, and in which a hang or a death costs one item."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from phasewatch.errors import MachineError
from phasewatch.parallel.pool import map_ordered


def double(x: int) -> int:
    return 2 * x


def late_if_even(x: int) -> int:
    time.sleep(0.02 * (x % 2 == 0))
    return x


def die_or_hang(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if x == 6:
        time.sleep(60)
    return x


def die_once(folder: str, x: int) -> tuple[int, int]:
    if x == 2:
        mark = Path(folder) / "died"
        if not mark.exists():
            mark.touch()
            os._exit(3)
    return x, os.getpid()


def refuse(x: int) -> int:
    if x == 2:
        raise ValueError(f"no {x}")
    return x


class Odd(Exception):
    """An exception that does not survive pickling."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a}{b}")


def refuse_oddly(x: int) -> int:
    raise Odd(1, 2)


def threads(x: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def big(x: bytes) -> bytes:
    return x * 2


class Unloadable:
    """A function that cannot be loaded in a worker."""

    def __reduce__(self) -> tuple[object, ...]:
        return int, ("no number",)

    def __call__(self, x: int) -> int:
        return x


def test_results_come_in_the_order_of_the_items() -> None:
    results = list(map_ordered(late_if_even, range(30), workers=2, timeout_s=30))

    assert [r.value for r in results] == list(range(30))
    assert [r.index for r in results] == list(range(30))


def test_one_worker_without_a_timeout_is_the_caller_itself() -> None:
    assert [r.value for r in map_ordered(lambda x: (x, os.getpid()), [1, 2], workers=1)] == [
        (i, os.getpid()) for i in (1, 2)
    ]


def test_no_items_need_no_process() -> None:
    assert list(map_ordered(double, [], workers=4, timeout_s=1)) == []


def test_crash_or_hang_loses_one_item_after_one_retry() -> None:
    results = list(map_ordered(die_or_hang, range(12), workers=2, timeout_s=0.5))

    assert [r.value for r in results] == [0, 1, 2, None, 4, 5, None, 7, 8, 9, 10, 11]
    assert results[3].error == "the worker died by signal 9, 2 times"
    assert results[6].error == "took longer than 0.5 s, 2 times"


def test_an_item_whose_worker_died_by_chance_succeeds_in_a_fresh_process(tmp_path: Path) -> None:
    results = list(map_ordered(partial(die_once, str(tmp_path)), range(6), workers=1, timeout_s=30))
    values = [r.value for r in results if r.value]

    assert [x for x, _ in values] == list(range(6))
    assert len({pid for _, pid in values}) == 3  # before the death, the retry's own, after it


def test_exception_of_the_function_is_raised_in_the_order_of_the_items() -> None:
    results = map_ordered(refuse, range(5), workers=2, timeout_s=30)

    assert [next(results).value, next(results).value] == [0, 1]
    with pytest.raises(ValueError, match="no 2"):
        next(results)


def test_exception_that_cannot_be_pickled_keeps_its_message() -> None:
    with pytest.raises(RuntimeError, match="Odd: 12"):
        list(map_ordered(refuse_oddly, [1], workers=2, timeout_s=30))


def test_items_are_read_no_further_ahead_than_needed() -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = map_ordered(double, endless(), workers=2, timeout_s=30)
    first = [next(results).value for _ in range(5)]
    results.close()  # type: ignore[attr-defined]

    assert first == [2, 4, 6, 8, 10]
    assert taken < 100


def test_workers_compute_in_one_thread() -> None:
    before = dict(os.environ)

    assert [r.value for r in map_ordered(threads, range(3), workers=2, timeout_s=30)] == ["1"] * 3
    assert dict(os.environ) == before


def test_large_items_and_large_results_do_not_block_each_other() -> None:
    results = map_ordered(big, (bytes(300_000) for _ in range(8)), workers=2, timeout_s=30)

    assert [len(r.value or b"") for r in results] == [600_000] * 8


def test_workers_that_cannot_start_raise_machine_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MachineError, match="no worker process could be started"):
        list(map_ordered(Unloadable(), [1], workers=1, timeout_s=30))  # type: ignore[arg-type]


def test_pool_without_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        map_ordered(double, [1], workers=0)
