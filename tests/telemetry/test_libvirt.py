"""libvirt's statistics: what they become, one bulk call a tick for all domains, and a daemon that hangs or goes."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.factories.libvirt import UUID, VALUES, FakeDaemon
from tests.factories.vms import FakeClock

from phasewatch.channels import CHANNELS, build_channel_mask, list_raw_fields
from phasewatch.errors import VmError
from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.libvirt import (
    LIBVIRT_BLOCK_FIELDS,
    SHARD_DOMAINS,
    DomainBlockSource,
    DomainNetworkSource,
    LibvirtDomain,
    parse_balloon,
    parse_disks,
    parse_network,
    parse_state,
)
from phasewatch.telemetry.libvirt_client import load_libvirt_binding
from phasewatch.types import SourceKind

TICK_NS = 500_000_000
UNKNOWN = build_missing_reading(SourceKind.QMP)


def fields_of(values: ReadingValues, source: SourceKind = SourceKind.QMP) -> dict[str, Any]:
    """Return the known fields of a reading."""
    names = (spec.field for spec in list_raw_fields(source))
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


async def read_next(source: DomainBlockSource | DomainNetworkSource, clock: FakeClock) -> ReadingValues:
    clock.now_ns += TICK_NS
    return await source.read()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def test_block_and_balloon_counters_become_the_raw_fields_of_the_monitor() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        source = DomainBlockSource(await daemon.hypervisor(clock).add_domain(UUID))

        assert fields_of(await source.read()) == {
            "blk_rd_bytes": 5632,
            "blk_wr_bytes": 2048,
            "blk_rd_ops": 3,
            "blk_wr_ops": 4,
            "blk_flush_ops": 2,
            "blk_wr_ns": 21,
            "blk_rd_ns": 12,
            "blk_flush_ns": 6,
            "bal_minor_faults": 1455,
            "bal_free_bytes": 33064 * 1024,
            "bal_cache_bytes": 3456 * 1024,
        }
        again = fields_of(await read_next(source, clock))
        assert set(again) == LIBVIRT_BLOCK_FIELDS  # the guest has not reported again

    run(main())


def test_the_channel_set_libvirt_is_what_a_plain_domain_has() -> None:
    named = {c.full_name for c, is_in in zip(CHANNELS, build_channel_mask("libvirt"), strict=True) if is_in}
    block = {c.full_name for c in CHANNELS if c.source is SourceKind.QMP and set(c.fields) <= LIBVIRT_BLOCK_FIELDS}
    base = {c.full_name for c in CHANNELS if c.in_deployment and str(c.group) == "base"}

    assert {name for name in named if name.startswith("qmp.")} == block & base


def test_network_counters_are_seen_from_the_guest() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        source = DomainNetworkSource(await daemon.hypervisor(clock).add_domain(UUID))
        await source.open()

        assert fields_of(await source.read(), SourceKind.NETFLOW) == {
            "out_pkts": 5,
            "out_bytes": 500,
            "in_pkts": 7,
            "in_bytes": 900,
        }

    run(main())


@pytest.mark.parametrize(
    ("values", "disks"),
    [
        pytest.param({}, {}, id="no disk"),
        pytest.param({"block.count": 1, "block.0.name": "vda"}, None, id="not asked"),
        pytest.param({"block.count": -3}, {}, id="negative count"),
        pytest.param({"block.count": "many"}, {}, id="a text"),
        pytest.param({"block.count": 1 << 40}, None, id="endless"),
        pytest.param(VALUES | {"block.0.rd.bytes": 1 << 64}, None, id="beyond int64"),
        pytest.param(
            VALUES | {"block.count": 2, "block.1.name": "sda"},
            {(0, "vda"): (5632, 2048, 3, 4, 2, 21, 12, 6)},
            id="an empty drive",
        ),
    ],
)
def test_disks_that_were_not_asked_are_unknown_and_not_zero(values: dict[str, Any], disks: Any) -> None:
    assert parse_disks(values) == disks


def test_a_card_without_counters_makes_the_whole_network_unknown() -> None:
    assert parse_network(VALUES | {"net.count": 2}) is None
    assert parse_network({}) == {}


@pytest.mark.parametrize("values", [{}, {"balloon.last-update": 0, "balloon.unused": 5}])
def test_a_guest_that_never_reported_has_no_balloon_fields(values: dict[str, Any]) -> None:
    assert parse_balloon(values) is None


@pytest.mark.parametrize(("number", "state"), [(1, "running"), (3, "paused"), (7, "suspended"), (99, "unknown")])
def test_states_are_named_as_the_monitor_names_them(number: int, state: str) -> None:
    assert parse_state({"state.state": number}) == state


def test_a_disk_that_goes_starts_the_sum_again() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        second = {key.replace(".0.", ".1."): value for key, value in VALUES.items() if key.startswith("block.0.")}
        daemon.domains[UUID] = ("made-up", VALUES | second | {"block.count": 2})
        source = DomainBlockSource(await daemon.hypervisor(clock).add_domain(UUID))

        before = fields_of(await source.read())["blk_rd_bytes"]
        daemon.set(block_count=1)
        after = fields_of(await read_next(source, clock))["blk_rd_bytes"]

        assert (before, after) == (2 * 5632, 0)

    run(main())


def test_all_sources_of_one_tick_share_one_bulk_call() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        other = UUID.replace("9a25", "0000")
        daemon.domains[other] = ("a\n'\"ü", dict(VALUES))
        hypervisor = daemon.hypervisor(clock)
        domains = [await hypervisor.add_domain(UUID), await hypervisor.add_domain(other.upper())]
        daemon.calls.clear()

        clock.now_ns += TICK_NS
        sources = [kind(domain) for domain in domains for kind in (DomainNetworkSource, DomainBlockSource)]
        readings = await asyncio.gather(*(source.read() for source in sources))

        assert daemon.calls == [(UUID, other)]
        assert all(fields_of(values, source.source) for values, source in zip(readings, sources, strict=True))

    run(main())


def test_many_domains_are_spread_over_several_connections_which_close_with_the_last() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        uuids = [f"{number:08x}{UUID[8:]}" for number in range(SHARD_DOMAINS + 1)]
        daemon.domains = {uuid: ("same name", dict(VALUES)) for uuid in uuids}
        hypervisor = daemon.hypervisor(clock)
        domains = [await hypervisor.add_domain(uuid) for uuid in uuids]
        daemon.calls.clear()

        clock.now_ns += TICK_NS
        stats = [await domain.read() for domain in domains]

        assert [each and each.uuid for each in stats] == uuids
        assert [len(call) for call in daemon.calls] == [SHARD_DOMAINS, 1]
        for domain in domains:
            await domain.close()
        await wait_for(lambda: daemon.closed == 2)

    run(main())


async def wait_for(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_an_unknown_domain_and_a_daemon_that_is_down_are_errors_that_leave_nothing_open() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        with pytest.raises(VmError, match="no running domain"):
            await daemon.hypervisor(clock).add_domain(UUID.replace("9a25", "0000"))
        await wait_for(lambda: daemon.closed == 1)
        daemon.is_down = True
        with pytest.raises(VmError, match="connection refused"):
            await daemon.hypervisor(clock).add_domain(UUID)

    run(main())


def test_a_daemon_that_restarts_is_reported_once_and_read_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        domain = await daemon.hypervisor(clock).add_domain(UUID)
        source = DomainBlockSource(domain)
        await source.read()

        daemon.is_down = True
        missing = [await read_next(source, clock) for _ in range(20)]
        daemon.is_down = False
        attempts = daemon.opened
        readings = [await read_next(source, clock) for _ in range(70)]

        assert missing == [UNKNOWN] * 20
        assert domain.state == "running"
        assert daemon.opened == attempts + 1
        assert fields_of(readings[-1])
        assert source.lost["libvirt without an answer"] == sum(values == UNKNOWN for values in missing + readings)

    run(main())
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_daemon_that_hangs_costs_readings_and_few_threads_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        domain = await daemon.hypervisor(clock).add_domain(UUID)
        source = DomainBlockSource(domain)

        daemon.hangs = hanging = threading.Event()
        assert await read_next(source, clock) == UNKNOWN
        clock.now_ns += 1_900_000_000
        assert await source.read() == UNKNOWN  # the call is outstanding, and no other is made
        assert len(daemon.calls) == 2
        daemon.hangs = None  # a new connection is answered, as when one QEMU alone hangs
        assert fields_of(await read_next(source, clock))
        assert daemon.opened == 2
        hanging.set()
        await wait_for(lambda: daemon.closed == 1)

        assert domain.state == "running"

    run(main())
    assert [record.levelname for record in caplog.records] in (["WARNING"], ["WARNING", "INFO"])


def test_calls_that_hang_are_limited() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        source = DomainBlockSource(await daemon.hypervisor(clock).add_domain(UUID))
        daemon.hangs = hanging = threading.Event()
        calls = len(daemon.calls)
        for _ in range(8):
            clock.now_ns += 3_000_000_000
            await source.read()

        assert len(daemon.calls) - calls == 5
        hanging.set()

    run(main())


def test_a_reset_is_counted_also_after_a_reconnection() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        domain = await daemon.hypervisor(clock).add_domain(UUID)
        daemon.resets[UUID] = 3
        clock.now_ns += TICK_NS
        await domain.read()
        daemon.is_down = True
        clock.now_ns += TICK_NS
        await domain.read()
        daemon.is_down, daemon.resets[UUID] = False, 1
        clock.now_ns += 4 * TICK_NS
        await domain.read()

        assert domain.resets == 4

    run(main())


def test_a_monitor_that_another_client_uses_is_reported_once() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        source = DomainBlockSource(await daemon.hypervisor(clock).add_domain(UUID))
        await source.read()
        daemon.hide_disks()
        for _ in range(10):
            assert not LIBVIRT_BLOCK_FIELDS & fields_of(await read_next(source, clock)).keys()

        assert source.lost == {"libvirt while its monitor was used": 10}
        assert len(source.pop_notes()) == 1
        assert source.pop_notes() == []

    run(main())


def test_a_domain_that_is_gone_is_silent() -> None:
    async def main() -> None:
        daemon, clock = FakeDaemon(), FakeClock()
        domain: LibvirtDomain = await daemon.hypervisor(clock).add_domain(UUID)
        daemon.domains.clear()
        for _ in range(4):
            clock.now_ns += TICK_NS
            assert await domain.read() is None

        assert domain.state == "silent"

    run(main())


def test_a_missing_binding_names_the_package_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)

    with pytest.raises(VmError, match="python3-libvirt"):
        load_libvirt_binding(tmp_path)
