"""Makes mutants of a bundle by the thousand and sees what the reader says of them; run as a process of its own.

    python -m tests.bundle.mutants SEED COUNT

It prints one JSON document, so that the test can bound what a mutant cost: CPU seconds, and the process's memory.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from tests.factories.bundles import episode
from tests.factories.bundles import members_of as rows_of
from tests.factories.small_bundles import Members, listed, members_of, seal, small_bundle

from phasewatch.bundle.archive import pack_bundle, unpack_bundle
from phasewatch.bundle.model import Episode
from phasewatch.bundle.rows import encode_columns
from phasewatch.errors import BundleError
from phasewatch.types import BundleStatus
from phasewatch.validate.verdict import BundleLocation, validate_bundle

NUMBERS = (
    b"0",
    b"-0",
    b"-1",
    b"1e999",
    b"-1e999",
    b"NaN",
    b"Infinity",
    b"9223372036854775807",
    b"9223372036854775808",
    b"-9223372036854775809",
    b"1" * 400,
    b"0.1",
    b"1e-5",
    b"1E5",
    b"00",
    b"+1",
    b".5",
    b"5.",
    b"null",
    b"true",
    b'"7"',
    b"[]",
    b"{}",
    b"4611686018427387904",
    b"1" + b"0" * 18,
)
TOKENS = (
    b"\0",
    b"\xef\xbb\xbf",
    b"\xc3",
    b"\xff\xfe",
    b"\r\n",
    b"\n\n",
    b" ",
    b"\t",
    b",",
    b"}",
    b"{",
    b'"',
    b"\\",
    b"\\u0000",
    b"[" * 300,
    b'{"a":' * 200,
    b"/*x*/",
    b'"seq":0,',
    b'"__proto__":1,',
    b"\x1b[2J",
    b"../../etc/passwd",
    b"\n",
    b"x" * 5000,
    b"\xe2\x80\xae",
)


def bases() -> tuple[tuple[str, bytes], ...]:
    """Return the sound bundles that mutants are made of: a tiny one, and one with every source."""
    whole = episode((("clean", 3.0), ("active", 3.0)), number=1)
    return ("small", small_bundle()), ("whole", pack_bundle(whole.manifest, rows_of(whole), level=3))


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """Do to bytes what disks, networks and editors do."""
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        lambda: data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at:],
        lambda: data[:at] + data[min(end, at + 64) :],
        lambda: data[:at],
        lambda: data[:end] + data[at:],
        lambda: data[:at] + bytes(min(end - at, 512)) + data[min(end, at + 512) :],
        lambda: data[:at] + rng.choice(TOKENS) + data[at:],
    )
    return rng.choice(ways)()


def spoil_text(rng: random.Random, text: bytes) -> bytes:
    """Do to JSON lines what a careless or a hostile writer does: to numbers, keys, lines."""
    lines = text.split(b"\n")
    row = rng.randrange(len(lines))
    line = lines[row]
    pieces = line.split(b",")
    piece = rng.randrange(len(pieces))
    key, colon, _ = pieces[piece].partition(b":")

    def with_piece(new: bytes) -> bytes:
        changed = b",".join((*pieces[:piece], new, *pieces[piece + 1 :]))
        return b"\n".join((*lines[:row], changed, *lines[row + 1 :]))

    ways: tuple[Callable[[], bytes], ...] = (
        lambda: with_piece(key + colon + rng.choice(NUMBERS)),
        lambda: with_piece(key + colon + rng.choice(NUMBERS)),
        lambda: with_piece(key + colon + b"%d" % rng.randint(-(2**65), 2**65)),
        lambda: with_piece(pieces[piece] + b"," + pieces[piece]),
        lambda: with_piece(pieces[rng.randrange(len(pieces))]),
        lambda: with_piece(key.swapcase() + colon + b"1"),
        lambda: b"\n".join((*lines[:row], *lines[row + 1 :])),
        lambda: b"\n".join((*lines[:row], line, line, *lines[row + 1 :])),
        lambda: b"\n".join(rng.sample(lines, len(lines))),
        lambda: spoil_bytes(rng, text),
        lambda: text[: rng.randrange(len(text) + 1)],
    )
    return rng.choice(ways)()


def spoil_members(rng: random.Random, members: Members, *, agree: bool) -> dict[str, bytes]:
    """Spoil one member; with `agree` the manifest is made to list what then stands there."""
    name = rng.choice(list(members))
    changed = {**members, name: spoil_text(rng, members[name]) if members[name] else b"{}\n"}
    if rng.random() < 0.1:
        changed = dict(rng.sample(list(changed.items()), len(changed)))
    if agree and name != "manifest.json":
        changed = listed(changed)
    return changed


def content_of(read: Episode) -> dict[str, bytes]:
    """Spell what was read, to be held against what was written."""
    return {f"{source}.jsonl": encode_columns(rows) for source, rows in read.rows.items()}


def says_the_same(read: Episode, mutant: bytes) -> bool:
    """Hold what was read against the text, as Python's own parser reads it: another spelling, never another value."""
    written = members_of(mutant)
    return all(
        _same_row(json.loads(ours), json.loads(theirs))
        for name, spelled in content_of(read).items()
        for ours, theirs in zip(spelled.splitlines(), written[name].splitlines(), strict=True)
    )


def _same_row(ours: dict[str, object], theirs: dict[str, object]) -> bool:
    """Compare values; a fraction's field holds the float nearest to what was written."""
    return ours.keys() == theirs.keys() and all(
        a == b or (isinstance(a, float) and isinstance(b, int) and a == float(b))
        for a, b in zip(ours.values(), theirs.values(), strict=True)
    )


def main(seed: int, count: int) -> dict[str, object]:
    """Build mutants and judge each."""
    rng = random.Random(seed)
    originals = [(data, members_of(data), unpack_bundle(data, file=name)) for name, data in bases()]
    fates: Counter[str] = Counter()
    slowest_s, wrong = 0.0, []
    for number in range(count):
        data, members, sound = rng.choice(originals)
        kind = rng.choice(("bytes", "behind the manifest's back", "agreed"))
        if kind == "bytes":
            mutant = spoil_bytes(rng, data)
        else:
            mutant = seal(spoil_members(rng, members, agree=kind == "agreed"))
        began = time.process_time()
        try:
            found, code = unpack_bundle(mutant, file="mutant"), ""
        except BundleError as error:
            found, code = None, error.code
        place = BundleLocation(
            path="mutant",
            host_id=sound.manifest.host.host_id,
            episode_id=sound.manifest.episode_id,
            receipt=sha256(data).hexdigest(),
        )
        judged = validate_bundle(mutant, place).verdict
        slowest_s = max(slowest_s, time.process_time() - began)
        fates[f"{kind}: {code or 'read'}"] += 1
        if judged.status is BundleStatus.ACCEPTED and mutant != data:
            wrong.append(f"{number}: accepted against the receipt")
        if found is not None and kind != "agreed":
            same_rows = content_of(found) == content_of(sound) and found.marks == sound.marks
            if not same_rows or (kind == "bytes" and found.manifest != sound.manifest):
                wrong.append(f"{number}: read as something else without a word ({kind})")
        if found is not None and not says_the_same(found, mutant):
            wrong.append(f"{number}: what was read is not what was written")
    # Not ru_maxrss: at exec that starts from the peak of whoever started this process.
    status = Path("/proc/self/status").read_text()
    peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
    return {"fates": dict(fates), "slowest_cpu_s": slowest_s, "peak_mib": peak_mib, "wrong": wrong, "count": count}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
