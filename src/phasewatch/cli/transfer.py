"""Commands that collect bundles from many hosts in one store: ship, receive."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phasewatch.cli import common
from phasewatch.cli.options import AsJson
from phasewatch.cli.progress import show_progress
from phasewatch.errors import UsageError
from phasewatch.types import BundleStatus

if TYPE_CHECKING:
    import httpx

    from phasewatch.transfer.shipper import BundleShipper, ShipmentSummary

__all__ = ["receive", "ship"]

# `phasewatch.transfer.receiver`, `server` and `admission` are imported in `receive`: they need the extra `serve`.


def ship(
    outbox: Annotated[Path, typer.Option(help="Folder that a recorder writes to.")],
    to: Annotated[str, typer.Option(help="URL of the receiver.")],
    tokens: Annotated[
        Path, typer.Option(envvar="PHASEWATCH_TOKENS", help="File of mode 600 with a line `host_id: token` per host.")
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Keep shipping new bundles until Ctrl-C.")] = False,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Number of parallel uploads.")] = 4,
    give_up_after: Annotated[
        float, typer.Option(min=0, help="Without --watch: stop after so many seconds without success; 0: never.")
    ] = 300.0,
    ca: Annotated[
        Path | None, typer.Option(help="PEM certificate of the receiver, if it is not publicly signed.")
    ] = None,
    plain_http: Annotated[
        bool,
        typer.Option("--plain-http", help="Allow http:// to another machine; the token can be read on the network."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send recorded bundles to a receiver.

    Acknowledged bundles move to sent/, permanently rejected ones to refused/. Exit code 3 if a host was blocked;
    otherwise 5 if bundles are left (never with --watch); otherwise 1 if bundles were refused.

    Example: phasewatch ship --outbox outbox --to https://store.example:8470 --tokens tokens.txt
    """
    import asyncio

    from phasewatch.transfer.auth import read_tokens
    from phasewatch.transfer.shipper import BundleShipper

    client = _build_client(to, ca=ca, plain_http=plain_http)
    with show_progress(quiet=as_json) as progress:
        known = {token.host_id: token.plain for token in read_tokens(tokens) if token.plain is not None}
        shipper = BundleShipper(
            outbox,
            client,
            known,
            parallel=parallel,
            patience_s=0.0 if watch else give_up_after,
            progress=progress,
        )
        shipped = asyncio.run(_run_shipper(shipper, client, watch=watch))
    lines = [f"refused: {path}: {reason}" for path, reason in shipped.refused]
    lines += [f"blocked: {host_id}: {reason}" for host_id, reason in shipped.blocked.items()]
    lines += [f"not a bundle: {path}" for path in shipped.strange]
    lines += [f"left: {len(shipped.left)} bundles; {shipped.last_trouble}".rstrip("; ")] if shipped.left else []
    lines += [f"{shipped.sent} bundles sent ({shipped.sent_bytes:,} bytes), {len(shipped.refused)} refused"]
    common.print_result(asdict(shipped) | {"outbox": str(outbox)}, as_json=as_json, lines=[*lines, str(outbox)])
    if shipped.blocked:
        raise typer.Exit(3)
    if shipped.left and not watch:
        raise typer.Exit(5)
    if shipped.refused:
        raise typer.Exit(1)


async def _run_shipper(shipper: BundleShipper, client: httpx.AsyncClient, *, watch: bool) -> ShipmentSummary:
    """Run until the outbox is empty, or with `watch` until SIGINT or SIGTERM."""
    import asyncio

    loop = asyncio.get_running_loop()
    async with client:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, shipper.stop)
        try:
            return await shipper.run(watch=watch)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _build_client(to: str, *, ca: Path | None, plain_http: bool) -> httpx.AsyncClient:
    """Build the HTTP client for a receiver.

    Raises:
        UsageError: If the URL is not valid, or a token would cross a network in clear text.
    """
    import ssl

    import httpx

    from phasewatch.http_client import is_clear_text, make_http_client
    from phasewatch.transfer.shipper import HTTP_TIMEOUT

    try:
        url = httpx.URL(to)
    except httpx.InvalidURL as exc:
        raise UsageError(f"--to {to}: {exc}; a URL such as https://store.example:8470 is needed") from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"--to {to}: a URL such as https://store.example:8470 is needed")
    if is_clear_text(to) and not plain_http:
        raise UsageError(
            f"--to {to}: the token would cross the network in clear text; use https://, or --plain-http in a trusted "
            "network"
        )
    try:
        verify = ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ValueError) as exc:
        raise UsageError(f"--ca {ca}: {exc}; a readable PEM file is needed") from exc
    return make_http_client(base_url=to, verify=verify, timeout=HTTP_TIMEOUT)


