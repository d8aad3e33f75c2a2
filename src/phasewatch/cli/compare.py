"""The command that compares two runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phasewatch.cli import common
from phasewatch.cli.folders import check_run_folder
from phasewatch.cli.options import AsJson

if TYPE_CHECKING:
    from phasewatch.evaluation.headline import HeadlineNumber
    from phasewatch.evaluation.run_comparison import RunComparison, RunGap

__all__ = ["compare"]

_METRICS = {"macro_f1_3class": "3 classes", "macro_f1": "5 phases"}
_NUMBERS = {
    "infection_recall_30s": "infections alarmed within 30 s",
    "false_alarms_per_vm_hour": "false alarms per VM-hour",
    "median_delay_s": "median delay, s",
    "idle_called_clean": "idle called clean",
    "macro_f1_3class": "macro-F1 3 classes",
    "macro_f1": "macro-F1 5 phases",
}
_UNKNOWN = "–"


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of the first run.")],
    second: Annotated[Path, typer.Argument(help="Folder of the second run.")],
    as_json: AsJson = False,
) -> None:
    """Compare two runs on the test windows that both have.

    Models of the same recipe, channel set, input and name are compared in pairs; a gap is the first run's macro-F1
    minus the second's, with its 95 % interval over sessions and its p-value, corrected over all gaps (Holm). Windows
    whose labels differ between the runs are counted and left out. Nothing is written.

    Example: phasewatch compare runs/before runs/after
    """
    import msgspec

    from phasewatch.evaluation.run_comparison import compare_runs

    done = compare_runs(check_run_folder(first), check_run_folder(second))
    result: dict[str, Any] = {
        **{name: value for name, value in asdict(done).items() if name != "headlines"},
        "numbers": [
            {"name": name, "first": msgspec.to_builtins(one), "second": msgspec.to_builtins(other)}
            for name, one, other in done.list_operator_numbers()
        ],
    }
    common.print_result(
        result, as_json=as_json, lines=[*_render_windows(done), *_render_gaps(done), *_render_rest(done)]
    )


def _render_windows(done: RunComparison) -> list[str]:
    head = ["recipe", "channels", "input", "windows of the first", "of the second", "compared", "other labels"]
    body = [
        [w.recipe, w.channels, w.input, f"{w.first:,}", f"{w.second:,}", f"{w.shared:,}", f"{w.relabelled:,}"]
        for w in done.windows
    ]
    return [*common.render_table([head, *body]), ""]


def _render_gaps(done: RunComparison) -> list[str]:
    head = ["recipe", "channels", "input", "model", "macro-F1 of", "first", "second", "gap", "p, corrected"]
    return common.render_table([head, *(_render_gap(each) for each in done.gaps)])


def _render_gap(each: RunGap) -> list[str]:
    gap = each.gap
    low, high = gap.interval.get("low"), gap.interval.get("high")
    ends = "[no interval]" if low is None or high is None else f"[{low:+.2f}, {high:+.2f}]"
    p = _UNKNOWN if each.p_holm is None else "< 0.001" if each.p_holm < 0.001 else f"{each.p_holm:.3f}"
    scores = [f"{gap.first:.2f}", f"{gap.second:.2f}", f"{gap.first - gap.second:+.2f} {ends}"]
    return [each.recipe, each.channels, each.input, gap.model, _METRICS[gap.metric], *scores, p]


def _render_rest(done: RunComparison) -> list[str]:
    lines = []
    numbers = [[_NUMBERS[name], _render_number(a), _render_number(b)] for name, a, b in done.list_operator_numbers()]
    if numbers and done.headlines[0] is not None:
        lines += ["", f"headline, {done.headlines[0].recipe} (not paired: each run on its own windows)"]
        lines += common.render_table([["", "first", "second"], *numbers])
    for words, only in (("first", done.only_first), ("second", done.only_second)):
        if only:
            names = "; ".join(" ".join(key) for key in only[: common.MAX_LISTED])
            more = f" and {len(only) - common.MAX_LISTED} more" if len(only) > common.MAX_LISTED else ""
            lines.append(f"in the {words} run only: {names}{more}")
    return lines


def _render_number(number: HeadlineNumber) -> str:
    if number.value is None:
        return f"{_UNKNOWN} ({number.code})" if number.code else _UNKNOWN
    ends = "" if number.low is None or number.high is None else f" [{number.low:.2f}, {number.high:.2f}]"
    return f"{number.value:.2f}{ends}"
