"""The processor name of the host, and its form in the manifest."""

from __future__ import annotations

import pytest

from phasewatch.bundle.limits import MAX_STRING_CHARS
from phasewatch.lab.host import parse_processor_name, read_processor_name

EPYC = "processor\t: 0\ncpu family\t: 23\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nstepping\t: 2\n"


@pytest.mark.parametrize(
    ("cpuinfo", "tsc_khz", "says"),
    [
        pytest.param(EPYC, 1_996_250, "AMD EPYC (family 23, model 1) at 1996 MHz", id="whole"),
        pytest.param(EPYC, None, "AMD EPYC (family 23, model 1)", id="no time stamp counter"),
        pytest.param("model name\t: Odd\tone \u2122\n", None, "Odd?one ?", id="letters that no manifest may hold"),
        pytest.param("processor\t: 0\nBogoMIPS\t: 48.00\n", None, "", id="an ARM, whose kernel gives no name"),
    ],
)
def test_processor_name_is_printable_ascii(cpuinfo: str, tsc_khz: int | None, says: str) -> None:
    assert parse_processor_name(cpuinfo, tsc_khz) == says


def test_longest_processor_name_fits_into_the_manifest() -> None:
    assert (
        len(parse_processor_name(f"model name : {'x' * 500}\ncpu family : {'1' * 99}\nmodel : 1\n", 1))
        <= 80
        < MAX_STRING_CHARS
    )


def test_this_machine_has_a_processor_name() -> None:
    assert read_processor_name(None)
