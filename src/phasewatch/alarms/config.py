"""The settings of the outputs, as the tables ``[outputs.*]`` of a configuration file have them."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from phasewatch.atomic import read_regular
from phasewatch.errors import UsageError, describe_os_error
from phasewatch.http_client import is_clear_text
from phasewatch.models.alarm import AlarmKind

__all__ = [
    "STANDARD_OUTPUT_PATH",
    "SYSLOG_FACILITIES",
    "AlertmanagerConfig",
    "CommandConfig",
    "EcsConfig",
    "MetricsConfig",
    "OutputConfig",
    "OutputFault",
    "SyslogAddress",
    "SyslogConfig",
    "SyslogTransport",
    "WebhookConfig",
    "describe_outputs",
    "find_output_faults",
    "is_http_url",
    "parse_command",
    "parse_listen_port",
    "parse_syslog_address",
    "read_token_file",
]

STANDARD_OUTPUT_PATH = "-"
SYSLOG_FACILITIES = {"user": 1, "daemon": 3, "auth": 4, "authpriv": 10} | {f"local{n}": 16 + n for n in range(8)}
_MAX_TOKEN_BYTES = 4096
_MAX_URLS = 8
_LABEL_PATTERN = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}")
_RESERVED_LABELS = frozenset({"alertname", "vm", "vm_id", "host", "kind", "severity"})

_Meta = msgspec.Meta
_Kinds = tuple[AlarmKind, ...]
_BOTH: _Kinds = (AlarmKind.INFECTION, AlarmKind.ACTIVITY)
_Text = Annotated[str, _Meta(max_length=4096)]


class OutputSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the settings of one output."""


class WebhookConfig(OutputSettings, frozen=True, kw_only=True):
    """Table ``[outputs.webhook]``: the events of alarms, posted as JSON.

    Attributes:
        url: http or https address.
        token_file: File with a bearer token; empty for none.
        ca_file: PEM file with the certificates that the server's is checked against; empty for the system's.
        kinds: Kinds of alarms that are sent.
    """

    url: _Text
    token_file: _Text = ""
    ca_file: _Text = ""
    kinds: _Kinds = _BOTH


class AlertmanagerConfig(OutputSettings, frozen=True, kw_only=True):
    """Table ``[outputs.alertmanager]``: alarms for Prometheus Alertmanager, API version 2.

    Attributes:
        urls: Address of each Alertmanager of the cluster, without ``/api/v2/alerts``; each gets every alarm.
        interval_s: Seconds after which the open alarms are sent again; without them Alertmanager resolves an alarm
            after four intervals.
        labels: Labels that are added to every alarm.
        token_file, ca_file, kinds: As in `WebhookConfig`.
    """

    urls: Annotated[tuple[_Text, ...], _Meta(min_length=1, max_length=_MAX_URLS)]
    interval_s: Annotated[float, _Meta(ge=1, le=3600)] = 60.0
    labels: Annotated[dict[str, Annotated[str, _Meta(max_length=256)]], _Meta(max_length=16)] = {}
    token_file: _Text = ""
    ca_file: _Text = ""
    kinds: _Kinds = _BOTH


class SyslogConfig(OutputSettings, frozen=True, kw_only=True):
    """Table ``[outputs.syslog]``: every change of an alarm as a message of RFC 5424.

    Attributes:
        address: ``udp://HOST:PORT``, ``tcp://HOST:PORT`` (octet counting, RFC 6587) or ``unix:/path`` (a datagram
            socket, such as ``/dev/log``).
        facility: Name of the facility.
        kinds: Kinds of alarms that are sent.
    """

    address: _Text
    facility: str = "daemon"
    kinds: _Kinds = _BOTH


class EcsConfig(OutputSettings, frozen=True, kw_only=True):
    """Table ``[outputs.ecs]``: every change of an alarm as a line of Elastic Common Schema JSON.

    Attributes:
        file: File that lines are appended to; ``-`` for standard output.
        kinds: Kinds of alarms that are written.
    """

    file: _Text
    kinds: _Kinds = _BOTH


class MetricsConfig(OutputSettings, frozen=True, kw_only=True):
    """Table ``[outputs.metrics]``: an OpenMetrics endpoint for Prometheus.

    Attributes:
        port: Port of 127.0.0.1; the path is ``/metrics``.
        max_vms: VMs that are shown; further ones are counted only.
    """

    port: Annotated[int, _Meta(ge=0, le=65_535)]
    max_vms: Annotated[int, _Meta(ge=1, le=4096)] = 512


