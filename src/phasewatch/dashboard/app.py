"""Web application of the dashboard: static files, the event stream to browsers, and events from outside producers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import msgspec
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from phasewatch.channels import CHANNELS
from phasewatch.dashboard.auth import SECURITY_HEADERS, AccessControl, AccessRequest
from phasewatch.dashboard.history import MachineKey
from phasewatch.dashboard.hub import EventHub, HubViewer
from phasewatch.dashboard.intake import AlarmChangeRequest, EventIntake
from phasewatch.errors import BusyError, EventError, MissingToolError, PhasewatchError
from phasewatch.events.schema import EventEnvelope, parse_event
from phasewatch.http_server.connections import set_connection_owner
from phasewatch.types import PHASES

__all__ = ["AuthMiddleware", "build_app", "find_plotly_script"]

_MAX_BODY_BYTES = 1024 * 1024
_MAX_CHANGE_BYTES = 8 * 1024  # of an acknowledgement or a silence
_BODY_TIMEOUT_S = 20.0
_VIEWER_OWNER = "viewer"  # owner of the connections with a valid cookie or token, for the connection limits
_VIEWER_SEND_TIMEOUT_S = 30.0  # a viewer that reads nothing for this long is disconnected
_MEDIA_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def build_app(intake: EventIntake, access: AccessControl, *, title: str) -> AuthMiddleware:
    """Build the ASGI application of the dashboard.

    Args:
        intake: Receives the events, and distributes them by its hub.
        access: Access rules.
        title: Title of the page, such as the name of a run.

    Raises:
        MissingToolError: If the installed plotly package has no script.
    """
    script = find_plotly_script()
    if script is None:
        raise MissingToolError("Plotly's script is not in the installed package: pip install 'phasewatch[serve]'")
    about = json.dumps(_build_about(title)).encode()
    hub = intake.hub

    async def page(request: Request) -> Response:
        return _build_static_response("page.html")

    async def static(request: Request) -> Response:
        return _build_static_response(request.path_params["name"])

    async def plotly(request: Request) -> Response:
        return FileResponse(script, media_type="text/javascript", headers={"Cache-Control": "max-age=3600"})

    async def about_json(request: Request) -> Response:
        return Response(about, media_type="application/json", headers={"Cache-Control": "no-store"})

    async def health(request: Request) -> Response:
        return JSONResponse({"events": hub.number, "viewers": hub.viewers})

    async def state_json(request: Request) -> Response:
        return _build_json_response(intake.render_state())

    async def history_json(request: Request) -> Response:
        query = request.query_params
        key = MachineKey(run=query.get("run", ""), vm=query.get("vm", ""), host=query.get("host", ""))
        span_s, after_ms = _parse_number(query.get("span", "600")), _parse_number(query.get("after", "0"))
        found = intake.history.read(key, span_s=span_s, after_ns=after_ms * 1_000_000)
        return _build_json_response(msgspec.json.encode(found))  # null for an unknown machine, such as after a restart

    async def change_alarm(request: Request) -> Response:
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                body = await _read_body(request, _MAX_CHANGE_BYTES)
            change = msgspec.json.decode(body or b"", type=AlarmChangeRequest)
        except (TimeoutError, ClientDisconnect):
            return _build_error_response(408, f"the body did not arrive within {_BODY_TIMEOUT_S:.0f} s")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            return _build_error_response(400, f"alarm: {exc}")
        try:
            await intake.change_alarm(change)
        except PhasewatchError as exc:
            return _build_error_response(409, str(exc))
        return JSONResponse({"changed": change.id})

    async def stream_events(request: Request) -> Response:
        try:
            viewer = hub.join(request.headers.get("last-event-id") or request.query_params.get("after"))
        except BusyError as exc:
            return _build_error_response(503, str(exc), {"Retry-After": "5"})
        set_connection_owner(
            request.scope, _VIEWER_OWNER
        )  # with --no-auth too, because the hub limits the number of viewers
        return _ViewerStream(hub, viewer)

    async def receive_events(request: Request) -> Response:
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                body = await _read_body(request, _MAX_BODY_BYTES)
        except (TimeoutError, ClientDisconnect):
            return _build_error_response(408, f"the body did not arrive within {_BODY_TIMEOUT_S:.0f} s")
        if body is None:
            return _build_error_response(413, f"more than {_MAX_BODY_BYTES:,} bytes; send the events in parts")
        try:
            events = _parse_event_lines(body)
        except EventError as exc:
            return _build_error_response(400, str(exc))
        if len(events) > hub.limits.burst:  # the rate limit would reject them for ever
            return _build_error_response(
                413, f"{len(events):,} events, at most {hub.limits.burst:,.0f} at once; send them in parts"
            )
        if wait_s := hub.admit(len(events)):
            return _build_error_response(429, "too many events", {"Retry-After": str(int(wait_s) + 1)})
        for event in events:
            intake.publish(event)
        return JSONResponse({"accepted": len(events)}, status_code=202)

    routes = [
        Route("/", page),
        Route("/events", stream_events, methods=["GET"]),
        Route("/events", receive_events, methods=["POST"]),
        Route("/static/{name}", static),
        Route("/plotly.min.js", plotly),
        Route("/about.json", about_json),
        Route("/state.json", state_json),
        Route("/history.json", history_json),
        Route("/alarms", change_alarm, methods=["POST"]),
        Route("/healthz", health),
    ]
    return AuthMiddleware(Starlette(routes=routes), access)


def find_plotly_script() -> Path | None:
    """Return the path of Plotly's script without importing the package, or None if it is not installed."""
    spec = find_spec("plotly")
    path = Path(spec.origin).parent / "package_data" / "plotly.min.js" if spec and spec.origin else None
    return path if path is not None and path.is_file() else None


