"""Names of people become ids: each is a valid one, and two names never become one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewatch.lab.custom_workload import CUSTOM_NAME_PATTERN
from phasewatch.naming import make_host_id, make_profile_name
from phasewatch.types import HOST_ID_PATTERN

NAMES = st.text(alphabet=st.characters(codec="utf-8"), max_size=90) | st.text(alphabet="aA-._ 0", max_size=70)


@given(NAMES)
def test_every_name_becomes_a_valid_id(name: str) -> None:
    assert HOST_ID_PATTERN.fullmatch(make_host_id(name))
    assert CUSTOM_NAME_PATTERN.fullmatch(make_profile_name(name))


@given(NAMES, NAMES)
def test_two_names_stay_two(one: str, other: str) -> None:
    assert (make_host_id(one) == make_host_id(other)) == (one == other)
    assert (make_profile_name(one) == make_profile_name(other)) == (one == other)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("почта", "база", "", ".", "..", "vm"), id="nothing is left"),
        pytest.param(("Web 01", "web-01", "web 01", "WEB-01", "web--01", "-web-01", "web-01-"), id="case and blanks"),
        pytest.param(("caf\u00e9", "cafe\u0301", "cafe"), id="one look, other letters"),
        pytest.param(("a" * 63, "a" * 64, "a" * 65, "a" * 64 + "b"), id="cut"),
        pytest.param(("\u212a", "k", "K"), id="folds to a letter"),
    ],
)
def test_names_that_look_alike_are_different_hosts(names: tuple[str, ...]) -> None:
    assert len({make_host_id(name) for name in names}) == len(names)


def test_a_name_that_can_be_an_id_is_it() -> None:
    assert [make_host_id(name) for name in ("web-01", "db.example", "vm")] == ["web-01", "db.example", "vm"]


@pytest.mark.parametrize("name", ["sent", "refused"])
def test_the_folders_of_a_shipper_are_no_host(name: str) -> None:
    assert make_host_id(name) != name
