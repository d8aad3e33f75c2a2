"""Shippers, a line that is cut and a receiver that is killed, on loopback: every bundle arrives, once and whole."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from phasewatch.artifacts import VALIDATION_FILE
from phasewatch.atomic import is_temporary, write_atomic
from phasewatch.simulate import simulate
from phasewatch.store.local import RECEIPT_SUFFIX, DiskStore
from phasewatch.transfer.receiver import render_content_digest
from phasewatch.transfer.shipper import BundleShipper, ShipmentSummary
from phasewatch.types import build_uuid7
from phasewatch.validate.sweep import sweep

STUCK_S = 30.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Life:
    """A receiver process that comes back on the same port, however often it is killed."""

    def __init__(self, folder: Path, hosts: list[str]) -> None:
        self.store, self.port, self.kills = folder / "store", free_port(), 0
        self.most_bytes = 0
        self._tokens = folder / "tokens"
        self._tokens.touch(mode=0o600)
        self._tokens.write_text("".join(f"{host_id}: token-of-{host_id}-0123456789\n" for host_id in hosts))
        self._process: asyncio.subprocess.Process | None = None

    async def begin(self) -> None:
        command = [
            "-m",
            "phasewatch",
            "receive",
            "--store",
            self.store,
            "--tokens",
            self._tokens,
            "--min-free",
            "0",
            "--listen",
            f"127.0.0.1:{self.port}",
        ]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *map(str, command), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        assert self._process.stderr is not None
        line = await self._process.stderr.readline()
        assert b"receiving" in line, line + await self._process.stderr.read()
        self._drain = asyncio.create_task(self._process.stderr.read())

    def rss_bytes(self) -> int:
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    async def kill(self) -> None:
        assert self._process is not None
        self.most_bytes = max(self.most_bytes, self.rss_bytes())
        self._process.kill()
        await self._process.wait()
        self.kills += 1

    async def end(self) -> None:
        assert self._process is not None
        self.most_bytes = max(self.most_bytes, self.rss_bytes())
        self._process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(self._process.wait(), STUCK_S) == 0


@dataclass
class Line:
    """A proxy that cuts connections after a random number of bytes, in either direction, as long as cuts are wanted."""

    to_port: int
    rng: random.Random
    wanted: int
    cuts: int = 0
    port: int = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = [self.rng.randrange(1, 60_000)] if self.rng.random() < 0.8 and self.cuts < self.wanted else [1 << 60]
        try:
            there, here = await asyncio.open_connection("127.0.0.1", self.to_port)
        except OSError:
            writer.transport.abort()
            return

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, weight: int) -> None:
            while data := await source.read(8192):
                left[0] -= len(data) * weight
                if left[0] <= 0:
                    sink.write(data[: len(data) // 2])
                    self.cuts += 1
                    return
                sink.write(data)
                await sink.drain()

        # An answer has few bytes: weighed more, so that cuts fall between its bytes, too.
        pumps = [asyncio.create_task(pump(reader, here, 1)), asyncio.create_task(pump(there, writer, 50))]
        with suppress(OSError):
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for end in (writer, here):
            end.transport.abort()


class Timed(httpx.AsyncHTTPTransport):
    """Notes how long the longest request took, whatever came of it."""

    longest_s = 0.0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        began_s = time.monotonic()
        try:
            return await super().handle_async_request(request)
        finally:
            Timed.longest_s = max(Timed.longest_s, time.monotonic() - began_s)


async def soon(seconds: float) -> None:
    await asyncio.sleep(min(seconds, 0.2))


async def ship(outbox: Path, host_id: str, port: int, parallel: int = 2) -> ShipmentSummary:
    limits = httpx.Limits(max_keepalive_connections=parallel)
    async with httpx.AsyncClient(
        transport=Timed(limits=limits), base_url=f"http://127.0.0.1:{port}", timeout=httpx.Timeout(STUCK_S)
    ) as client:
        tokens = {host_id: f"token-of-{host_id}-0123456789"}
        return await BundleShipper(outbox, client, tokens, parallel=parallel, sleep=soon).run()


def fill(outbox: Path, host_id: str, rng: random.Random, count: int, truth: dict[str, str]) -> None:
    for _ in range(count):
        data = rng.randbytes(rng.randrange(1, 40_000))
        episode_id = build_uuid7(rng.randrange(1 << 47), rng.randbytes(10))
        DiskStore(outbox, durable=False).put(host_id, episode_id, data)
        truth[f"{host_id}/{episode_id}.tar.zst"] = sha256(data).hexdigest()


async def storm(folder: Path, *, shippers: int, cuts: int, kills: int, each: int) -> dict[str, object]:
    """Ship until so many connections were cut and so many receivers killed, then until all is acknowledged."""
    rng = random.Random(7)
    hosts = [f"host-{n:02d}" for n in range(shippers)]
    life, truth = Life(folder, hosts), dict[str, str]()
    line = Line(life.port, rng, cuts)
    Timed.longest_s = 0.0
    began_s = time.monotonic()

    async def killer() -> None:
        while life.kills < kills:
            await asyncio.sleep(rng.uniform(0.05, 0.6))
            await life.kill()
            await life.begin()

    async def sender(host_id: str, killing: asyncio.Task[None]) -> None:
        outbox = folder / "outboxes" / host_id
        while True:
            is_last = killing.done() and line.cuts >= cuts
            fill(outbox, host_id, rng, each, truth)
            done = await ship(outbox, host_id, line.port)
            assert (done.left, done.refused, done.blocked) == ([], [], {})
            if is_last:
                return

    await life.begin()
    async with line.open():
        killing = asyncio.create_task(killer())
        await asyncio.gather(*(sender(host_id, killing) for host_id in hosts), killing)
    await life.end()
    with DiskStore(life.store).receiving():
        pass  # a restart's cleaning
    found = {item.path: item for item in DiskStore(life.store).walk()}
    left = [p for p in life.store.rglob("*") if is_temporary(p.name)]
    lost = [path for path in truth if path not in found]
    corrupt = [
        path
        for path, item in found.items()
        if item.receipt != truth.get(path) or digest_of(life.store / path) != truth.get(path)
    ]
    assert (lost, corrupt, left) == ([], [], [])
    assert Timed.longest_s <= STUCK_S
    return {
        "shippers": shippers,
        "bundles": len(truth),
        "cuts": line.cuts,
        "kills": life.kills,
        "lost": len(lost),
        "corrupt": len(corrupt),
        "left behind": len(left),
        "longest request, s": round(Timed.longest_s, 1),
        "largest receiver, MiB": life.most_bytes >> 20,
        "seconds": round(time.monotonic() - began_s),
    }


def digest_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_through_cuts_and_kills_every_bundle_arrives_once_and_whole(tmp_path: Path) -> None:
    told = asyncio.run(asyncio.wait_for(storm(tmp_path, shippers=4, cuts=50, kills=5, each=4), 120))

    assert (told["kills"], int(str(told["cuts"])) >= 50) == (5, True)


@pytest.mark.soak
def test_through_thousands_of_cuts_and_a_hundred_kills_every_bundle_arrives(
    tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    told = asyncio.run(asyncio.wait_for(storm(tmp_path, shippers=16, cuts=2000, kills=100, each=8), 1500))

    soak_row("Receiver storm", **told)
    assert (told["kills"], int(str(told["cuts"])) >= 2000) == (100, True)


@pytest.mark.soak
def test_a_store_filled_through_kills_validates_to_the_same_bytes_as_what_was_recorded(
    tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    made = simulate(tmp_path / "recorded", hosts=3, episodes=150, seed=4, faults=0.1, between_s=(60, 90)).store
    hosts = sorted(p.name for p in made.iterdir() if p.is_dir())
    recorded = sweep(made, tmp_path / "before", workers=2)

    async def run() -> Life:
        life = Life(tmp_path, hosts)
        await life.begin()
        outboxes = {host_id: tmp_path / "outboxes" / host_id for host_id in hosts}
        rng = random.Random(1)

        async def feed(host_id: str) -> int:
            sent = 0
            outbox = outboxes[host_id] / host_id
            outbox.mkdir(parents=True)
            for path in sorted((made / host_id).glob("*.tar.zst"), key=lambda p: p.name):
                for name in (
                    path.name + RECEIPT_SUFFIX,
                    path.name,
                ):  # with its receipt first, so that none is shipped without
                    if (path.parent / name).exists():
                        os.link(path.parent / name, outbox / name)
                if rng.random() < 0.4:
                    sent += (await ship(outboxes[host_id], host_id, life.port)).sent
                    await asyncio.sleep(0.6)
            return sent + (await ship(outboxes[host_id], host_id, life.port)).sent

        async def killer() -> None:
            while True:
                await asyncio.sleep(2)
                await life.kill()
                await life.begin()

        killing = asyncio.create_task(killer())
        feeding = [asyncio.create_task(feed(host_id)) for host_id in hosts]
        await asyncio.wait(feeding)
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
        assert sum(task.result() for task in feeding) > 100
        return life

    life = asyncio.run(asyncio.wait_for(run(), 600))
    # repr, because a NaN is not equal to itself. What the outbox itself refuses (a receipt that disowns its bundle)
    # is not sent; the rest is the same to the byte.
    refused = {
        p.relative_to(tmp_path / "outboxes").parts[0] + "/" + p.name
        for p in (tmp_path / "outboxes").rglob("refused/*/*.tar.zst")
    }
    for path in refused:
        write_atomic(life.store / path, (made / path).read_bytes())
        write_atomic(life.store / f"{path}.sha256", (made / f"{path}.sha256").read_bytes())
    received = sweep(life.store, tmp_path / "after", workers=2)
    unlike = [
        (a, b)
        for a, b in zip(recorded.verdicts, received.verdicts, strict=True)
        if repr(a) != repr(b) and set(a.reasons) - set(b.reasons) != {"no-receipt"}
    ]
    assert life.kills >= 5
    assert unlike == []
    assert (tmp_path / "before" / "grids" / "grids.npy").read_bytes() == (
        tmp_path / "after" / "grids" / "grids.npy"
    ).read_bytes()
    assert (tmp_path / "after" / VALIDATION_FILE).is_file()
    soak_row(
        "Killed every two seconds, then validated",
        shippers=3,
        recorded=len(recorded.verdicts),
        **{
            "refused by the outbox": len(refused),
            "received": len(received.verdicts) - len(refused),
            "kills": life.kills,
            "verdicts unlike the recorded store's": len(unlike),
        },
    )


@pytest.mark.soak
def test_durable_bundles_per_second_against_a_bare_loop_and_memory_that_stays_flat(
    tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    """Turn by turn, since a disk's fsync costs now this, now that: the bare loop writes what the receiver writes."""
    data, rounds, each = os.urandom(40_000), 5, 400
    line = ("x" * 64 + "  name\n").encode()
    hosts = [f"host-{n:02d}" for n in range(16)]

    def bare(folder: Path) -> float:
        folder.mkdir()
        began_s = time.perf_counter()
        for number in range(each):
            write_atomic(folder / f"{number}", data)
            write_atomic(folder / f"{number}.sha256", line)
        return each / (time.perf_counter() - began_s)

    async def send(port: int, host_id: str, numbers: range) -> None:
        digest = render_content_digest(sha256(data).hexdigest())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            episode_id = build_uuid7(number, host_id.encode().ljust(10))
            head = (
                f"PUT /v1/episodes/{host_id}/{episode_id} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
                f"Authorization: Bearer token-of-{host_id}-0123456789\r\nContent-Digest: {digest}\r\n\r\n"
            )
            writer.write(head.encode() + data)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 201"), answer
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", answer)[1]))  # type: ignore[index]
        writer.close()

    async def measure() -> tuple[list[float], list[float], list[int]]:
        life = Life(tmp_path, hosts)
        await life.begin()
        received, loops, sizes = [], [], []
        for turn in range(rounds):
            loops.append(bare(tmp_path / f"bare-{turn}"))
            began_s = time.perf_counter()
            numbers = range(turn * 1000, turn * 1000 + each // len(hosts))
            await asyncio.gather(*(send(life.port, host_id, numbers) for host_id in hosts))
            received.append(each / (time.perf_counter() - began_s))
            sizes.append(life.rss_bytes())
        await life.end()
        return received, loops, sizes

    received, loops, sizes = asyncio.run(measure())
    ratio = statistics.median(r / b for r, b in zip(received, loops, strict=True))
    soak_row(
        "Durable bundles",
        bundles=rounds * each,
        **{
            "received, 1/s": round(statistics.median(received)),
            "bare loop, 1/s": round(statistics.median(loops)),
            "ratio, median of 5 turns": round(ratio, 2),
            "RSS after 400, MiB": sizes[0] >> 20,
            "RSS at the end, MiB": sizes[-1] >> 20,
        },
    )
    assert ratio >= 0.5
    assert sizes[-1] <= sizes[0] * 1.1 + (4 << 20)
