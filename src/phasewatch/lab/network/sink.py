"""The process behind a VM's network card: a unix datagram socket, the responder and the flow counters.

QEMU's `-netdev dgram` sends one Ethernet frame per datagram. `NetworkSink` is the recorder's handle of the process. The
process ends when the recorder closes the handle or dies, because its control pipe then ends.
"""

from __future__ import annotations

import asyncio
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from types import TracebackType

import msgspec

from phasewatch.errors import VmError
from phasewatch.lab.network.responder import IgnoredFrames, NetworkResponder
from phasewatch.lab.network.world import EpisodeWorld
from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.netflow import FlowCounter, NetflowReading, TrafficLog, TrafficRow
from phasewatch.types import SourceKind

__all__ = ["NetflowSource", "NetworkSink", "SinkLog", "main"]

_SIZE = Struct("!I")
_COUNTERS_REQUEST, _LOG_REQUEST, _WORLD_REQUEST = b"t", b"l", b"w"
_MAX_WORLD_BYTES = 65536
_MAX_FRAME_BYTES = 65536
_MAX_PATH_BYTES = 107  # sun_path, less its final zero
_MAX_BURST_FRAMES = 256  # frames that are received before the control pipe is checked again
_MAX_BACKLOG_FRAMES = 4096  # frames that wait for QEMU
_RETRY_S = 0.002
_SOCKET_BYTES = 4 * 2**20  # requested; the kernel grants up to its limit
_EXIT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkLog:
    """The traffic of a sink since its start.

    Attributes:
        rows: Totals per remote end; they prove that the guest stayed inside its bounds.
        frames_beyond: Number of frames of remote ends beyond the limit of rows.
        lost_frames: Number of answers that QEMU did not accept.
        forgotten_flows: Number of flows evicted from the set of known 5-tuples.
        evicted_flows: Number of destinations and connections evicted from the flow table.
        open_connections: Number of open TCP connections.
        ignored: Numbers of frames without an answer, by reason.
    """

    rows: tuple[TrafficRow, ...]
    frames_beyond: int
    lost_frames: int
    forgotten_flows: int
    evicted_flows: int
    open_connections: int
    ignored: IgnoredFrames