class _ViewerStream(EventSourceResponse):
    """Event stream of a viewer; it releases the viewer even if the stream never starts."""

    def __init__(self, hub: EventHub, viewer: HubViewer) -> None:
        super().__init__(
            hub.stream(viewer), ping=0, sep="\n", send_timeout=_VIEWER_SEND_TIMEOUT_S, shutdown_grace_period=1
        )
        self._hub, self._viewer = hub, viewer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._hub.leave(self._viewer)


class AuthMiddleware:
    """ASGI middleware that checks access and adds the security headers to every response."""

    def __init__(self, inner: Starlette, access: AccessControl) -> None:
        self._inner, self._access = inner, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS:
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        await (self._find_response(scope) or self._inner)(scope, receive, send_with_headers)

    def _find_response(self, scope: Scope) -> Response | None:
        request = _build_access_request(scope)
        refusal = self._access.find_refusal(request)
        if (refusal is None or refusal.status == 401) and self._access.is_login(request):
            # Redirect, so that the token disappears from the address bar, the history and every Referer.
            return RedirectResponse("/", status_code=303, headers={"Set-Cookie": self._access.render_set_cookie()})
        if refusal is None:
            if self._access.has_credentials(request):
                set_connection_owner(scope, _VIEWER_OWNER)
            return None
        return _build_error_response(refusal.status, refusal.message)


def _parse_event_lines(body: bytes) -> tuple[EventEnvelope, ...]:
    """Parse a body with one event per line.

    Raises:
        EventError: If a line is not a valid event (the message names the line), or the body is empty.
    """
    events = []
    for number, line in enumerate(body.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            events.append(parse_event(line))
        except EventError as exc:
            raise EventError(f"line {number}: {exc}") from exc
    if not events:
        raise EventError("event: empty body; send one event per line")
    return tuple(events)


async def _read_body(request: Request, max_bytes: int) -> bytes | None:
    """Read the body of a request, or return None if it exceeds the limit, without buffering more than the limit."""
    parts: list[bytes] = []
    size = 0
    stream: AsyncIterator[bytes] = request.stream()
    async for part in stream:
        size += len(part)
        if size > max_bytes:
            return None
        parts.append(part)
    return b"".join(parts)


def _build_access_request(scope: Scope) -> AccessRequest:
    headers = Headers(scope=scope)
    return AccessRequest(
        method=scope["method"],
        path=scope["path"],
        query=scope["query_string"].decode("latin-1"),
        host=headers.get("host", ""),
        origin=headers.get("origin", ""),
        cookie=headers.get("cookie", ""),
        authorization=headers.get("authorization", ""),
    )


def _build_static_response(name: str) -> Response:
    file = resources.files("phasewatch.dashboard") / "static" / name
    kind = _MEDIA_TYPES.get(name.rpartition(".")[2])
    if "/" in name or "\\" in name or kind is None or not file.is_file():
        return _build_error_response(404, "not found")
    return Response(file.read_bytes(), media_type=kind)


def _build_json_response(data: bytes) -> Response:
    return Response(data, media_type="application/json", headers={"Cache-Control": "no-store"})


def _parse_number(text: str) -> int:
    """Return a whole number of at most 15 digits; 0 for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else 0


def _build_error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def _build_about(title: str) -> dict[str, object]:
    """Return the title, the phases and the channels, which the page needs to label its figures."""
    channels = [
        {"name": c.full_name, "source": c.source, "unit": c.unit, "trust": c.trust, "about": c.about} for c in CHANNELS
    ]
    return {"title": title, "phases": PHASES, "channels": channels}
