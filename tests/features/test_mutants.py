"""The fingerprint sees every change of the arithmetic that changes a number, and none that changes only its looks."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from tests.features.mutation import Behaviour, Mutant, behaviour, cosmetic_edits, every_mutant, named_mutants
from tests.oracle.episodes import episodes

from phasewatch.bundle.model import Episode
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
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    soak_row(
        "Mutants of the arithmetic", kind="of what it does", edits=len(mutants), change_a_value=effective,
        change_the_fingerprint=effective - len(missed), missed=len(missed), peak_MiB=peak_mib,
    )  # fmt: skip

    assert effective >= 60
    assert missed == []
    assert peak_mib < 2048  # a mutant that swells is stopped, and none leaves anything behind


def changed_by(edits: list[Mutant], real: Behaviour, drawn: list[Episode]) -> list[str]:
    """Give the edits after which a value or the fingerprint is another."""
    same = Behaviour(fingerprint=real.fingerprint, values=real.values[: len(drawn)])
    return [edit.words for edit in edits if behaviour({edit.module: edit.text}, drawn) != same]


def test_ten_edits_of_its_looks_change_nothing(real: Behaviour, drawn: list[Episode]) -> None:
    assert changed_by(cosmetic_edits(count=10, seed=10), real, drawn[:40]) == []


@pytest.mark.soak
def test_thirty_edits_of_its_looks_change_nothing(
    real: Behaviour, drawn: list[Episode], soak_row: Callable[..., None]
) -> None:
    changed = changed_by(cosmetic_edits(count=30, seed=30), real, drawn)
    soak_row("Mutants of the arithmetic", kind="of its looks", edits=30, change_a_value=len(changed))

    assert changed == []
