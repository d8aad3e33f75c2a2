"""Render the results of lab-v2: `python -m tools.results_v2 RUN --store STORE --out PAGE.md --command "..."`.

The page is that of `tools.results`, and behind it: hosts, other laboratory, sensors, twins, learning curves, and what
cannot be said. Every number is a row of a metrics file, or computed from the run's predictions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from phasewatch.audit.run import read_audit
from phasewatch.channels import SENSOR_SETS
from phasewatch.dataset.split_files import RecipeResult, read_recipe_results
from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.evaluation.metric_table import MetricRow, MetricTable, parse_metrics, select_headline
from phasewatch.evaluation.other_store import OTHER_STORE
from phasewatch.splits import SPLIT_RECIPES
from tools.learning_curve import CurveFile, read_curves
from tools.results import AGENT, OPERATOR_COLUMNS, read_split_notes, render, render_interval, table
from tools.twins import TwinReport, compare_twins, read_load_spans

MODEL_CHANNEL_SETS = ("realistic", "extended", "libvirt", "device", "portable")
HOST_RECIPES = ("held_out_host", "held_out_sample", "held_out_both", "held_out_time")
_HOST_COLUMNS = {
    "macro_f1_3class": "3 states, these hosts",
    "macro_f1_3class_mean_of_hosts": "mean of new hosts",
    "macro_f1_3class_new_host": "one new host",
    "macro_f1": "5 phases, these hosts",
    "macro_f1_mean_of_hosts": "mean of new hosts",
    "macro_f1_new_host": "one new host",
}
_OTHER_COLUMNS = {
    "macro_f1_3class": "3 states",
    "macro_f1_3class_new_host": "3 states, one new host",
    "macro_f1": "5 phases",
    "infecting_auroc": "AUC of infecting",
    "infection_recall_30s": "infections alarmed within 30 s",
    "infection_soak_false_alarms_per_vm_hour": "false alarms per VM-hour, soak",
    "idle_called_clean": "idle called clean",
}
_Interval = tuple[float, float | None, float | None]


def find_row(metrics: MetricTable, metric: str, **columns: object) -> MetricRow | None:
    """Return the row of a metric over everything, seeds averaged; None without one."""
    found = metrics.select(
        metric, overall=True, seed="mean", compared_to=None, bin=None, fold="pooled", smoothing="none", **columns
    )
    return found[0] if found else None


def render_cell(row: MetricRow | None) -> str:
    """Render a number with its interval, or the code of the reason why there is none."""
    if row is None:
        return "`not_tested`"
    if row.value is None:
        return f"`{row.code or 'not_scored'}`"
    return _render_or_code(row)


def _render_or_code(row: MetricRow, *, sign: bool = False) -> str:
    if row.value is not None and (row.low is None or row.high is None):
        return f"{row.value:+.2f} (`{row.code}`)" if sign else f"{row.value:.2f} (`{row.code}`)"
    return render_interval(row, sign=sign)


def render_hosts(metrics: MetricTable, model: str) -> str:
    """Render the three intervals of each recipe, channel set and input: these hosts, their mean, one new host."""
    body = [
        [recipe, channel_set, given, *(render_cell(find_row(metrics, metric, **key)) for metric in _HOST_COLUMNS)]
        for recipe in HOST_RECIPES
        for channel_set in MODEL_CHANNEL_SETS
        for given in ("raw", "context")
        if find_row(metrics, "macro_f1", **(key := _build_key(recipe, channel_set, model, given))) is not None
    ]
    about = (
        f"`{model}`. *These hosts*: sessions drawn again. *Mean of new hosts* and *one new host*: Student's t over the "
        "scores of the hosts."
    )
    head = ["recipe", "channel set", "input", *_HOST_COLUMNS.values()]
    return f"## Hosts\n\n{about}\n\n{table([head, *body])}" if body else ""


def _build_key(recipe: str, channel_set: str, model: str, given: str = "raw") -> dict[str, object]:
    agent = AGENT.get(channel_set, "off")
    return {"recipe": recipe, "channel_set": channel_set, "model": model, "input": given, "agent": agent}


def render_channel_sets(metrics: MetricTable, model: str) -> str:
    """Render the alarms and idle machines of each channel set; at 5 s where the run has no windows of every second."""
    parts = []
    for recipe in ("held_out_both", "held_out_host"):
        body = []
        for channel_set in MODEL_CHANNEL_SETS:
            key = _build_key(recipe, channel_set, model)
            if find_row(metrics, "macro_f1", **key) is None:
                continue
            is_live = find_row(metrics, "infection_recall_30s", **key) is not None
            names = [n if is_live or not n.startswith(("infection", "activity")) else f"{n}_at_5s" for n in _OPERATOR]
            cells = [render_cell(find_row(metrics, name, **key)) for name in names]
            body.append([channel_set, "1 s" if is_live else "5 s", *cells])
        if body:
            parts.append(f"`{recipe}`:\n\n" + table([["channel set", "stride", *_OPERATOR.values()], *body]))
    return "## Alarms by channel set\n\n" + "\n\n".join(parts) if parts else ""


_OPERATOR = {name: words for name, words in OPERATOR_COLUMNS.items() if not name.endswith("new_host")}


def render_other_lab(others: Sequence[tuple[str, MetricTable]]) -> str:
    """Render models that were trained in one laboratory and tested in the other.

    Args:
        others: Title of the rows, and metrics of `phasewatch predict --metrics`.
    """
    body = []
    for title, metrics in others:
        rows = metrics.select(
            "macro_f1", overall=True, seed="mean", recipe=OTHER_STORE, fold="pooled", compared_to=None
        )
        for row in rows:
            if row.agent != AGENT.get(row.channel_set, "off"):
                continue
            key = {"channel_set": row.channel_set, "model": row.model, "agent": row.agent}
            size = f"{row.n_episodes} episodes, {row.n_hosts} hosts"
            cells = [render_cell(find_row(metrics, m, **key)) for m in _OTHER_COLUMNS]
            body.append([title, row.channel_set, size, *cells])
    if not body:
        return ""
    about = (
        "Nothing is fitted to the tested store: scaling, temperature and alarm thresholds are those of the training. "
        "lab-v1 has no channels of `extended`, `flows`, `dns`, `blocks` and `dirty`, so only base channels are asked."
    )
    return f"## Other laboratory\n\n{about}\n\n" + table(
        [["trained → tested", "channel set", "test", *_OTHER_COLUMNS.values()], *body]
    )


def render_sensors(metrics: MetricTable, model: str) -> str:
    """Render the value of each new sensor: `extended` without it less `extended`, paired over the same sessions."""
    body = []
    for recipe in ("held_out_host", "held_out_both"):
        for name in SENSOR_SETS:
            key = _build_key(recipe, f"extended-{name}", model)
            body.append([recipe, f"`extended` − `{name}`", *_render_gaps(metrics, "without", "extended", key)])
        for other in ("extended", "libvirt", "portable", "device"):
            key = _build_key(recipe, other, model)
            body.append([recipe, f"`{other}` against `realistic`", *_render_gaps(metrics, "threat", "realistic", key)])
    body = [row for row in body if any("not_tested" not in cell for cell in row[2:])]
    if not body:
        return ""
    about = "A negative gap of `extended` − a sensor is what the sensor is worth. p by Holm over the family."
    head = ["recipe", "compared", "gap, 3 states", "p (Holm)", "gap, 5 phases", "p (Holm)"]
    return f"## Value of each sensor\n\n{about}\n\n{table([head, *body])}"


def _render_gaps(metrics: MetricTable, kind: str, base: str, key: Mapping[str, object]) -> list[str]:
    cells = []
    for metric in ("macro_f1_3class", "macro_f1"):
        rows = metrics.select(f"{metric}_{kind}_gap", overall=True, seed="mean", compared_to=base, **key)
        if not rows:
            cells += ["`not_tested`", ""]
            continue
        p = rows[0].p_holm
        cells += [_render_or_code(rows[0], sign=True), "" if p is None else f"{p:.3f}"]
    return cells


def render_twins(report: TwinReport | None) -> str:
    """Render how well each sample is told from its declared benign twin, by channel set."""
    if report is None or not report.pairs:
        return ""
    names = list(report.pairs[0].areas)
    head = ["sample", "twin", "windows", "called infecting or active", *(f"AUC `{name}`" for name in names)]
    body = [
        [
            f"`{pair.sample}`",
            f"`{pair.twin}`",
            f"{pair.n_sample} and {pair.n_twin}",
            f"{_render_share(pair.called_sample)} and {_render_share(pair.called_twin)}",
            *(f"`{pair.code}`" if area is None else f"{area:.2f}" for area in pair.areas.values()),
        ]
        for pair in report.pairs
    ]
    if report.means:
        body.append(["**mean of the pairs**", "", "", "", *(_render(report.means.get(n)) for n in names)])
    if report.gaps:
        gaps = [_render(report.gaps.get(n), sign=True) if n in report.gaps else "" for n in names]
        body.append(["paired gap to `extended`", "", "", "", *gaps])
    scores = [[name, f"{n:,}", _render((value, low, high))] for name, (value, low, high, n) in report.scores.items()]
    about = (
        f"`{report.model}`, `{report.recipe}`. Active windows of the sample, and windows of benign episodes in which "
        "its twin ran. The AUC is the chance that a window of the sample has the higher activity score; 0.5 is chance."
    )
    return (
        f"## Twins\n\n{about}\n\n{table([head, *body])}\n\nBenign episodes and:\n\n"
        f"{table([['malicious episodes of', 'windows', 'macro-F1, 3 states'], *scores])}"
    )


def _render_share(value: float | None) -> str:
    return "·" if value is None else f"{value:.0%}"


def _render(found: _Interval | None, *, sign: bool = False) -> str:
    if found is None:
        return "`too_few_windows`"
    value, low, high = found
    number = f"{value:+.2f}" if sign else f"{value:.2f}"
    return f"{number} (no interval)" if low is None or high is None else f"{number} [{low:.2f}, {high:.2f}]"


def render_curves(curves: CurveFile | None) -> str:
    """Render the learning curves."""
    if curves is None:
        return ""
    body = [
        [
            point.unit,
            f"{point.share:.3g}",
            "as many of all" if point.control else "",
            f"{point.n_units:.0f}",
            f"{point.n_episodes:.0f}",
            *(_render_score(point.scores[m], point.code) for m in ("macro_f1_3class", "macro_f1")),
        ]
        for point in curves.points
    ]
    about = (
        f"`gbt` on `{curves.channel_set}`, {len(curves.folds)} of {curves.n_folds} folds of `{curves.recipe}`, fitted "
        "to a part of the train set. Parts are nested. *As many of all*: the same number of episodes, drawn from all."
    )
    head = ["part of the", "share", "", "units", "episodes", "3 states", "5 phases"]
    return f"## Learning curves\n\n{about}\n\n{table([head, *body])}"


def _render_score(score: tuple[float | None, float | None, float | None], code: str | None) -> str:
    value, low, high = score
    if value is None:
        return f"`{code}`"
    return f"{value:.2f} (`{code}`)" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def render_missing(results: Sequence[RecipeResult], metrics: MetricTable, model: str) -> str:
    """Render the recipes and channel sets without a number, with the code of the reason."""
    why = {r.recipe: r.why for r in results}
    body = []
    for recipe in (r.name for r in SPLIT_RECIPES if r.tests):
        if why.get(recipe):
            body.append([f"`{recipe}`", "all", "`cannot_be_built`", why[recipe]])
            continue
        wanted = MODEL_CHANNEL_SETS if recipe in HOST_RECIPES[:3] else MODEL_CHANNEL_SETS[:1]
        lacking = [n for n in wanted if find_row(metrics, "macro_f1", **_build_key(recipe, n, model)) is None]
        if lacking:
            body.append(
                [f"`{recipe}`", ", ".join(f"`{n}`" for n in lacking), "`not_tested`", "not trained in this run"]
            )
    head = ["recipe", "channel sets", "code", "reason"]
    return f"## What cannot be said\n\n{table([head, *body])}" if body else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Render the results of lab-v2.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--store", type=Path, required=True, help="the store of the run, for the loads of its episodes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--title", default="lab-v2: scores of all models")
    parser.add_argument("--other", action="append", default=[], metavar="TITLE=METRICS.json")
    parser.add_argument("--curves", type=Path)
    given = parser.parse_args(arguments)
    metrics, audit = read_metrics(given.run), read_audit(given.run)
    model = select_headline(metrics.metrics).model
    tested = {row.recipe for row in metrics.metrics}
    recipe = next((r for r in ("held_out_both", "held_out_host") if r in tested), None)
    others = [
        (title, parse_metrics(Path(path).read_bytes(), file=path))
        for title, _, path in (text.partition("=") for text in given.other)
    ]
    loads = read_load_spans(given.store, given.run)
    sections = [
        render(metrics, read_split_notes(given.run), audit, title=given.title, command=given.command).rstrip("\n"),
        render_hosts(metrics, model),
        render_channel_sets(metrics, model),
        render_other_lab(others),
        render_sensors(metrics, model),
        render_twins(compare_twins(given.run, loads, recipe=recipe, model=model) if recipe else None),
        render_curves(read_curves(given.curves) if given.curves else None),
        render_missing(read_recipe_results(given.run), metrics, model),
    ]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n\n".join(part for part in sections if part) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
