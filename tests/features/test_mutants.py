"""The fingerprint sees every change of the arithmetic that changes a number, and none that changes only its looks."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from tests.features.mutation import Behaviour, Mutant, behaviour, cosmetic_edits, every_mutant, named_mutants
from tests.oracle.episodes import episodes

from phasewatch.episode.model import Episode
from phasewatch.features.fingerprint import behaviour_fingerprint


def draw_episodes(count: int) -> list[Episode]:
    """Draw episodes by hypothesis, the same ones each time."""
    drawn: list[Episode] = []

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(whole=episodes())
    def collect(whole: Episode) -> None:
        drawn.append(whole)

    collect()
    return drawn[:count]


@pytest.fixture(scope="module")
def drawn() -> list[Episode]:
    return draw_episodes(200)


@pytest.fixture(scope="module")
def real(drawn: list[Episode]) -> Behaviour:
    return behaviour({}, drawn)


def missed_of(mutants: list[Mutant], real: Behaviour, drawn: list[Episode], *, enough: int) -> tuple[int, list[str]]:
    """Run mutants until enough of them changed a value; give how many did, and those that the fingerprint missed."""
    effective, missed = 0, []
    for mutant in mutants:
        does = behaviour({mutant.module: mutant.text}, drawn)
        if does.values != real.values:
            effective += 1
            if does.fingerprint == real.fingerprint:
                missed.append(mutant.words)
        if effective == enough:
            break
    return effective, missed


def test_the_arithmetic_loaded_anew_has_the_fingerprint_of_the_real_one(real: Behaviour, drawn: list[Episode]) -> None:
    assert len(drawn) == 200
    assert real.fingerprint == behaviour_fingerprint()


def test_twenty_mutants_that_change_a_value_change_the_fingerprint(real: Behaviour, drawn: list[Episode]) -> None:
    mutants = [*named_mutants(), *random.Random(1).sample(every_mutant(), 40)]

    effective, missed = missed_of(mutants, real, drawn, enough=20)

    assert effective == 20
    assert missed == []


@pytest.mark.soak
def test_every_mutant_that_changes_a_value_changes_the_fingerprint(
    real: Behaviour, drawn: list[Episode], soak_row: Callable[..., None]
) -> None:
    mutants = [*named_mutants(), *every_mutant()]

    effective, missed = missed_of(mutants, real, drawn, enough=len(mutants) + 1)
    soak_row("Mutants of the arithmetic", mutants=len(mutants), change_a_value=effective, missed=len(missed))

    assert effective >= 60
    assert missed == []


@pytest.mark.parametrize("count", [10, pytest.param(30, marks=pytest.mark.soak)])
def test_edits_of_its_looks_change_nothing(count: int, real: Behaviour, drawn: list[Episode]) -> None:
    changed = [
        edit.words
        for edit in cosmetic_edits(count=count, seed=count)
        if behaviour({edit.module: edit.text}, drawn[:40]) != Behaviour(
            fingerprint=real.fingerprint, values=real.values[:40]
        )
    ]  # fmt: skip

    assert changed == []
