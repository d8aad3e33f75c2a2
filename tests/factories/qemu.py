"""A fake QEMU: a QMP server on a real socket for the real client, and the /proc folder of its process."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from struct import pack
from typing import Any

from tests.factories.proc import PID, VCPU, FakeProc

BALLOON = "/machine/peripheral/balloon0"
MAC = bytes.fromhex("525400770002")
NETWORK = "nic0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:77:00:02\r\n \\ n0: index=0,type=dgram\r\n"
REGISTERS = "EIP=0040 EFL=00000246 [---Z-P-] CPL=3 II=0 A20=1 SMM=0 HLT=0"
JIT = "gen code size       533/1073\nTB count            96\nTLB partial flushes 38\n"
GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}


class FakeQemu:
    """Serves QMP in a thread of its own until it is closed; one client at a time, as QEMU does.

    Attributes:
        objects: Id → file of each filter.
        filters: Id → backend and queue of each filter.
        network: Text of `info network`, with cards separated by a record separator (0x1e).
        buses: Answer of `query-pci`.
        peripherals: Devices with a name, such as the balloon.
        interval: The balloon's polling interval.
        refused: Commands that are answered with an error.
        bitmaps: Name → bytes that each dirty bitmap of the disk marks.
        dirty_mib_s: Result of a page sampling, which is finished at once.
        vcpu_stats: Answer of `query-stats`.
        mute: No command is answered while set.
        delays_s: Command → delay of its answer; other answers are not delayed.
        greets: Whether it sends the QMP greeting.
    """

    def __init__(
        self, path: Path, *, tids: tuple[int, ...] = (VCPU,), network: str = NETWORK, greets: bool = True
    ) -> None:
        self.path, self.tids, self.network, self.greets = path, tids, network, greets
        self.objects: dict[str, Path] = {}
        self.filters: dict[str, tuple[str, str]] = {}
        self.buses: list[dict[str, Any]] = []
        self.peripherals = ["balloon0"]
        self.bitmaps: dict[str, int] = {}
        self.dirty_mib_s, self.is_sampled = 3, False
        self.vcpu_stats: list[dict[str, Any]] = []
        self.interval, self.status, self.accel = 7, "running", "tcg"
        self.refused: set[str] = set()
        self.delays_s: dict[str, float] = {}
        self.mute = threading.Event()
        self.commands: list[str] = []
        self._clients: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(5)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> FakeQemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send_event(self, name: str) -> None:
        line = (
            json.dumps({"event": name, "data": {}, "timestamp": {"seconds": 1, "microseconds": 1}}).encode() + b"\r\n"
        )
        self._loop.call_soon_threadsafe(lambda: [client.write(line) for client in self._clients])

    def write_frames(self, frames: list[bytes]) -> None:
        """Append frames to the dump of their direction, as `filter-dump` does: with wrong times, cut at 160 bytes."""
        for frame in frames:
            self.write_dump("rx" if frame[6:12] == MAC else "tx", frame)

    def write_dump(self, queue: str, frame: bytes, *, netdev: str = "n0") -> None:
        """Append a frame to the dumps of one direction of one card, whatever is in it."""
        for name, path in self.objects.items():
            if self.filters[name] == (netdev, queue):
                with path.open("ab") as file:
                    file.write(pack("<IIII", 12345, 0, len(frame[:160]), len(frame)) + frame[:160])

    def unplug(self, netdev: str) -> None:
        """Remove a backend with its card and filters without an event, as QEMU does."""
        self.network = "".join(card for card in self.network.split("\x1e") if f" \\ {netdev}: " not in card)
        for name in [name for name, (owner, _) in self.filters.items() if owner == netdev]:
            del self.objects[name], self.filters[name]

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_unix_server(self._talk, str(self.path)))
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0.01))  # a socket is closed a turn after its transport
        self._loop.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._clients or not self.greets:
            try:
                await reader.read()  # a second client gets no greeting
            finally:
                writer.close()
            return
        self._clients.append(writer)
        try:
            writer.write(json.dumps(GREETING).encode() + b"\r\n")
            text, decoder = "", json.JSONDecoder()
            while data := await reader.read(65536):
                text += data.decode()
                while text.strip():
                    try:
                        asked, end = decoder.raw_decode(text.lstrip())
                    except ValueError:
                        break
                    text = text.lstrip()[end:]
                    if not self.mute.is_set():
                        line = json.dumps(self._answer(asked)).encode() + b"\r\n"
                        self._loop.call_later(self.delays_s.get(asked["execute"], 0.0), writer.write, line)
        finally:
            self._clients.remove(writer)
            writer.close()

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        command, arguments = asked["execute"], asked.get("arguments", {})
        self.commands.append(command)
        try:
            if command in self.refused:
                raise KeyError(command)
            return {"return": self._do(command, arguments), "id": asked.get("id")}
        except KeyError as exc:
            return {"error": {"class": "GenericError", "desc": f"refused: {exc}"}, "id": asked.get("id")}

    def _do(self, command: str, arguments: dict[str, Any]) -> Any:
        match command:
            case "qmp_capabilities":
                return {}
            case "query-cpus-fast":
                return [{"thread-id": tid, "cpu-index": i} for i, tid in enumerate(self.tids)]
            case "query-status":
                return {"status": self.status}
            case "query-target":
                return {"arch": "x86_64"}
            case "query-kvm":
                return {"enabled": self.accel == "kvm", "present": True}
            case "query-version":
                return GREETING["QMP"]["version"]
            case "query-memory-size-summary":
                return {"base-memory": 256 << 20}
            case "query-blockstats":
                stats = dict.fromkeys(("rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations"), 3)
                stats |= dict.fromkeys(("rd_total_time_ns", "flush_total_time_ns", "rd_merged", "wr_merged"), 2)
                return [{"qdev": "blk0", "stats": stats | {"wr_total_time_ns": 4, "wr_highest_offset": 5}}]
            case "x-query-virtio":
                return [{"name": "virtio-blk", "path": "/b"}]
            case "x-query-virtio-queue-status":
                return {"used-idx": {0: 1}[arguments["queue"]]}
            case "x-query-jit":
                return {"human-readable-text": {"tcg": JIT}[self.accel]}
            case "human-monitor-command":
                return self.network.replace("\x1e", "") if arguments["command-line"] == "info network" else REGISTERS
            case "qom-list" if arguments["path"] == "/objects":
                return [{"name": name, "type": "child<filter-dump>"} for name in self.objects]
            case "qom-list":
                is_here = arguments["path"] == "/machine/peripheral"
                types = {"balloon0": "child<virtio-balloon-pci>"}
                names = self.peripherals if is_here else []
                return [{"name": name, "type": types.get(name, "child<device>")} for name in names]
            case "qom-get":
                if arguments["property"] == "type":
                    return "pc-q35-7.2-machine"
                if arguments["property"] == "guest-stats":
                    return {"last-update": 0, "stats": {}}
                return self.interval
            case "qom-set":
                self.interval = arguments["value"]
                return {}
            case "object-add":
                path = Path(arguments["file"])
                path.write_bytes(pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, arguments["maxlen"], 1))
                self.objects[arguments["id"]] = path
                self.filters[arguments["id"]] = (arguments["netdev"], arguments["queue"])
                return {}
            case "object-del":
                del self.objects[arguments["id"]]
                del self.filters[arguments["id"]]
                return {}
            case "query-block":
                disk = {"node-name": "#block1", "ro": False, "image": {"virtual-size": 1 << 30}}
                return [{"qdev": "blk0", "device": "d0", "inserted": disk}, {"qdev": "cd0", "device": "cd0"}]
            case "query-named-block-nodes":
                marks = [{"name": name, "count": count} for name, count in self.bitmaps.items()]
                return [{"node-name": "#block1", "dirty-bitmaps": marks}, {"node-name": "#block2"}]
            case "block-dirty-bitmap-add":
                self.bitmaps[arguments["name"]] = 0
                return {}
            case "block-dirty-bitmap-clear":
                self.bitmaps[arguments["name"]] *= 0
                return {}
            case "block-dirty-bitmap-remove":
                del self.bitmaps[arguments["name"]]
                return {}
            case "calc-dirty-rate":
                self.is_sampled = True
                return {}
            case "query-dirty-rate":
                is_done = {"status": "measured", "dirty-rate": self.dirty_mib_s}
                return is_done if self.is_sampled else {"status": "unstarted"}
            case "query-stats":
                return self.vcpu_stats
            case "query-pci":
                return self.buses
        raise KeyError(command)


def make_process(root: Path, *, qmp: Path | None = None, taps: tuple[str, ...] = (), names: bool = False) -> FakeProc:
    """Return a fake /proc with one QEMU process.

    Args:
        root: Folder of the fake /proc.
        qmp: QMP socket on the command line.
        taps: Tap devices that the process holds.
        names: Whether the vCPU thread has QEMU's debug name.
    """
    proc = FakeProc(root)
    line = ["qemu-system-x86_64", "-name", "made-up", *(["-qmp", f"unix:{qmp},server=on"] if qmp else [])]
    proc.write("cmdline", "\0".join(line) + "\0")
    for number, tap in enumerate(taps):
        proc.write(f"fdinfo/{number}", f"iff:\t{tap}\n")
    if names:
        proc.write(f"task/{VCPU}/comm", "CPU 0/KVM\n")
    return proc


__all__ = ["MAC", "PID", "VCPU", "FakeProc", "FakeQemu", "make_process"]
