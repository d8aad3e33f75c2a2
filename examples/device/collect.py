"""Collect on a gateway: stamp the rows of a device's agent, and count at the card that leads to the device.

Usage: python3 collect.py CARD ADDRESS PORT FOLDER
"""

import json
import sys
import threading
import time
from pathlib import Path
from socket import create_server

COUNTERS = {"in_bytes": "tx_bytes", "in_pkts": "tx_packets", "out_bytes": "rx_bytes", "out_pkts": "rx_packets"}
MAX_LINE_BYTES = 1024
MIN_INTERVAL_NS = 200_000_000  # the agent sends one row a second; a flood costs its sender its rows


def count(card: str, path: Path) -> None:
    """Write the card's counters twice a second; what the card receives is what the device sends."""
    folder = Path("/sys/class/net", card, "statistics")
    with path.open("a", buffering=1) as out:
        while True:
            row = {name: int((folder / counter).read_text()) for name, counter in COUNTERS.items()}
            print(json.dumps({"t": time.time_ns(), **row}), file=out)
            time.sleep(0.5)


def receive(address: str, port: int, path: Path) -> None:
    """Write the rows of one agent at a time, each with the time of its arrival; hang up at the first other line."""
    with create_server((address, port)) as server, path.open("a", buffering=1) as out:
        last_ns = 0
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rb") as lines:
                while line := lines.readline(MAX_LINE_BYTES):
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):
                        break
                    now_ns = time.time_ns()
                    if not isinstance(row, dict):
                        break
                    if now_ns - last_ns >= MIN_INTERVAL_NS:
                        print(json.dumps({**row, "t": now_ns}), file=out)
                        last_ns = now_ns


if __name__ == "__main__":
    card, address, port, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    threading.Thread(target=count, args=(card, folder / "net.jsonl"), daemon=True).start()
    receive(address, port, folder / "agent.jsonl")
