"""Commands that bring bundles from many hosts into one store: receive, ship."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from phasewatch.cli import common

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

    from phasewatch.progress import Progress
    from phasewatch.store.quota import ReceiverLimits
    from phasewatch.transfer.shipper import ShipmentSummary


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (receive, ship):
        app.command(epilog=common.EXIT_CODES_HELP)(command)


def receive(
    store: str = typer.Option("", help="A folder, or s3://bucket/prefix."),
    listen: str = typer.Option("127.0.0.1:8470", help="HOST:PORT; port 0 takes a free one."),
    tokens: Path = typer.Option(..., help="A file of mode 600 with a line `host_id: token` a host."),
    hash_tokens: bool = typer.Option(False, help="Only print the file's lines with each token's hash in its place."),
    cert: Path = typer.Option(None, help="PEM certificate: serve TLS."),
    key: Path = typer.Option(None, help="PEM key of the certificate."),
    behind_proxy: bool = typer.Option(False, help="A proxy on this machine ends TLS and names the client."),
    check: bool = typer.Option(False, help="Run the gates on arrival and write what they say beside each bundle."),
    refuse: str = typer.Option(
        "",
        help="With --check: do not store bundles of this status or worse (rejected, errored); otherwise they are kept as evidence.",
    ),
    quota: str = typer.Option(
        "0", help="New bytes of one host in 24 hours, such as 2GiB; a bundle counts as 8 KiB at least. 0 sets no bound."
    ),
    quota_bundles: int = typer.Option(100_000, min=0, help="New bundles of one host in 24 hours; 0 sets no bound."),
    floor: str = typer.Option("512MiB", help="Free space on the store's disk that uploads never use up."),
    in_flight: int = typer.Option(64, min=1, help="Uploads at a time; an eighth of them of one host."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document when it ends."),
) -> None:
    """Receive bundles from many hosts over HTTP; what is acknowledged is on the disk. Ctrl-C ends it in order.

    Example: phasewatch receive --store my-store --tokens tokens.txt --listen 127.0.0.1:8470
    """
    from collections import Counter

    from phasewatch.errors import UsageError
    from phasewatch.store.base import open_store
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
    bounds = _build_limits(quota=quota, quota_bundles=quota_bundles, floor=floor, in_flight=in_flight)
    refused = _parse_refused_statuses(refuse, check=check)
    statuses: Counter[int] = Counter()

    def log(record: dict[str, Any]) -> None:
        statuses[record["status"]] += record["method"] == "PUT"
        say(record)

    place = open_store(store)
    with _open_log() as say, place.receiving():
        for token in known:
            if token.plain is not None and len(token.plain) < MIN_TOKEN_CHARS:
                weak = f"the token of {token.host_id} is shorter than {MIN_TOKEN_CHARS} characters and can be guessed"
                say({"warning": weak})
        receiver = BundleReceiver(
            place, known, bounds=bounds, log=log, judge=ArrivalValidator(place) if check else None, refuse=refused
        )  # fmt: skip
        with bind_socket(where) as bound:
            address = bound.getsockname()
            from dataclasses import replace

            where = replace(where, port=address[1])
            say({"receiving": where.url, "store": store, "hosts": len({token.host_id for token in known})})
            serve_receiver(receiver, where, bound, bounds)
    counts = {str(status): n for status, n in sorted(statuses.items()) if n}
    words = f"{statuses[201]} bundles stored, {statuses[200]} came again, {sum(statuses.values()) - statuses[201] - statuses[200]} refused or cut"
    common.print_result({"store": store, "url": where.url, "answers": counts}, as_json=as_json, lines=[words, store])


def ship(
    outbox: Path = typer.Option(..., help="The folder that a recorder writes to."),
    to: str = typer.Option(..., help="The receiver's URL."),
    tokens: Path = typer.Option(
        ...,
        envvar="PHASEWATCH_TOKENS",
        help="A file of mode 600 with a line `host_id: token` for each host in the outbox.",
    ),
    watch: bool = typer.Option(False, help="Go on with what a recorder writes, until Ctrl-C."),
    parallel: int = typer.Option(4, min=1, max=64, help="Uploads at a time."),
    patience: float = typer.Option(
        300.0, min=0, help="Without --watch: give up when nothing was taken for so many seconds; 0 never does."
    ),
    ca: Path = typer.Option(None, help="PEM certificate of the receiver, where no public authority vouches for it."),
    plain_http: bool = typer.Option(False, help="Send the token in the clear to another machine."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document when it ends."),
) -> None:
    """Ship an outbox to a receiver; a bundle moves to sent/ when its receipt is there, a poisoned one to refused/.

    Example: phasewatch ship --outbox outbox --to https://store.example:8470 --tokens tokens.txt --watch
    """
    import asyncio
    from dataclasses import asdict

    from phasewatch.pipeline.stages import CallbackProgress

    with common.show_progress(quiet=as_json) as tell:
        shipped: ShipmentSummary = asyncio.run(
            _run_shipper(outbox, _build_client(to, ca=ca, plain_http=plain_http), tokens, watch=watch, parallel=parallel,
                  patience_s=0.0 if watch else patience, progress=CallbackProgress(tell))
        )  # fmt: skip
    lines = [f"refused: {path}: {why}" for path, why in shipped.refused]
    lines += [f"blocked: {host_id}: {why}" for host_id, why in shipped.blocked.items()]
    lines += [f"no bundle: {path}" for path in shipped.strange]
    lines += [f"left: {len(shipped.left)} bundles; {shipped.last_trouble}".rstrip("; ")] if shipped.left else []
    lines += [f"{shipped.sent} bundles sent ({shipped.sent_bytes:,} bytes), {len(shipped.refused)} refused"]
    common.print_result(asdict(shipped) | {"outbox": str(outbox)}, as_json=as_json, lines=[*lines, str(outbox)])
    if shipped.blocked:
        raise typer.Exit(3)
    if shipped.left and not watch:
        raise typer.Exit(5)
    if shipped.refused:
        raise typer.Exit(1)


async def _run_shipper(
    outbox: Path,
    client: httpx.AsyncClient,
    tokens: Path,
    *,
    watch: bool,
    parallel: int,
    patience_s: float,
    progress: Progress,
) -> ShipmentSummary:
    import asyncio
    import signal

    from phasewatch.transfer.auth import read_tokens
    from phasewatch.transfer.shipper import BundleShipper

    known = {token.host_id: token.plain for token in read_tokens(tokens) if token.plain is not None}
    async with client:
        shipper = BundleShipper(outbox, client, known, parallel=parallel, patience_s=patience_s, progress=progress)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, shipper.stop)
        try:
            return await shipper.run(watch=watch)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _build_client(to: str, *, ca: Path | None, plain_http: bool) -> httpx.AsyncClient:
    """Make the client of a receiver.

    Raises:
        UsageError: If the URL is none, or a token would cross a network in the clear.
    """
    import ssl

    import httpx

    from phasewatch.errors import UsageError
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
            f"--to {to}: the token would cross the network in the clear; use https://, or --plain-http where nobody listens"
        )
    try:
        verify = ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ValueError) as exc:
        raise UsageError(f"--ca {ca}: {exc}; a readable PEM file is needed") from exc
    return make_http_client(base_url=to, verify=verify, timeout=HTTP_TIMEOUT)


@contextmanager
def _open_log() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the log on stderr: one JSON object a line, stamped, with what does not print spelled out.

    Nobody has to read it: where stderr is closed, full or stands still, the log ends or loses lines, and nothing else.
    """
    import json
    import sys
    from datetime import UTC, datetime

    from phasewatch.live.outputs import NonBlockingWriter

    def render(record: dict[str, Any]) -> str:
        return json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **record})

    lines = None
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # closed, or without a descriptor
            lines = NonBlockingWriter(sys.stderr)

    def say(record: dict[str, Any]) -> None:
        with suppress(OSError, ValueError):
            if lines is not None:
                lines.put(render(record))
            elif sys.stderr is not None:
                sys.stderr.write(render(record) + "\n")

    try:
        yield say
    finally:
        if lines is not None:
            with suppress(OSError):
                lines.close()


