"""A fault at any system call of any writer: nothing acknowledged is lost, nothing is torn, a restart makes the same
bytes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.crash.faults import ANYWHERE, WRITING, FaultyDisk, Killed
from tests.crash.worlds import WORLDS, Work, digests, prepare_cells, temporaries

from phasewatch import atomic
from phasewatch.errors import PhasewatchError

DRAWN = 10  # of each world, in the fast suite


@pytest.fixture(scope="module", autouse=True)
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> None:
    prepare_cells(tmp_path_factory.mktemp("cells"))


def undisturbed(make: Callable[[Path], Work], folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the calls that a world makes, and its products."""
    (folder / "spare").mkdir(parents=True)
    (folder / "world").mkdir()
    work = make(folder / "world")
    with atomic.use_disk_operations(disk := FaultyDisk(folder / "spare")):
        work.do()
    return disk.calls, digests(work.folder)


def points_of(calls: list[str]) -> list[tuple[int, str]]:
    return [(at, fault) for at, call in enumerate(calls) for fault in (WRITING if call == "write" else ANYWHERE)]


def disturb(make: Callable[[Path], Work], folder: Path, at: int, fault: str) -> tuple[Work, bool]:
    """Disturb a world at one point, look at what stands, restart it; give whether it died."""
    (folder / "spare").mkdir(parents=True)
    (folder / "world").mkdir()
    work = make(folder / "world")
    disk = FaultyDisk(folder / "spare", at=at, fault=fault)
    with atomic.use_disk_operations(disk), suppress(Killed, OSError, PhasewatchError):
        work.do()
    assert len(disk.calls) > at, "the point was never reached"
    work.check()
    work.do()
    work.check()
    return work, disk.is_dead


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What stood after a restart: whether the writer had died, products of other bytes, and files left behind."""

    died: bool
    unlike: int
    left_behind: int


def assert_whole(
    make: Callable[[Path], Work], folder: Path, calls: list[str], products: dict[str, str], point: tuple[int, str]
) -> Seen:
    at, fault = point
    work, died = disturb(make, folder / f"{at}-{fault}", at, fault)
    where = f"{fault} at call {at}, {calls[at]}"
    made = digests(work.folder)
    unlike = [name for name in {*made, *products} if made.get(name) != products.get(name)]
    left = temporaries(work.folder)
    assert (unlike, left) == ([], []), where
    return Seen(died=died, unlike=len(unlike), left_behind=len(left))


@pytest.mark.parametrize("world", WORLDS)
def test_whatever_fails_at_a_drawn_point_a_restart_makes_it_whole(world: str, tmp_path: Path) -> None:
    make = WORLDS[world]
    calls, products = undisturbed(make, tmp_path / "undisturbed")
    for point in random.Random(world).sample(points_of(calls), DRAWN):
        assert_whole(make, tmp_path, calls, products, point)


@pytest.mark.soak
@pytest.mark.parametrize("world", WORLDS)
def test_whatever_fails_at_any_point_a_restart_makes_it_whole(
    world: str, tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    make = WORLDS[world]
    calls, products = undisturbed(make, tmp_path / "undisturbed")
    points = points_of(calls)
    seen = [assert_whole(make, tmp_path, calls, products, point) for point in points]
    faults = Counter(fault for _, fault in points)
    soak_row(
        "Crash anywhere: at each point nothing acknowledged was lost and nothing torn",
        writer=world,
        calls=len(calls),
        points=len(points),
        died=sum(s.died for s in seen),
        **{fault: faults[fault] for fault in WRITING},
        **{"products of other bytes": sum(s.unlike for s in seen), "left behind": sum(s.left_behind for s in seen)},
    )


def test_there_are_at_least_three_hundred_points_and_every_kind_of_call_is_among_them(tmp_path: Path) -> None:
    calls = [undisturbed(make, tmp_path / world)[0] for world, make in WORLDS.items()]

    assert sum(len(points_of(each)) for each in calls) >= 300
    assert {call for each in calls for call in each} == {
        "open",
        "write",
        "fsync",
        "close",
        "rename",
        "link",
        "unlink",
        "mkdir",
        "rmdir",
    }


def test_a_writer_that_forgets_an_fsync_is_found_out(tmp_path: Path) -> None:
    """The power cut takes what was not made durable: the test of the test."""

    def careless(folder: Path) -> Work:
        def do() -> None:
            for n in range(3):
                atomic.write_atomic(folder / f"{n}", b"x" * 100, durable=False)

        return Work(folder, do, lambda: [check(folder / f"{n}") for n in range(3)])  # type: ignore[arg-type, return-value]

    def check(path: Path) -> None:
        assert not path.exists() or path.read_bytes() == b"x" * 100

    calls, _ = undisturbed(careless, tmp_path / "undisturbed")
    found = 0
    for at in range(len(calls)):
        work_folder = tmp_path / str(at)
        (work_folder / "spare").mkdir(parents=True)
        (work_folder / "world").mkdir()
        work = careless(work_folder / "world")
        with atomic.use_disk_operations(FaultyDisk(work_folder / "spare", at=at, fault="power cut")), suppress(Killed):
            work.do()
        found += len(digests(work.folder)) < at // len(calls[:4])

    assert found > 0
