"""Damage models whose digests are right, load and ask each in a child with limits, and count how the children end.

``python fuzz_models.py SEED COUNT FOLDER``, where FOLDER has checkpoints (``gbt/`` …) and edge bundles (``gbt.zip``
…); one JSON object of counts goes to stdout. A child may take 1 GiB above what its parent has, and 5 s of CPU.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
CPU_S = 5
WAIT_S = 120
EXTREMES = (0, 1, -1, 2, 5, 127, 255, 2**15, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63), 10**6)
FLOATS = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 3e-45, 1e300)
TEXTS = ("", "0", "-1", "5", "x" * 5_000, "\x00", "1e999", "99999999999", "gbtree", "nan", "[5E-1]", "é")


def main(seed: int, count: int, folder: Path) -> dict[str, int]:
    """Return how many children ended in which way."""
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of the parent would be missing in a child, which waits for them
    from phasewatch.inference.model_selection import find_models  # what a child needs is imported before it is born
    from phasewatch.models import registry

    rng = random.Random(seed)
    cases = sorted(path.name for path in folder.iterdir())
    ask: dict[str, Callable[[Path], object]] = {}
    for name in cases:
        ask[name] = ask_bundle(find_models) if name.endswith(".zip") else ask_checkpoint(registry.load)
        ask[name](folder / name)
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as room:
        for number in range(count):
            name = rng.choice(cases)
            place = Path(room) / f"{number}-{name}"
            how = (
                damage_bundle(folder / name, place, rng) if name.endswith(".zip") else damage(folder / name, place, rng)
            )
            end = in_a_child(ask[name], place)
            ends[end] += 1
            if end not in ("refused", "answered"):
                print(f"seed {seed} number {number} {name}: {how}: {end}", file=sys.stderr)
                if kept := os.environ.get("KEEP"):
                    target = Path(kept) / place.name
                    shutil.copytree(place, target) if place.is_dir() else shutil.copy(place, target)
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    return dict(ends)


def ask_checkpoint(load: Callable[[Path], Any]) -> Callable[[Path], object]:
    """Return a function that loads a checkpoint and asks it."""

    def ask(path: Path) -> object:
        return answers(load(path))

    return ask


def ask_bundle(find: Callable[[Path], Any]) -> Callable[[Path], object]:
    """Return a function that loads every model of an edge bundle and asks it."""

    def ask(path: Path) -> object:
        return [answers(candidate.load()) for candidate in find(path)]

    return ask


def answers(model: Any) -> object:
    """Ask a model about a few windows, with values and without."""
    import numpy as np

    from phasewatch.models.base import ModelInputs

    spec = model.spec
    shape = (3, len(spec.names), *((20,) if spec.kind == "tensor" else ()))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[0] = np.nan if len(spec.names) > 1 else 1.0
    p = model.predict_proba(ModelInputs(x=x, spec=spec))
    if p.shape != (3, 5) or not np.isfinite(p).all() or (p < 0).any() or (abs(p.sum(axis=1) - 1) > 1e-3).any():
        raise RuntimeError(f"no probabilities: {p}")
    return p


def in_a_child(ask: Callable[[Path], object], place: Path) -> str:
    """Return how it ends: refused, answered, traceback, memory, cpu or signal."""
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * GIB, size + 2 * GIB))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 3
        try:
            ask(place)
            code = 0
        except Exception as exc:
            from phasewatch.errors import PhasewatchError

            code = 3 if isinstance(exc, PhasewatchError) and exc.exit_code in (3, 4) else 99
            if code == 99:
                import traceback

                (place.parent / "traceback").write_text(traceback.format_exc())
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak > GIB / 1024:
            code = 98
        os._exit(code)
    for _ in range(WAIT_S * 20):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hang"
    if os.WIFSIGNALED(status):
        return "cpu" if os.WTERMSIG(status) in (24, 9) else f"signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    if code == 99:
        return "traceback: " + (place.parent / "traceback").read_text().strip().splitlines()[-1][:160]
    return {0: "answered", 3: "refused", 98: "memory"}.get(code, f"exit {code}")


# --- checkpoints


def damage(source: Path, place: Path, rng: random.Random) -> str:
    """Copy a checkpoint with something changed in its files or its header, and make the digests right again."""
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    header = json.loads(files.pop("checkpoint.json"))
    name = rng.choice(sorted(files))
    how = []
    if rng.random() < 0.25:
        how.append(damage_json(header, rng, keep=("sha256", "files", "format", "classes")))
    else:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            files[name], what = damaged(name, files[name], rng)
            how.append(what)
    header["files"] = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
    place.mkdir()
    for n, data in files.items():
        (place / n).write_bytes(data)
    (place / "checkpoint.json").write_bytes(sealed(header))
    return f"{name}: {'; '.join(how)}"


def sealed(header: dict[str, Any]) -> bytes:
    """Return a header's JSON with the digest that fits what a reader makes of it, where it can be read at all."""
    import msgspec

    from phasewatch.models.checkpoint import CheckpointHeader
    from phasewatch.models.checkpoint import add_header_digest as seal

    header["sha256"] = ""
    text = to_json(header)
    try:
        return msgspec.json.encode(seal(msgspec.json.decode(text, type=CheckpointHeader)))
    except Exception:
        return text