class CommandConfig(OutputSettings, frozen=True, kw_only=True):
    """Table ``[outputs.command]``: a program that is started when an alarm is raised or ends.

    Attributes:
        command: Program and arguments: a list, or a text that is split as a shell would; no shell ever runs it.
        timeout_s: Seconds after which the program and its group are killed.
        max_running: Number of programs that run at a time; further alarms wait.
        kinds: Kinds of alarms that start it.
    """

    command: str | tuple[str, ...]
    timeout_s: Annotated[float, _Meta(gt=0, le=3600)] = 30.0
    max_running: Annotated[int, _Meta(ge=1, le=64)] = 4
    kinds: _Kinds = (AlarmKind.INFECTION,)


class OutputConfig(OutputSettings, frozen=True, kw_only=True):
    """All outputs; None for those that are not used."""

    webhook: WebhookConfig | None = None
    alertmanager: AlertmanagerConfig | None = None
    syslog: SyslogConfig | None = None
    ecs: EcsConfig | None = None
    metrics: MetricsConfig | None = None
    command: CommandConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFault:
    """A setting that cannot be used.

    Attributes:
        key: Output and key, such as ``webhook.url``.
        words: What is wrong, and what to do.
    """

    key: str
    words: str


class SyslogTransport(StrEnum):
    """How a syslog message travels."""

    UDP = "udp"
    TCP = "tcp"
    UNIX = "unix"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyslogAddress:
    """Where syslog messages go.

    Attributes:
        transport: How they travel.
        host, port: Receiver, for UDP and TCP.
        path: Socket, for unix.
    """

    transport: SyslogTransport
    host: str = ""
    port: int = 0
    path: str = ""


def parse_syslog_address(text: str) -> SyslogAddress:
    """Parse ``udp://HOST:PORT``, ``tcp://HOST:PORT`` or ``unix:/path``; the port is 514 if none is named.

    Raises:
        UsageError: If it is none of them.

    >>> parse_syslog_address("udp://[::1]:5514").host
    '::1'
    """
    wrong = UsageError(f"{text}: udp://HOST:PORT, tcp://HOST:PORT or unix:/path is needed")
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        path = path[2:] if path.startswith("///") else path
        if not path.startswith("/") or "\0" in path or len(path.encode("utf-8", "surrogateescape")) > 107:
            raise wrong
        return SyslogAddress(transport=SyslogTransport.UNIX, path=path)
    try:
        parts = urlsplit(text)
        port = 514 if parts.port is None else parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("udp", "tcp") or not parts.hostname or not port or parts.path.strip("/") or parts.username:
        raise wrong
    return SyslogAddress(transport=SyslogTransport(parts.scheme), host=parts.hostname, port=port)


def parse_command(command: str | tuple[str, ...]) -> tuple[str, ...]:
    """Split a command into program and arguments, and find the program.

    Raises:
        UsageError: If it is empty, its quotes do not match, or the program does not exist.
    """
    try:
        words = tuple(shlex.split(command)) if isinstance(command, str) else command
    except ValueError as exc:
        raise UsageError(f"{str(command)[:200]}: {exc}; check its quotes") from exc
    if not words or not words[0]:
        raise UsageError("a program is needed")
    if any("\0" in word for word in words):
        raise UsageError("an argument holds a null character")
    program = shutil.which(words[0])
    if program is None:
        raise UsageError(f"{words[0]}: no such program; write its full path")
    return (program, *words[1:])


def parse_listen_port(text: str) -> int:
    """Parse ``PORT`` or ``127.0.0.1:PORT``.

    Raises:
        UsageError: If it is neither, or not an address of this machine.
    """
    host, _, digits = text.rpartition(":")
    if not digits.isdecimal() or int(digits) > 65_535:
        raise UsageError(f"{text}: a port is needed, such as 9177")
    try:
        is_local = not host or host == "localhost" or str(ip_address(host)) == "127.0.0.1"
    except ValueError:
        is_local = False
    if not is_local:
        raise UsageError(f"{text}: the endpoint listens on 127.0.0.1 alone; let a proxy with TLS forward to it")
    return int(digits)


