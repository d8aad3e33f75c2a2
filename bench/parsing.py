"""Measure parsing rows of JSON into columns, against stdlib json, orjson, polars and pyarrow; values must be equal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from timing import Part, in_turns, rows_of

from phasewatch.bundle.archive import unpack_bundle, unpack_members
from phasewatch.bundle.rows import decode_rows
from phasewatch.channels import list_raw_fields
from phasewatch.types import SourceKind


def measure(corpus: Path, *, episodes: int = 20, repeats: int = 7) -> Part:
    """Measure parsing the proc rows of some recorded episodes in five ways."""
    import orjson
    import polars as pl
    import pyarrow.json

    fields = tuple(spec.field for spec in list_raw_fields(SourceKind.PROC))
    bundles = [path.read_bytes() for path in sorted(corpus.glob("*/*.tar.zst"))[:episodes]]
    texts = [bytes(unpack_members(b, file="")["proc.jsonl"]) for b in bundles]

    def of_dicts(loads):  # type: ignore[no-untyped-def]
        return [
            np.array([[row[f] for f in fields] for row in map(loads, text.splitlines())], np.float64) for text in texts
        ]

    def by_polars() -> list[np.ndarray]:
        return [pl.read_ndjson(io.BytesIO(text)).select(fields).to_numpy() for text in texts]

    def by_arrow() -> list[np.ndarray]:
        options = pyarrow.json.ReadOptions(use_threads=False)
        tables = [pyarrow.json.read_json(io.BytesIO(text), read_options=options) for text in texts]
        return [np.stack([t.column(f).to_numpy() for f in fields], axis=1) for t in tables]

    def ours() -> list[np.ndarray]:
        read = [decode_rows(SourceKind.PROC, fields, text, file="") for text in texts]
        return [np.stack([c.astype(np.float64) for c in rows.columns], axis=1) for rows in read]

    works = {
        "stdlib json, rows to an array": lambda: of_dicts(json.loads),
        "orjson, rows to an array": lambda: of_dicts(orjson.loads),
        "polars.read_ndjson": by_polars,
        "pyarrow.json.read_json": by_arrow,
        "phasewatch, every key, type and bound checked": ours,
    }
    truth = ours()
    for name, work in works.items():
        for a, b in zip(truth, work(), strict=True):
            if not np.array_equal(a, np.asarray(b, np.float64), equal_nan=True):
                raise SystemExit(f"{name}: other values than ours")
    times = in_turns(works, repeats=repeats)
    rows = rows_of(times, repeats=repeats, per="episode's proc rows", over=len(texts))
    unpacked = [unpack_bundle(b, file="").manifest.duration_s for b in bundles]
    about = (
        f"{len(texts)} recorded episodes, {np.mean(unpacked):.0f} s long on average, {len(fields)} fields, values "
        "equal to the bit as float64. Only phasewatch refuses repeated keys, wrong types and values out of "
        "bounds."
    )
    return Part(title="Parsing", about=about, rows=rows)