class NetworkSink:
    """Starts one sink process and asks it for its counters; one for each start of a VM.

    Args:
        path: Socket of the sink: QEMU's `remote.path`. It is bound before the constructor returns, so no frame is lost.
        peer: Socket of QEMU: its `local.path`. It need not exist yet.

    Attributes:
        timeout_s: Longest wait for an answer, in seconds.

    Raises:
        VmError: If a path is too long for a socket.
    """

    timeout_s = 5.0

    def __init__(self, path: Path, peer: Path) -> None:
        for each in (path, peer):
            if len(bytes(each)) > _MAX_PATH_BYTES:
                raise VmError(f"{each}: a socket's path has at most {_MAX_PATH_BYTES} bytes; choose a shorter folder")
        self._path = path
        path.unlink(missing_ok=True)
        self._control, theirs = socket.socketpair()
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
            wire.bind(str(path))
            # -P: a file in the working folder must not replace a module.
            command = [sys.executable, "-P", "-c", "from phasewatch.lab.network.sink import main; main()"]
            self._process = subprocess.Popen(
                [*command, str(wire.fileno()), str(theirs.fileno()), str(peer)],
                pass_fds=(wire.fileno(), theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._received = bytearray()  # bytes of answers that are not parsed yet
        self._n_outstanding = 0  # requests without an answer yet

    @property
    def pid(self) -> int:
        """Process id of the sink."""
        return self._process.pid

    def read_counters(self) -> NetflowReading:
        """Read the counters in the order of the raw fields, and begin a new tick of `dst_ports` and `dst_ips`.

        Raises:
            VmError: If the process does not answer in time.
        """
        return msgspec.json.decode(self._request(_COUNTERS_REQUEST), type=NetflowReading)

    def read_log(self) -> SinkLog:
        """Read the traffic log.

        Raises:
            VmError: If the process does not answer in time.
        """
        return msgspec.json.decode(self._request(_LOG_REQUEST), type=SinkLog)

    def set_world(self, world: EpisodeWorld) -> None:
        """Set the servers of an episode in the network.

        Raises:
            VmError: If the process does not answer in time.
        """
        text = msgspec.json.encode(world)
        self._request(_WORLD_REQUEST + _SIZE.pack(len(text)) + text)

    def close(self) -> None:
        """Stop the process and remove its socket. May be called more than once."""
        self._control.close()
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> NetworkSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, request: bytes) -> bytes:
        try:
            self._control.settimeout(self.timeout_s)
            self._control.sendall(request)
            self._n_outstanding += 1
            while True:
                answer = self._receive()
                self._n_outstanding -= 1
                if not self._n_outstanding:  # earlier answers belong to requests that timed out
                    return answer
        except OSError as exc:
            rc = self._process.poll()
            state = "runs, but does not answer" if rc is None else f"ended with {rc}"
            raise VmError(
                f"the network sink at {self._path} {state} ({exc}); the episode is lost, record it again"
            ) from exc

    def _receive(self) -> bytes:
        """Read one answer. A part that was received before a timeout is kept for the next call."""
        self._fill(_SIZE.size)
        end = _SIZE.size + _SIZE.unpack_from(self._received)[0]
        self._fill(end)
        answer = bytes(self._received[_SIZE.size : end])
        del self._received[:end]
        return answer

    def _fill(self, size: int) -> None:
        while len(self._received) < size:
            part = self._control.recv(65536)
            if not part:
                raise ConnectionResetError("control pipe closed")
            self._received += part


class _SinkServer:
    """The loop of the sink process."""

    def __init__(self, wire: socket.socket, control: socket.socket, peer: str) -> None:
        self._wire, self._control, self._peer = wire, control, peer
        self._responder = NetworkResponder()
        self._flows = FlowCounter()
        self._log = TrafficLog()
        self._backlog: deque[bytes] = deque()
        self._lost = 0

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._wire, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        while True:
            ready = dict(poll.poll(self._pause_ms()))
            self._receive_frames()  # before the answer, so that a reading includes every earlier frame
            if self._control.fileno() in ready and not self._answer_request():
                return
            self._send(self._responder.handle_timers(time.monotonic_ns()))

    def _pause_ms(self) -> float | None:
        due_ns = self._responder.next_due_ns
        pause_s = None if due_ns is None else max(0.0, (due_ns - time.monotonic_ns()) / 1e9)
        if self._backlog:
            pause_s = _RETRY_S if pause_s is None else min(pause_s, _RETRY_S)
        return None if pause_s is None else 1000 * pause_s

    def _receive_frames(self) -> None:
        for _ in range(_MAX_BURST_FRAMES):
            try:
                frame = self._wire.recv(_MAX_FRAME_BYTES)
            except BlockingIOError:
                return
            self._flows.count_frame(frame, True, t_ns=time.monotonic_ns())
            self._log.add_frame(frame, True)
            self._send(self._responder.handle(frame, time.monotonic_ns()))

    def _send(self, frames: list[bytes]) -> None:
        room = _MAX_BACKLOG_FRAMES - len(self._backlog)
        self._backlog.extend(frames[:room])
        self._lost += len(frames[room:])
        while self._backlog:
            try:
                self._wire.sendto(self._backlog[0], self._peer)
            except BlockingIOError:  # QEMU's queue is full: it reads when the guest has room
                return
            except OSError:  # the VM has ended, or has not started yet
                self._lost += 1
                self._backlog.popleft()
                continue
            frame = self._backlog.popleft()
            self._flows.count_frame(frame, False, t_ns=time.monotonic_ns())
            self._log.add_frame(frame, False)

    def _answer_request(self) -> bool:
        try:
            request = self._control.recv(1)
            if request == _COUNTERS_REQUEST:
                answer = msgspec.json.encode(self._flows.pop_reading(time.monotonic_ns()))
            elif request == _LOG_REQUEST:
                answer = msgspec.json.encode(self._build_log())
            elif request == _WORLD_REQUEST:
                self._responder.set_world(msgspec.json.decode(self._receive_text(), type=EpisodeWorld))
                answer = b"true"
            else:
                return False
            self._control.sendall(_SIZE.pack(len(answer)) + answer)
        except OSError:  # the recorder died
            return False
        return True

    def _receive_text(self) -> bytes:
        """Receive a length and as many bytes; the recorder sends both at once."""
        size = _SIZE.unpack(self._receive_exactly(_SIZE.size))[0]
        if size > _MAX_WORLD_BYTES:
            raise OSError(f"a world of {size} bytes")
        return self._receive_exactly(size)

    def _receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._control.recv(size - len(data))
            if not part:
                raise OSError("the recorder closed the pipe")
            data += part
        return data

    def _build_log(self) -> SinkLog:
        return SinkLog(
            rows=self._log.rows(),
            frames_beyond=self._log.frames_beyond,
            lost_frames=self._lost,
            forgotten_flows=self._flows.forgotten,
            evicted_flows=self._flows.table.evicted,
            open_connections=self._responder.connections,
            ignored=self._responder.ignored,
        )


def main() -> None:
    """Run the sink process; the arguments are the datagram socket, the control socket and QEMU's path."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the recorder handles Ctrl-C and closes the pipe
    wire = socket.socket(fileno=int(sys.argv[1]))
    control = socket.socket(fileno=int(sys.argv[2]))
    wire.setblocking(False)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        wire.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
    _SinkServer(wire, control, sys.argv[3]).run()


class NetflowSource:
    """Telemetry source that reads the counters of one VM's sink; the VM closes the sink."""

    source = SourceKind.NETFLOW

    def __init__(self, sink: NetworkSink) -> None:
        self._sink = sink
        self._pending: asyncio.Future[ReadingValues] | None = None

    async def open(self) -> None:
        """Begin the first tick of `dst_ports` and `dst_ips`."""
        await self.read()

    async def close(self) -> None:
        """Do nothing; the source holds no resource."""

    async def read(self) -> ReadingValues:
        """Return one reading; all values are None while the sink does not answer."""
        # In a thread, because a hanging sink must not delay the ticks of the other VM. Never two requests at once.
        if self._pending is not None and not self._pending.done():
            return build_missing_reading(self.source)
        self._pending = asyncio.ensure_future(asyncio.to_thread(self._read_counters))
        return await asyncio.shield(self._pending)

    def _read_counters(self) -> ReadingValues:
        try:
            return tuple(self._sink.read_counters())
        except VmError:
            return build_missing_reading(self.source)