def to_json(value: Any) -> bytes:
    """Return JSON also of what is nested deeper than the encoder goes."""
    sys.setrecursionlimit(50_000)
    return json.dumps(value).encode()


def damaged(name: str, data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change a file, most often within its structure."""
    if rng.random() < 0.2:
        return damage_bytes(data, rng)
    try:
        if name.endswith(".safetensors"):
            return damage_safetensors(data, rng)
        if name.endswith(".json"):
            value = [json.loads(data)]
            return to_json(value[0]), damage_json(value, rng)
        if name.endswith(".onnx"):
            return damage_onnx(data, rng)
    except Exception as exc:  # damaged twice: the structure is gone
        return damage_bytes(data, rng)[0], f"bytes after {type(exc).__name__}"
    return damage_bytes(data, rng)


def damage_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Flip, cut, double, or overwrite a few bytes."""
    at = rng.randrange(max(1, len(data)))
    end = min(len(data), at + rng.randrange(1, 40))
    return rng.choice(
        (
            (data[:at], "cut"),
            (data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :] if data else b"\x00", "flip"),
            (data[:end] + data[at:], "double"),
            (data[:at] + data[end:], "hole"),
            (data[:at] + rng.randbytes(end - at) + data[end:], "noise"),
            (data[:at] + b"\xff" * (end - at) + data[end:], "ones"),
            (data + data, "twice"),
        )
    )


def damage_json(value: Any, rng: random.Random, keep: tuple[str, ...] = ()) -> str:
    """Change one place of a JSON value, in place."""
    while True:
        if isinstance(value, dict):
            keys = [key for key in value if key not in keep]
            if not keys or rng.random() < 0.05:
                value[rng.choice(("", "x", "width", "rounds", "seen"))] = rng.choice((*EXTREMES, *TEXTS, None, [], {}))
                return "a key more"
            key: Any = rng.choice(keys)
        elif isinstance(value, list) and value:
            key = rng.randrange(len(value))
        else:
            return "nothing"
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            value = inner
            continue
        kind = rng.randrange(6)
        if kind == 0 and isinstance(value, dict):
            del value[key]
        elif kind == 1 and isinstance(value, list):
            value.extend(value[:] * rng.choice((1, 20)))
        elif kind == 2:
            deep: Any = []
            for _ in range(rng.choice((3, 900, 5_000))):
                deep = [deep]
            value[key] = deep if rng.random() < 0.3 else []
        else:
            value[key] = rng.choice((*EXTREMES, 0.5, 1e-300, 1e300, 1e308, *TEXTS, None, True, {}, [1, "a"]))
        return f"{str(key)[:30]}, way {kind}"