def receive(
    tokens: Annotated[Path, typer.Option(help="File of mode 600 with a line `host_id: token` per host.")],
    store: Annotated[str, typer.Option(help="Store for the bundles: a folder or s3://bucket/prefix.")] = "",
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:8470",
    hash_tokens: Annotated[
        bool, typer.Option("--hash-tokens", help="Only print the token file with hashes in place of tokens.")
    ] = False,
    cert: Annotated[Path | None, typer.Option(help="PEM certificate for TLS.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A proxy on this machine ends TLS and names the client.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Validate arrivals and store the result with them.")] = False,
    refuse: Annotated[
        str, typer.Option(help="With --check: refuse this status or worse (rejected, errored); default: store all.")
    ] = "",
    quota: Annotated[
        str, typer.Option(help="New bytes per host in 24 h, such as 2GiB; a bundle is at least 8 KiB. 0: no limit.")
    ] = "0",
    quota_bundles: Annotated[int, typer.Option(min=0, help="New bundles per host in 24 h; 0: no limit.")] = 100_000,
    min_free: Annotated[str, typer.Option(help="Free space to keep on the store's disk.")] = "512MiB",
    in_flight: Annotated[int, typer.Option(min=1, help="Parallel uploads; one host may use an eighth of them.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end.")] = False,
) -> None:
    """Receive bundles from many hosts over HTTP.

    A bundle is acknowledged when it is on the disk. The log is JSON lines on standard error. Ctrl-C ends it.

    Example: phasewatch receive --store my-store --tokens tokens.txt
    """
    from phasewatch.store.base import open_store
    from phasewatch.store.quota import ReceiverLimits
    from phasewatch.transfer.auth import MIN_TOKEN_CHARS, read_tokens, render_hashed_lines

    known = read_tokens(tokens)
    if hash_tokens:
        lines = render_hashed_lines(known)
        common.print_result({"lines": lines}, as_json=as_json, lines=lines)
        return
    if not store:
        raise UsageError("receive needs a --store: a folder, or s3://bucket/prefix")
    from phasewatch.transfer.admission import ArrivalValidator
    from phasewatch.transfer.receiver import BundleReceiver
    from phasewatch.transfer.server import bind_socket, parse_listen_address, serve_receiver

    where = parse_listen_address(listen, cert=cert, key=key, behind_proxy=behind_proxy)
    bounds = ReceiverLimits(
        quota_bytes=_parse_bytes("--quota", quota),
        quota_bundles=quota_bundles,
        min_free_bytes=_parse_bytes("--min-free", min_free),
        in_flight=in_flight,
        in_flight_per_host=max(1, in_flight // 8),
    )
    refused = _parse_refused_statuses(refuse, check=check)
    statuses: Counter[int] = Counter()

    def log_request(record: dict[str, Any]) -> None:
        statuses[record["status"]] += record["method"] == "PUT"
        write_record(record)

    place = open_store(store)
    with _open_request_log() as write_record, place.receiving():
        for token in known:
            if token.plain is not None and len(token.plain) < MIN_TOKEN_CHARS:
                weak = f"the token of {token.host_id} has fewer than {MIN_TOKEN_CHARS} characters and can be guessed"
                write_record({"warning": weak})
        receiver = BundleReceiver(
            place,
            known,
            bounds=bounds,
            log=log_request,
            judge=ArrivalValidator(place) if check else None,
            refuse=refused,
        )
        with bind_socket(where) as bound:
            where = replace(where, port=bound.getsockname()[1])
            write_record({"receiving": where.url, "store": store, "hosts": len({token.host_id for token in known})})
            serve_receiver(receiver, where, bound, bounds)
    counts = {str(status): n for status, n in sorted(statuses.items()) if n}
    other = sum(statuses.values()) - statuses[201] - statuses[200]
    summary = f"{statuses[201]} bundles stored, {statuses[200]} already stored, {other} refused or interrupted"
    common.print_result({"store": store, "url": where.url, "answers": counts}, as_json=as_json, lines=[summary, store])


@contextmanager
def _open_request_log() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the request log on stderr: one JSON object per line, with the time.

    If stderr is closed, full or blocked, lines are lost; the receiver goes on.
    """
    from phasewatch.live.outputs import NonBlockingWriter

    def render(record: dict[str, Any]) -> str:
        return json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **record})

    writer = None
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # closed, or without a file descriptor
            writer = NonBlockingWriter(sys.stderr)

    def write_record(record: dict[str, Any]) -> None:
        with suppress(OSError, ValueError):
            if writer is not None:
                writer.put(render(record))
            elif sys.stderr is not None:
                sys.stderr.write(render(record) + "\n")

    try:
        yield write_record
    finally:
        if writer is not None:
            with suppress(OSError):
                writer.close()


_BYTES_BY_UNIT = {
    "": 1,
    "B": 1,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def _parse_bytes(option: str, text: str) -> int:
    """Parse a size such as ``500MB`` or ``2GiB``.

    Raises:
        UsageError: If it is not a size.
    """
    parts = re.fullmatch(r"(\d{1,15})\s*([A-Za-z]*)", text.strip())
    if parts is None or parts[2].upper() not in _BYTES_BY_UNIT:
        raise UsageError(f"{option} {text}: a size such as 500MB or 2GiB is needed")
    return int(parts[1]) * _BYTES_BY_UNIT[parts[2].upper()]


def _parse_refused_statuses(refuse: str, *, check: bool) -> frozenset[str]:
    common.check_option_pair("--refuse", "--check", is_partner_missing=bool(refuse) and not check)
    if not refuse:
        return frozenset()
    if refuse not in (BundleStatus.REJECTED, BundleStatus.ERRORED):
        raise UsageError(f"--refuse {refuse}: expected rejected or errored")
    order = list(BundleStatus)
    return frozenset(str(status) for status in order[order.index(BundleStatus(refuse)) :])
