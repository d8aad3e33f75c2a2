"""The edge bundle beside the bundled corpus: it must fit this version, or `watch` fails straight after a clone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phasewatch.binning.align import bin_episode
from phasewatch.bundle.archive import unpack_bundle
from phasewatch.channels import CHANNELS, build_channel_mask
from phasewatch.errors import MismatchError, UsageError
from phasewatch.inference.model_selection import (
    choose_model,
    filter_by_channel_set,
    find_models,
    find_unavailable_channel_sets,
)
from phasewatch.models.alarm import AlarmKind

CORPUS = Path(__file__).parents[2] / "corpus"
EDGE = CORPUS / "lab-v1.edge.zip"


def names_of(mask: str) -> frozenset[str]:
    return frozenset(c.full_name for c, on in zip(CHANNELS, build_channel_mask(mask), strict=True) if on)


def test_it_is_read_by_this_version_is_small_and_says_who_it_learnt_from() -> None:
    candidates = find_models(EDGE)  # a stale schema or behaviour is refused here: remake it with `make edge`

    assert EDGE.stat().st_size < 8 << 20  # eight models of 1,000 trees
    assert {c.threat for c in candidates} >= {"realistic", "portable", "proc"}
    assert candidates[0].trained.accels == ("tcg",)
    assert candidates[0].trained.origins == ("recorded",)
    assert set(candidates[0].trained.hosts) <= {path.name for path in (CORPUS / "lab-v1").iterdir()}
    assert all(c.rules.filter is not None for c in candidates)
    assert all(
        {(rule.kind, rule.stride_s) for rule in c.rules.alarms} == {(k, s) for k in AlarmKind for s in (1, 5)}
        for c in candidates
    )


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("realistic", "realistic"),
        ("portable", "portable"),
        ("proc+tap", "proc+tap"),
        ("proc+qmp", "proc"),
        ("libvirt", "libvirt"),
        ("libvirt-user", "libvirt-user"),
        ("libvirt+netflow", "libvirt+netflow"),
    ],
)
def test_every_machine_gets_the_largest_mask_that_it_can_give(given: str, chosen: str) -> None:
    assert choose_model(find_models(EDGE), names_of(given), arch="x86_64").threat == chosen


@pytest.mark.parametrize(
    ("missing", "chosen", "larger"),
    [
        ({"qmp.jit_tb", "qmp.jit_tlb_partial"}, "portable", {"realistic"}),
        ({"qmp.vq_blk"}, "libvirt+netflow", {"realistic", "portable"}),  # virtio-scsi or NVMe alone
        (set(), "realistic", set()),
    ],
)
def test_larger_masks_that_were_passed_over_are_named_with_what_they_lack(
    missing: set[str], chosen: str, larger: set[str]
) -> None:
    candidates, given = find_models(EDGE), names_of("realistic") - missing
    scorer = choose_model(candidates, given, arch="x86_64")

    lacking = dict(find_unavailable_channel_sets(candidates, given, arch="x86_64", chosen=scorer))

    assert scorer.threat == chosen
    assert set(lacking) == larger
    assert all(set(lacks) <= missing for lacks in lacking.values())


def test_a_named_channel_set_is_taken_and_no_other() -> None:
    assert {c.threat for c in filter_by_channel_set(find_models(EDGE), "proc")} == {"proc"}
    with pytest.raises(UsageError, match="portable"):
        filter_by_channel_set(find_models(EDGE), "oracle")


def test_an_arm_machine_lacks_what_no_arm_machine_has() -> None:
    given = names_of("realistic") - {"qmp.vcpu_busy", "qmp.vcpu_user"}

    assert choose_model(find_models(EDGE), given, arch="aarch64").threat == "realistic"
    assert choose_model(find_models(EDGE), given, arch="x86_64").threat != "realistic"


def test_a_machine_that_gives_nothing_is_told_so() -> None:
    with pytest.raises(MismatchError, match="too few channels for any registered channel set"):
        choose_model(find_models(EDGE), names_of("tap"), arch="x86_64")


def test_it_judges_a_real_recording() -> None:
    path = sorted((CORPUS / "lab-v1" / "pc").glob("*.tar.zst"))[0]
    bins = bin_episode(unpack_bundle(path.read_bytes(), file=path.name)).bins
    model = choose_model(find_models(EDGE), names_of("realistic"), arch="x86_64")

    p = model.predict_windows(bins)

    assert p.shape[1] == 5
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)