def read_token_file(path: str) -> str | None:
    """Read a bearer token from the first line of a file; None without a file.

    Raises:
        UsageError: If the file cannot be read or holds no token.
    """
    if not path:
        return None
    try:
        data = read_regular(Path(path), _MAX_TOKEN_BYTES)
    except OSError as exc:
        raise UsageError(describe_os_error(OSError(exc.errno, exc.strerror, path))) from exc
    token = data.decode("utf-8", "replace").strip()
    if not token or len(data) > _MAX_TOKEN_BYTES or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError(f"{path}: a token is needed, one line of printable ASCII characters")
    return token


def find_output_faults(config: OutputConfig) -> tuple[OutputFault, ...]:
    """Return the settings that cannot be used on this machine now; nothing is connected or written."""
    return tuple(_find_faults(config))


def describe_outputs(config: OutputConfig) -> tuple[tuple[str, str], ...]:
    """Return name and destination of each output that is used, for people."""
    rows = []
    if config.webhook:
        rows.append(("webhook", f"POST {config.webhook.url} ({', '.join(config.webhook.kinds)})"))
    if config.alertmanager:
        known = config.alertmanager
        rows += [
            (
                "alertmanager",
                f"POST {url.rstrip('/')}/api/v2/alerts every {known.interval_s:g} s ({', '.join(known.kinds)})",
            )
            for url in known.urls
        ]
    if config.syslog:
        rows.append(("syslog", f"{config.syslog.address}, facility {config.syslog.facility}"))
    if config.ecs:
        rows.append(("ecs", "standard output" if config.ecs.file == STANDARD_OUTPUT_PATH else config.ecs.file))
    if config.metrics:
        rows.append(("metrics", f"listen on http://127.0.0.1:{config.metrics.port}/metrics"))
    if config.command:
        command = config.command.command
        words = command if isinstance(command, str) else shlex.join(command)
        rows.append(("command", f"{words} ({', '.join(config.command.kinds)})"))
    return tuple(rows)


def _find_faults(config: OutputConfig) -> Iterator[OutputFault]:
    if config.webhook:
        yield from _find_http_faults("webhook", "url", (config.webhook.url,), config.webhook)
    if known := config.alertmanager:
        yield from _find_http_faults("alertmanager", "urls", known.urls, known)
        for label in known.labels:
            if not _LABEL_PATTERN.fullmatch(label) or label in _RESERVED_LABELS:
                yield OutputFault(key=f"alertmanager.labels.{label[:80]}", words="not a free label name of Prometheus")
    if config.syslog:
        try:
            parse_syslog_address(config.syslog.address)
        except UsageError as exc:
            yield OutputFault(key="syslog.address", words=str(exc))
        if config.syslog.facility not in SYSLOG_FACILITIES:
            words = f"{config.syslog.facility[:80]}: unknown; it is one of {', '.join(SYSLOG_FACILITIES)}"
            yield OutputFault(key="syslog.facility", words=words)
    if config.ecs and config.ecs.file != STANDARD_OUTPUT_PATH:
        path = Path(config.ecs.file)
        if not path.parent.is_dir():
            yield OutputFault(key="ecs.file", words=f"{path}: its folder does not exist; create it")
        elif path.exists() and not path.is_file():
            yield OutputFault(key="ecs.file", words=f"{path}: it is not a regular file")
    if config.command:
        try:
            parse_command(config.command.command)
        except UsageError as exc:
            yield OutputFault(key="command.command", words=str(exc))


def _find_http_faults(
    name: str, key: str, urls: tuple[str, ...], config: WebhookConfig | AlertmanagerConfig
) -> Iterator[OutputFault]:
    for url in urls:
        if not is_http_url(url):
            yield OutputFault(key=f"{name}.{key}", words=f"{url}: an http or https URL is needed")
        elif config.token_file and is_clear_text(url):
            words = f"{url}: the token would cross the network unencrypted; use https"
            yield OutputFault(key=f"{name}.{key}", words=words)
    try:
        read_token_file(config.token_file)
    except UsageError as exc:
        yield OutputFault(key=f"{name}.token_file", words=str(exc))
    if config.ca_file and not Path(config.ca_file).is_file():
        yield OutputFault(key=f"{name}.ca_file", words=f"{config.ca_file}: no such file")


def is_http_url(url: str) -> bool:
    """Whether the HTTP client accepts an address."""
    import httpx

    try:
        return url.startswith(("http://", "https://")) and bool(httpx.URL(url).host)
    except (httpx.InvalidURL, UnicodeError):
        return False
