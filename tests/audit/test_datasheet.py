"""The generated half of a datasheet: counted from verdicts, nothing typed in."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.datasheet_tables import (
    GENERATED_MARKER,
    AgentFootprint,
    ChannelCost,
    EpisodeStart,
    PhaseSeparation,
    parse_bundles_digest,
    render_datasheet,
    render_page,
    render_shapes,
)

from phasewatch.audit.leakage import LeakageResult
from phasewatch.simulate import simulate
from phasewatch.types import BundleStatus, Phase
from phasewatch.validate.sweep import sweep
from phasewatch.validate.verdict import BundleVerdict

LEAK = LeakageResult(
    name="x", question="What is it?", value=0.5, unit="macro-F1", chance=0.2, limit=0.3, words="of a | made-up one"
)  # fmt: skip
PARTS = PhaseSeparation(phase=Phase.ACTIVE, windows=1200, best=(("proc.vcpu_run", 0.9), ("netflow.out_pkts", 0.4)))
COST = ChannelCost(channel="proc.cpu_user", unit="cores", off=0.010, on=0.012, pairs=(0.001, 0.003))
EITHER = ChannelCost(channel="proc.io_rchar", unit="B/s", off=1.0, on=1.0, pairs=(-0.1, 0.1))
FOOTPRINT = AgentFootprint(host_id="pc", accel="tcg", guest_image="x", seconds=90, pairs=2, costs=(COST, EITHER))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> tuple[BundleVerdict, ...]:
    folder = tmp_path_factory.mktemp("sheet")
    made = simulate(folder / "s", hosts=2, episodes=40, seed=3, faults=0.3, between_s=(60.0, 70.0))
    return sweep(made.store, folder / "run", workers=1).verdicts


def cells(page: str, *head: str) -> list[str]:
    """Return the cells of the table row that begins with these."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line.startswith("|")
    ]
    (found,) = [row for row in rows if tuple(row[: len(head)]) == head]
    return found


def test_each_sample_and_host_is_counted_as_the_validator_judged_it(verdicts: tuple[BundleVerdict, ...]) -> None:
    page = render_datasheet(verdicts, [], [], None, digest="d")
    lab = [v for v in verdicts if v.role == "lab"]
    for host, cell in zip(("sim-00", "sim-01"), cells(page, "**all**", "")[2:], strict=False):
        mine = [v.status for v in lab if v.host_id == host]

        assert cell.startswith(str(mine.count(BundleStatus.ACCEPTED)))
        assert (f"+{mine.count(BundleStatus.DEGRADED)}" in cell) == (BundleStatus.DEGRADED in mine)
        assert (f"!{mine.count(BundleStatus.REJECTED) + mine.count(BundleStatus.ERRORED)}" in cell) == bool(
            {BundleStatus.REJECTED, BundleStatus.ERRORED} & set(mine)
        )


def test_a_pair_that_was_never_recorded_is_a_dot(verdicts: tuple[BundleVerdict, ...]) -> None:
    without = [v for v in verdicts if not (v.profile == "benign" and v.host_id == "sim-01")]

    assert cells(render_datasheet(without, [], [], None, digest="d"), "benign", "idle")[3] == "·"


def test_a_sample_of_the_user_s_own_has_its_row(verdicts: tuple[BundleVerdict, ...]) -> None:
    import dataclasses

    own = dataclasses.replace(next(v for v in verdicts if v.role == "lab"), profile="mine", sample_name="one")

    assert cells(render_datasheet([own], [], [], None, digest="d"), "mine", "one")


def test_leaks_and_footprint_are_told_with_their_figures(verdicts: tuple[BundleVerdict, ...]) -> None:
    page = render_datasheet(verdicts, [LEAK], [PARTS], FOOTPRINT, digest="abc")

    assert "| What is it? | 0.50 macro-F1 | limit 0.30, chance 0.20 | of a \\| made-up one |" in page
    assert cells(page, "active", "1,200")[2] == "`proc.vcpu_run` 0.90, `netflow.out_pkts` 0.40"
    assert "2 pairs of idle machines of the host `pc` (tcg), 90 s each" in page
    assert "1 of 2 channels moved" in page
    assert cells(page, "`proc.cpu_user`")[1:] == ["cores", "0.01", "0.012", "+0.001 to +0.003"]
    assert "io_rchar" not in page
    assert parse_bundles_digest(page) == "abc"


def test_what_was_not_measured_is_said(verdicts: tuple[BundleVerdict, ...]) -> None:
    assert "Not measured yet" in render_datasheet(verdicts, [], [], None, digest="d")


def test_only_what_stands_below_the_marker_is_replaced() -> None:
    page = render_page(f"# By hand\n{GENERATED_MARKER}\nold", "new\n")

    assert page == f"# By hand\n{GENERATED_MARKER}\n\nnew\n"
    assert render_page(page, "new\n") == page


def test_a_page_without_a_marker_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no line"):
        render_page("# By hand\n", "new\n")


def start_of(
    host_id: str, *, throttled: float | None = None, shape: dict[str, str | int | float] | None = None
) -> EpisodeStart:
    return EpisodeStart(
        host_id=host_id, started_s=0.0, recorder="r", boot_s=1.0, shape=shape, throttled_share=throttled
    )


def test_each_drawn_host_is_listed_with_its_facts_and_its_median_throttled_share() -> None:
    shape = {"machine": "q35", "quota_cores": 0.5, "image": "debian", "drawn": "v2/2/0"}
    starts = [start_of("v2-00-q35", shape=shape, throttled=share) for share in (0.1, 0.2, 0.6)]
    head, rows = render_shapes([*starts, start_of("old")])

    (row,) = rows
    listed = dict(zip(head, row, strict=True))
    assert (listed["host"], listed["machine"], listed["quota cores"]) == ("v2-00-q35", "q35", "0.5")
    assert (listed["image"], listed["drawn"], listed["throttled"]) == ("debian", "v2/2/0", "20%")


def test_datasheet_of_bundles_without_shapes_has_no_table_of_hosts(verdicts: tuple[BundleVerdict, ...]) -> None:
    pages = [
        render_datasheet(verdicts, [], [], None, digest="d", starts=[start_of("a", shape=shape)])
        for shape in (None, {"machine": "pc"})
    ]

    assert ["### Hosts" in page for page in pages] == [False, True]