def damage_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change types, shapes, places or numbers of arrays."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    kind = rng.randrange(4)
    if kind == 0:
        at = rng.randrange(len(body) // 4) * 4
        body[at : at + 4] = struct.pack("<f", rng.choice(FLOATS[:8]))
        how = "number"
    elif kind == 1:
        return struct.pack("<Q", rng.choice(EXTREMES) % 2**64) + data[8:], "header's size"
    else:
        how = damage_json(header, rng)
    text = to_json(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(body), how


# --- edge bundles


def damage_onnx(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change operators, attributes, names or tensors of a graph."""
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    node = rng.choice(list(graph.node))
    kind = rng.randrange(9)
    if kind == 0:
        node.op_type = rng.choice(
            ("Loop", "If", "Scan", "ConstantOfShape", "Tile", "Resize", "Expand", "Reshape", "Add")
        )
    elif kind == 1 and node.input:
        names = [n for other in graph.node for n in (*other.input, *other.output)]
        node.input[rng.randrange(len(node.input))] = rng.choice((*names, ""))
    elif kind == 2 and graph.initializer:
        tensor = rng.choice(list(graph.initializer))
        if tensor.dims and rng.random() < 0.5:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(EXTREMES)
        elif tensor.data_type == 7:
            tensor.raw_data = struct.pack("<q", rng.choice(EXTREMES)) * (len(tensor.raw_data) // 8)
        else:
            tensor.data_type = rng.choice((1, 6, 7, 8, 9, 10, 11, 16))
    elif kind == 3:
        graph.node.remove(node)
    elif kind == 4:
        for _ in range(rng.choice((1, 50, 600))):
            graph.node.append(node)
    elif node.attribute:
        attribute = rng.choice(list(node.attribute))
        values = attribute.ints or attribute.floats
        if values:
            at = rng.randrange(len(values))
            values[at] = (
                values[at] + rng.choice((-1, 1, 2))
                if rng.random() < 0.5
                else (rng.choice(EXTREMES) if attribute.ints else rng.choice(FLOATS[:8]))
            )
            if rng.random() < 0.2:
                del values[at:]
        elif attribute.type == 2:
            attribute.i = rng.choice(EXTREMES)
        elif attribute.type == 1:
            attribute.f = rng.choice(FLOATS[:8])
        elif attribute.strings:
            attribute.strings[rng.randrange(len(attribute.strings))] = rng.choice(
                (b"LEAF", b"BRANCH_LT", b"BRANCH_EQ", b"x")
            )
        else:
            attribute.s = rng.choice((b"", b"reverse", b"bidirectional", b"SAME_UPPER", b"LOGISTIC"))
    else:
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "x"))
    return model.SerializeToString(), f"{node.op_type} {kind}"


def damage_bundle(source: Path, place: Path, rng: random.Random) -> str:
    """Copy an edge bundle with a member, the header or the container changed, and make the digests right again."""
    import msgspec

    from phasewatch.inference.edge_bundle import EdgeHeader, pack_edge_bundle

    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members.pop("edge.json"))
    kind = rng.random()
    how = ""
    if kind < 0.15:
        how = damage_json(header, rng, keep=("sha256", "members", "format", "classes", "schema_hash"))
    elif kind < 0.9:
        name = rng.choice([n for n in members if n.endswith(".onnx")])
        members[name], how = damaged(name, members[name], rng)
    try:
        data = pack_edge_bundle(msgspec.json.decode(to_json(header), type=EdgeHeader), members)
    except Exception:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, part in (("edge.json", to_json(header)), *members.items()):
                archive.writestr(name, part)
        data = made.getvalue()
    if kind >= 0.9:
        at = rng.choice((data.rindex(b"PK\5\6"), data.index(b"PK\1\2"), 0)) + rng.randrange(40)
        at = min(at, len(data) - 2)
        data = data[:at] + bytes([rng.choice((0, 255, 1, 8, data[at] ^ 1))]) + data[at + 1 :]
        how = "container"
    place.write_bytes(data)
    return how


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
