"""The four writers whose every system call is made to fail: receiver, shipper, sweep with features, trained cells."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
from tests.factories.bundles import episode
from tests.factories.receivers import IDS, TOKENS, Desk
from tests.factories.stores import put
from tests.factories.synthetic_runs import World, write_run

from phasewatch import atomic
from phasewatch.dataset import write_splits
from phasewatch.parallel.pool import ItemResult
from phasewatch.pipeline import stages
from phasewatch.store.local import DiskStore, render_receipt
from phasewatch.training.experiment import Experiment
from phasewatch.training.train import train_experiments
from phasewatch.transfer.admission import AdmissionVerdict, BundleArrival
from phasewatch.transfer.shipper import BundleShipper
from phasewatch.validate import sweep as validate

BUNDLES = {IDS[n]: bytes([n]) * size for n, size in enumerate((1000, 300_000, 5))}


def digests(folder: Path) -> dict[str, str]:
    """Digest every product; hidden files are a writer's own notes."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if atomic.is_temporary(path.name)]


@dataclass
class Work:
    """One writer at work in a folder of its own.

    Attributes:
        do: What is disturbed, and done again after a restart. It may raise what the disk raised.
        check: Whether what stands after the fault, before anything is done again, breaks no promise.
    """

    folder: Path
    do: Callable[[], None]
    check: Callable[[], None] = lambda: None


def receiver(folder: Path) -> Work:
    """A shipper that sends three bundles, one of them twice, to a receiver with a judge."""
    acknowledged: set[str] = set()
    store = folder / "store"

    def judge(arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
        return (AdmissionVerdict(status="accepted", reasons=(), detail=str(len(a.data))) for a in arrivals)

    def do() -> None:
        atomic.make_folder(store)
        with DiskStore(store).receiving():
            desk = Desk(DiskStoreThatIsHeld(store), judge=judge)
            for number in (0, 1, 1, 2):
                data = BUNDLES[IDS[number]]
                if desk.put(data, number).status_code in (200, 201):
                    acknowledged.add(IDS[number])

    def check() -> None:
        if store.is_dir():
            for item in DiskStore(store).walk():
                assert item.is_missing is False, f"{item.path}: a receipt without its bundle"
                assert DiskStore(store).read(item) == BUNDLES[str(item.episode_id)], f"{item.path} is torn"
        there = {item.episode_id: item.receipt for item in DiskStore(store).walk()} if acknowledged else {}
        for name in acknowledged:
            assert there.get(name) == sha256(BUNDLES[name]).hexdigest(), f"{name} was acknowledged and is lost"  # type: ignore[call-overload]

    return Work(folder, do, check)


class DiskStoreThatIsHeld(DiskStore):
    """A store that is held by the test itself."""

    def receiving(self):  # type: ignore[no-untyped-def]
        from contextlib import nullcontext

        return nullcontext()


def shipper(folder: Path) -> Work:
    """A shipper whose receiver takes two bundles and refuses a third."""
    outbox, poisoned = folder / "outbox", IDS[2]
    for name, data in BUNDLES.items():
        DiskStore(outbox).put("pc-a", name, data)
    kept: dict[str, bytes] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        name, data = request.url.path.rpartition("/")[2], request.read()
        if request.method == "PUT" and name != poisoned:
            kept[name] = data
        if name not in kept:
            status, text = (422, b'{"detail": "hostile"}') if request.method == "PUT" else (404, b"")
            return httpx.Response(status, stream=httpx.ByteStream(text))
        line = render_receipt(sha256(kept[name]).hexdigest(), f"{name}.tar.zst")
        return httpx.Response(201, stream=httpx.ByteStream(line))

    async def no_sleep(seconds: float) -> None:
        await asyncio.sleep(0)

    def do() -> None:
        async def run() -> None:
            async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
                shipper = BundleShipper(outbox, client, TOKENS, parallel=1, sleep=no_sleep, rng=random.Random(0))
                with suppress(BaseExceptionGroup):  # what a disk raised inside a task
                    await shipper.run()

        asyncio.run(run())

    def check() -> None:
        for name, data in BUNDLES.items():
            places = [
                folder for folder in ("", "sent", "refused") if (outbox / folder / "pc-a" / f"{name}.tar.zst").exists()
            ]
            assert len(places) == 1, f"{name} is in {places}"
            assert (outbox / places[0] / "pc-a" / f"{name}.tar.zst").read_bytes() == data
            assert places != ["sent"] or name in kept, f"{name} left the outbox unacknowledged"

    return Work(folder, do, check)


def sweep(folder: Path) -> Work:
    """A sweep of four episodes and their feature tables, over the products of an earlier sweep of three."""
    store, run = folder / "store", folder / "run"
    put(store, episode(number=1))
    settings = stages.RunSettings(store=store, run=run, workers=1)

    def in_turn(fn: Callable[[Any], Any], items: Iterable[Any], **_: object) -> Iterator[ItemResult[Any]]:
        """Read here: a worker process only reads, and the writer is this one."""
        return (ItemResult(index=i, value=fn(item), error=None) for i, item in enumerate(items))

    def do() -> None:
        validate.sweep(store, run, workers=1, mapper=in_turn, part=1)
        stages.build_features(settings)

    do()
    put(store, episode(number=2, host_id="h2"))
    return Work(folder, do)


def cells(folder: Path) -> Work:
    """Two trained cells: checkpoints, their predictions, and the run's."""
    run = folder / "run"
    shutil.copytree(cells.prepared, run)  # type: ignore[attr-defined]
    grid = [
        Experiment(recipe="held_out_host", fold="host-0", threat="realistic", model=model)
        for model in ("majority", "elapsed_time")
    ]

    def do() -> None:
        atomic.sweep_temporaries(run)
        train_experiments(run, grid, workers=1)

    return Work(folder, do)


def prepare_cells(folder: Path) -> None:
    """Build the run whose cells are trained, once."""
    run = write_run(folder / "prepared", World(windows=8))
    write_splits(run, "held_out_host")
    cells.prepared = run  # type: ignore[attr-defined]


WORLDS = {"receiver": receiver, "shipper": shipper, "sweep": sweep, "cells": cells}


__all__ = ["BUNDLES", "WORLDS", "Work", "digests", "prepare_cells", "temporaries"]