def _build_limits(*, quota: str, quota_bundles: int, floor: str, in_flight: int) -> ReceiverLimits:
    from phasewatch.store.quota import ReceiverLimits

    return ReceiverLimits(
        quota_bytes=parse_bytes("--quota", quota), quota_bundles=quota_bundles, min_free_bytes=parse_bytes("--floor", floor), in_flight=in_flight,
        in_flight_per_host=max(1, in_flight // 8),
    )  # fmt: skip


_BYTES_BY_UNIT = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip


def parse_bytes(option: str, text: str) -> int:
    """Parse a size such as ``500MB`` or ``2GiB``.

    Raises:
        UsageError: If it is none.
    """
    import re

    from phasewatch.errors import UsageError

    found = re.fullmatch(r"(\d{1,15})\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _BYTES_BY_UNIT:
        raise UsageError(f"{option} {text}: a size such as 500MB or 2GiB is needed")
    return int(found[1]) * _BYTES_BY_UNIT[found[2].upper()]


def _parse_refused_statuses(refuse: str, *, check: bool) -> frozenset[str]:
    from phasewatch.errors import UsageError
    from phasewatch.types import BundleStatus

    if not refuse:
        return frozenset()
    if not check:
        raise UsageError("--refuse needs --check: what is not looked at cannot be refused")
    if refuse not in (BundleStatus.REJECTED, BundleStatus.ERRORED):
        raise UsageError(f"--refuse {refuse}: rejected or errored")
    order = list(BundleStatus)
    return frozenset(str(status) for status in order[order.index(BundleStatus(refuse)) :])
