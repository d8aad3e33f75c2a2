"""The ordered map on a real Ray cluster of this machine: the pool's promises, the same bytes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.test_workers import double, refuse
from tests.validate.test_sweep import SHORT, products

from phasewatch.parallel.ray import map_on_ray
from phasewatch.simulate import simulate
from phasewatch.validate.sweep import sweep

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
ray = pytest.importorskip("ray", reason="needs the extra: pip install 'phasewatch[ray]'")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Start one for all tests: it takes seconds, and on a busy machine more than one attempt."""
    for attempt in range(5):
        try:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            break
        except Exception:
            if attempt == 4:
                raise
    yield
    ray.shutdown()


def die_or_hang(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if x == 6:
        time.sleep(3600)
    return x


def test_results_come_in_the_items_order() -> None:
    results = list(map_on_ray(double, range(100), workers=2))

    assert [r.value for r in results] == [2 * i for i in range(100)]
    assert [r.index for r in results] == list(range(100))


def test_a_death_and_a_hang_cost_their_one_item_after_one_retry() -> None:
    results = list(map_on_ray(die_or_hang, range(10), workers=2, timeout_s=3))

    assert [r.index for r in results if r.error] == [3, 6]
    assert [r.value for r in results if not r.error] == [0, 1, 2, 4, 5, 7, 8, 9]
    assert "died" in str(results[3].error)
    assert "2 times" in str(results[6].error)


def test_broken_code_is_raised_and_not_counted_as_broken_data() -> None:
    with pytest.raises(ValueError, match="no 2"):
        list(map_on_ray(refuse, range(5), workers=2))


def test_a_sweep_on_ray_gives_the_bytes_of_one_on_this_machines_processes(
    tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    store = simulate(tmp_path / "store", hosts=2, episodes=60, seed=4, faults=0.3, between_s=SHORT).store
    sweep(store, tmp_path / "one", workers=1)
    sweep(store, tmp_path / "two", workers=2)

    sweep(store, tmp_path / "ray", workers=2, mapper=map_on_ray)

    one, two, ray_s = (products(tmp_path / name) for name in ("one", "two", "ray"))
    other = sum(one[name] != digests.get(name) for digests in (two, ray_s) for name in one)
    soak_row("Engines", engine="Ray on a local cluster", bundles=60, other_bytes=other)

    assert ray_s == one == two
