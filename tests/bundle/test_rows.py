"""Rows: values to JSON lines in one form, and back to columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewatch.bundle.model import SourceRows
from phasewatch.bundle.rows import decode_rows, encode_columns, encode_rows
from phasewatch.channels import list_raw_fields
from phasewatch.errors import BundleError
from phasewatch.types import SourceKind

INT64 = st.integers(-(2**63), 2**63 - 1)
STAMP = st.integers(0, 2**63 - 1)


def fields_of(source: SourceKind) -> tuple[str, ...]:
    return tuple(spec.field for spec in list_raw_fields(source))


def row(source: SourceKind, value: int | float | None = 0) -> list[int | float | None]:
    return [
        5,
        6,
        7,
        *(float(value) if s.type == "float" and value is not None else value for s in list_raw_fields(source)),
    ]


@st.composite
def tables(draw: st.DrawFn) -> tuple[SourceKind, list[list[int | float | None]]]:
    source = draw(st.sampled_from(list(SourceKind)))
    cells = [
        st.none() | (st.floats(allow_nan=False, allow_infinity=False) if spec.type == "float" else INT64)
        for spec in list_raw_fields(source)
    ]
    return source, draw(st.lists(st.tuples(STAMP, STAMP, INT64, *cells).map(list), max_size=4))


def test_a_row_is_one_line_with_its_keys_in_order_and_no_spaces() -> None:
    data = encode_rows(SourceKind.NETFLOW, [[5, 6, 0, *range(10), *[None] * (len(fields_of(SourceKind.NETFLOW)) - 10)]])

    assert data.startswith(
        b'{"t_wall_ns":5,"t_mono_ns":6,"seq":0,"out_pkts":0,"out_bytes":1,"in_pkts":2,"in_bytes":3,"new_flows":4,'
        b'"syn_out":5,"rst_in":6,"dns_queries":7,"dst_ports":8,"dst_ips":9,"'
    )
    assert data.endswith(b":null}\n")
    assert data.count(b"\n") == 1


def test_a_null_is_no_reading_of_that_field_alone() -> None:
    values = row(SourceKind.QMP, 1)
    values[3] = None

    rows = decode_rows(SourceKind.QMP, fields_of(SourceKind.QMP), encode_rows(SourceKind.QMP, [values]), file="x")

    assert rows.present[0].tolist() == [False] + [True] * (len(fields_of(SourceKind.QMP)) - 1)
    assert int(rows.columns[0][0]) == 0


def test_a_gauge_without_a_reading_is_null_and_is_spelled_as_null_again() -> None:
    known, unknown = row(SourceKind.QMP, 1), row(SourceKind.QMP, 1)
    place = fields_of(SourceKind.QMP).index("vcpu_busy")
    unknown[3 + place] = None
    data = encode_rows(SourceKind.QMP, [known, unknown])

    rows = decode_rows(SourceKind.QMP, fields_of(SourceKind.QMP), data, file="x")

    assert [rows.columns[place].tolist(), rows.present[:, place].tolist()] == [[1.0, 0.0], [True, False]]
    assert encode_columns(rows) == data


def test_a_gauge_may_be_spelled_as_a_whole_number_or_with_an_exponent() -> None:
    data = encode_rows(SourceKind.QMP, [row(SourceKind.QMP, 1)]).replace(b'"vcpu_busy":1.0', b'"vcpu_busy":1')
    data = data.replace(b'"vcpu_user":1.0', b'"vcpu_user":25e-2')

    rows = decode_rows(SourceKind.QMP, fields_of(SourceKind.QMP), data, file="x")

    assert [float(rows.columns[rows.fields.index(name)][0]) for name in ("vcpu_busy", "vcpu_user")] == [1.0, 0.25]


def test_a_member_without_rows_is_a_source_that_said_nothing() -> None:
    rows = decode_rows(SourceKind.GUEST, fields_of(SourceKind.GUEST), b"", file="x")

    assert len(rows) == 0
    assert rows.present.shape == (0, 12)


def test_counters_beyond_the_53_bits_of_a_float_stay_exact() -> None:
    big = 2**53 + 1
    for value in (big, 2**63 - 1, -(2**63)):
        rows = decode_rows(
            SourceKind.PROC,
            fields_of(SourceKind.PROC),
            encode_rows(SourceKind.PROC, [row(SourceKind.PROC, value)]),
            file="x",
        )

        assert int(rows.columns[0][0]) == value


def test_a_counter_beside_a_null_stays_exact_too() -> None:
    values = [row(SourceKind.PROC, 2**53 + 1), row(SourceKind.PROC, None)]

    rows = decode_rows(SourceKind.PROC, fields_of(SourceKind.PROC), encode_rows(SourceKind.PROC, values), file="x")

    assert [int(v) for v in rows.columns[0]] == [2**53 + 1, 0]


def test_fields_that_an_older_recorder_did_not_know_are_there_and_absent() -> None:
    rows = decode_rows(
        SourceKind.NETFLOW, ("in_pkts",), b'{"t_wall_ns":1,"t_mono_ns":1,"seq":0,"in_pkts":9}\n', file="x"
    )

    assert rows.fields == fields_of(SourceKind.NETFLOW)
    assert rows.present[0].tolist() == [name == "in_pkts" for name in rows.fields]
    assert int(rows.columns[rows.fields.index("in_pkts")][0]) == 9


@given(tables())
def test_what_was_written_is_what_is_read(table: tuple[SourceKind, list[list[int | float | None]]]) -> None:
    source, values = table

    rows = decode_rows(source, fields_of(source), encode_rows(source, values), file="x")

    assert len(rows) == len(values)
    for i, line in enumerate(values):
        assert [int(rows.t_wall_ns[i]), int(rows.t_mono_ns[i]), int(rows.seq[i])] == line[:3]
        for column, known, value in zip(rows.columns, rows.present[i], line[3:], strict=True):
            assert bool(known) is (value is not None)
            assert column[i] == (0 if value is None else value)


@given(tables())
def test_columns_are_spelled_as_their_rows_are(table: tuple[SourceKind, list[list[int | float | None]]]) -> None:
    source, values = table
    data = encode_rows(source, values)

    assert encode_columns(decode_rows(source, fields_of(source), data, file="x")) == data


@settings(max_examples=200)
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_noise_is_refused_or_is_rows(noise: bytes) -> None:
    try:
        rows = decode_rows(SourceKind.PROC, fields_of(SourceKind.PROC), noise, file="x")
    except BundleError:
        return
    assert len(rows) == noise.count(b"\n")


@settings(max_examples=300)
@given(st.data())
def test_a_spoilt_row_is_refused_or_reads_as_what_it_says(data: st.DataObject) -> None:
    good = encode_rows(SourceKind.GUEST, [row(SourceKind.GUEST, 12)] * 2)
    at = data.draw(st.integers(0, len(good) - 1))
    spoilt = good[:at] + data.draw(st.binary(max_size=3)) + good[at + data.draw(st.integers(0, 3)) :]

    try:
        rows = decode_rows(SourceKind.GUEST, fields_of(SourceKind.GUEST), spoilt, file="x")
    except BundleError:
        return
    assert encode_columns(rows) == spoilt


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 0.5, True, 2**63, "7"],
    ids=["NaN", "infinity", "a fraction", "a truth", "beyond int64", "text"],
)
def test_the_writer_refuses_what_the_reader_would(value: object) -> None:
    values = row(SourceKind.PROC)
    values[4] = value  # type: ignore[call-overload]

    with pytest.raises((ValueError, TypeError, OverflowError)):
        encode_rows(SourceKind.PROC, [values])


def test_the_writer_refuses_a_row_of_another_width() -> None:
    with pytest.raises(ValueError, match="has 17 values, not 18"):
        encode_rows(SourceKind.PROC, [row(SourceKind.PROC)[:-1]])


def test_the_writer_takes_numpy_numbers() -> None:
    values = [np.int64(v) for v in row(SourceKind.PROC, 3)]  # type: ignore[arg-type]

    assert encode_rows(SourceKind.PROC, [values]) == encode_rows(SourceKind.PROC, [[*values[:3], *[3] * 15]])


def test_columns_of_another_type_are_not_written() -> None:
    rows = decode_rows(
        SourceKind.GUEST, fields_of(SourceKind.GUEST), encode_rows(SourceKind.GUEST, [row(SourceKind.GUEST)]), file="x"
    )
    wrong = SourceRows(
        source=rows.source, fields=rows.fields, t_wall_ns=rows.t_wall_ns, t_mono_ns=rows.t_mono_ns, seq=rows.seq,
        columns=(rows.columns[0].astype(np.float64), *rows.columns[1:]), present=rows.present,
    )  # fmt: skip

    with pytest.raises(ValueError, match=r"guest\.up_ns is not int"):
        encode_columns(wrong)


def test_columns_that_are_not_the_sources_are_not_written() -> None:
    rows = decode_rows(
        SourceKind.PROC, fields_of(SourceKind.PROC), encode_rows(SourceKind.PROC, [row(SourceKind.PROC)]), file="x"
    )

    with pytest.raises(ValueError, match="not the raw fields of proc"):
        encode_columns(replace(rows, fields=rows.fields[::-1], columns=rows.columns[::-1]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_fraction_that_is_not_finite_is_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        encode_rows(
            SourceKind.QMP, [[5, 6, 7, *(value if s.type == "float" else 0 for s in list_raw_fields(SourceKind.QMP))]]
        )


def test_a_fraction_beyond_all_numbers_is_refused_with_its_line() -> None:
    good = encode_rows(SourceKind.QMP, [row(SourceKind.QMP, 1)])

    with pytest.raises(BundleError, match=r"x:qmp\.jsonl:2: row-non-finite"):
        decode_rows(SourceKind.QMP, fields_of(SourceKind.QMP), good + good.replace(b":1.0", b":1e999"), file="x")


def test_a_number_beyond_64_bits_is_found_among_fractions_and_nulls() -> None:
    values = row(SourceKind.QMP, 1)
    values[3] = None
    data = encode_rows(SourceKind.QMP, [values, row(SourceKind.QMP, 1)])
    name = fields_of(SourceKind.QMP)[1].encode()
    head, tail = data.rsplit(b'"%b":1' % name, 1)

    with pytest.raises(BundleError, match=r"x:qmp\.jsonl:2: row-int64"):
        decode_rows(SourceKind.QMP, fields_of(SourceKind.QMP), head + b'"%b":1' % name + b"0" * 30 + tail, file="x")
