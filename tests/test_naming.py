"""Names of people become ids: each is a valid one, and two names never become one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewatch.naming import host_id_of, profile_name_of
from phasewatch.record.workload import NAME
from phasewatch.vocab import HOST_ID

NAMES = st.text(alphabet=st.characters(codec="utf-8"), max_size=90) | st.text(alphabet="aA-._ 0", max_size=70)


@given(NAMES)
def test_every_name_becomes_a_valid_id(name: str) -> None:
    assert HOST_ID.fullmatch(host_id_of(name))
    assert NAME.fullmatch(profile_name_of(name))


@given(NAMES, NAMES)
def test_two_names_stay_two(one: str, other: str) -> None:
    assert (host_id_of(one) == host_id_of(other)) == (one == other)
    assert (profile_name_of(one) == profile_name_of(other)) == (one == other)


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
    assert len({host_id_of(name) for name in names}) == len(names)


def test_a_name_that_can_be_an_id_is_it() -> None:
    assert [host_id_of(name) for name in ("web-01", "db.example", "vm")] == ["web-01", "db.example", "vm"]


@pytest.mark.parametrize("name", ["sent", "refused"])
def test_the_folders_of_a_shipper_are_no_host(name: str) -> None:
    assert host_id_of(name) != name
