"""Render a run's metrics as Markdown tables: `python -m tools.results RUN --out PAGE.md --command "..."`.

Every number is a row of the run's metrics file; a number without a row is not shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from phasewatch.artifacts import PREDICTIONS_FILE, SPLITS_DIR
from phasewatch.audit.checks import AuditReport, AuditRow
from phasewatch.audit.run import read_audit
from phasewatch.audit.shortcut_checks import IDLE_CHECK, LOAD_CHECK, SPLICE_CHECK
from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.evaluation.headline import build_headline, render_headline
from phasewatch.evaluation.metric_table import (
    DEFAULT_HEADLINE,
    HEADLINE_RECIPES,
    MetricRow,
    MetricTable,
    select_headline,
)
from phasewatch.models import registry
from phasewatch.report.summary import IN_DISTRIBUTION, describe_inversion
from phasewatch.splits import SPLIT_RECIPES, Recipe, parse_fold
from tools.headline import count_profiles

# Channel set → whether the guest's agent ran in the episodes that it is scored on.
AGENT = {
    "realistic": "off",
    "extended": "off",
    "libvirt": "off",
    "portable": "off",
    "device": "on",
    "oracle": "on",
}
ORDER = [row.key for row in registry.BUILTIN_MODELS]


def read_split_notes(run: Path) -> dict[str, tuple[str, ...]]:
    """Read the caveats that the split files of each recipe carry."""
    notes: dict[str, dict[str, None]] = {}
    for path in sorted((run / SPLITS_DIR).glob("*.json")):
        fold = parse_fold(path.read_bytes(), file=str(path))
        if not fold.leaky:  # the page says so for the whole recipe
            notes.setdefault(fold.recipe, {}).update(dict.fromkeys(fold.notes))
    return {recipe: tuple(texts) for recipe, texts in notes.items()}


def render(
    metrics: MetricTable,
    notes: Mapping[str, Sequence[str]],
    audit: AuditReport | None = None,
    *,
    title: str,
    command: str,
) -> str:
    """Render the page.

    Args:
        notes: Split recipe → its caveats.
        audit: The run's audit; None without one.
        command: The command that made the run.
    """
    rows = [r for r in metrics.metrics if r.fold == "pooled"]
    digest = metrics.inputs.get(PREDICTIONS_FILE, "unknown")
    parts = [
        f"# {title}",
        f"Generated from one run, no number is typed in; its `{PREDICTIONS_FILE}` has sha256 `{digest}`.",
        f"```\n{command}\n```",
        f"**{render_headline(build_headline(metrics), audit.build_verdict() if audit else None)}**",
        "Intervals are 95 %, over sessions resampled within hosts; they cover these hosts, samples and seeds. "
        "Channel sets with the guest's own channels (`oracle`, `device`) are scored on test episodes with its agent, "
        "the others on those without. "
        "Baselines are in italics.",
    ]
    parts += [_render_recipe(recipe, notes.get(recipe.name, ()), metrics, rows) for recipe in SPLIT_RECIPES]
    parts += [_render_pairwise_tests(rows, select_headline(metrics.metrics).model)]
    parts += [
        _render_operator_metrics(rows),
        _render_shortcuts(audit),
        _render_variants(rows),
        _render_seeds(rows),
        _render_notes(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _render_recipe(recipe: Recipe, notes: Sequence[str], metrics: MetricTable, rows: Sequence[MetricRow]) -> str:
    name = recipe.name
    lines = []
    for channel_set, agent in AGENT.items():
        scored = [r for r in rows if _scored_on(r) == (name, "pooled", channel_set, agent)]
        if body := _render_scores(scored):
            lines.append(f"`{channel_set}`, all trained folds, {describe_sample(scored)}:\n\n{body}")
    for fold in sorted({r.fold for r in metrics.metrics if r.recipe == name} - {"pooled"}):
        lines += _render_fold(name, fold, metrics, rows)
    if not lines:
        return ""
    if name == IN_DISTRIBUTION and (inversion := describe_inversion(metrics.metrics)):
        lines.append(inversion)
    caveats = ["**It leaks; never a headline.**"] if recipe.leaky else [f"**{n[0].upper()}{n[1:]}.**" for n in notes]
    return f"## {name}\n\n{' '.join((recipe.about, *caveats))}\n\n" + "\n\n".join(lines)


def _scored_on(row: MetricRow) -> tuple[str, str, str, str | None] | None:
    """Return recipe, fold, channel set and agent of a row of the plain input without smoothing; None for other rows."""
    if (row.input, row.smoothing) != ("raw", "none"):
        return None
    return row.recipe, row.fold, row.channel_set, row.agent


def _render_fold(name: str, fold: str, metrics: MetricTable, pooled: Sequence[MetricRow]) -> list[str]:
    """Render the scores of one fold if it has models that were not trained on all folds."""
    found = []
    for channel_set, agent in AGENT.items():
        scored = [r for r in metrics.metrics if _scored_on(r) == (name, fold, channel_set, agent)]
        overall = {r.model for r in pooled if _scored_on(r) == (name, "pooled", channel_set, agent)}
        if {r.model for r in scored} - overall and (body := _render_scores(scored)):
            found.append(f"`{channel_set}`, fold {fold} only, {describe_sample(scored)}:\n\n{body}")
    return found


def _render_scores(rows: Sequence[MetricRow]) -> str:
    five = {r.model: r for r in rows if is_whole(r) and base_metric(r) == "macro_f1" and r.seed == "mean"}
    three = {r.model: r for r in rows if is_whole(r) and base_metric(r) == "macro_f1_3class" and r.seed == "mean"}
    if not five:
        return ""
    ranked = sorted((m for m in five if m), key=lambda m: -(five[m].value or 0.0))
    body = []
    for model in ranked:
        by_host = [r for r in rows if r.model == model and r.host_id and not r.profile and r.value is not None]
        worst = min((r for r in by_host if base_metric(r) == "macro_f1"), key=lambda r: r.value or 0.0, default=None)
        lowest = "" if worst is None else f"{worst.value:.2f} ({worst.host_id})"
        name = f"*{model}*" if model in registry.BASELINE_MODELS else model
        body.append([name, render_interval(five[model]), render_interval(three.get(model)), lowest])
    tested, profiles = count_profiles(msgspec.to_builtins(five[ranked[0]]))
    return table([["model", f"macro-F1 ({tested} of {profiles} profiles)", "3 states", "worst host"], *body])


def _render_pairwise_tests(rows: Sequence[MetricRow], model: str) -> str:
    """Render the paired differences between the headline's model and every other, on the headline's recipe."""
    gaps = [
        r
        for r in rows
        if _scored_on(r) == ("held_out_host", "pooled", "realistic", "off")
        and base_metric(r) == "macro_f1_gap"
        and r.compared_to
        and is_whole(r, paired=True)
        and model in (r.model, r.compared_to)
    ]
    if not gaps:
        return ""
    body = [
        [f"{r.model} − {r.compared_to}", render_interval(r, sign=True), _render_p(r.p), _render_p(r.p_holm)]
        for r in gaps
    ]
    return (
        "## Pairwise tests\n\nPaired over the same sessions, `held_out_host`, `realistic`; Holm over all pairs.\n\n"
        + table([["pair", "difference of macro-F1", "p", "p (Holm)"], *body])
    )


# Check → (metric, stratum) → column of the table of shortcuts.
SHORTCUT_COLUMNS = {
    SPLICE_CHECK: {
        ("splice_auc_change", None): "AUC of p(active): loss by exchanged durations",
        ("splice_recall_change", None): "recall of long activity: loss",
    },
    LOAD_CHECK: {
        ("macro_f1_gap", None): "above load alone",
        ("macro_f1_3class_gap", "with_load"): "with a load (3 states)",
        ("macro_f1_3class_gap", "without_load"): "without (3 states)",
    },
    IDLE_CHECK: {("idle_called_quiet", None): "idle called quiet", ("idle_called_clean", None): "called clean"},
}
_LOAD_BASELINE = "load_only"


def _render_shortcuts(audit: AuditReport | None) -> str:
    """Render what the audit asked every model: exchanged durations, loads, idle machines; a broken limit is bold."""
    columns = [(name, at, title) for name, found in SHORTCUT_COLUMNS.items() for at, title in found.items()]
    found: dict[tuple[str, str], dict[tuple[str, str, str | None], AuditRow]] = {}
    for check in audit.checks if audit is not None else ():
        for row in check.rows:
            if row.compared_to in (None, _LOAD_BASELINE):
                found.setdefault((row.model, row.input), {})[check.name, row.metric, row.stratum] = row
    if not found:
        return ""
    body = [
        [model, given, *(_render_audit_row(cells.get((name, *at))) for name, at, _ in columns)]
        for (model, given), cells in sorted(found.items(), key=lambda item: (_rank(item[0][0]), item[0]))
    ]
    about = "From the audit of this run, on unseen hosts. A number beyond its limit is bold."
    return f"## Shortcuts\n\n{about}\n\n" + table([["model", "input", *(title for _, _, title in columns)], *body])


def _render_audit_row(row: AuditRow | None) -> str:
    if row is None or row.value is None:
        return ""
    return f"**{row.rendered_value}**" if row.holds is False else row.rendered_value


# Metric → column of the table of operator metrics.
OPERATOR_COLUMNS = {
    "infection_recall_30s": "infections announced within 30 s",
    "infection_miss_rate": "missed",
    "infection_delay_s": "median delay, s",
    "infection_soak_false_alarms_per_vm_hour": "false alarms per VM-hour, soak",
    "activity_recall_30s": "activity announced within 30 s",
    "activity_soak_false_alarms_per_vm_hour": "its false alarms, soak",
    "idle_called_clean": "idle called clean",
    "macro_f1_3class_with_load": "3 states with load",
    "macro_f1_3class_without_load": "3 states without",
    "macro_f1_3class_new_host": "3 states, a new host",
}


def _render_operator_metrics(rows: Sequence[MetricRow]) -> str:
    """Render alarms every second, idle machines and load strata of each model on unseen hosts and samples."""
    parts = []
    for recipe in HEADLINE_RECIPES:
        own = [r for r in rows if _scored_on(r) == (recipe, "pooled", "realistic", "off") and is_whole(r)]
        found: dict[str, dict[str, MetricRow]] = {}
        for r in own:
            if r.metric in OPERATOR_COLUMNS and r.model and r.bin is None and r.seed == "mean":
                found.setdefault(r.model, {})[r.metric] = r
        body = [
            [f"*{model}*" if model in registry.BASELINE_MODELS else model]
            + [render_interval(cells.get(metric)) for metric in OPERATOR_COLUMNS]
            for model, cells in sorted(found.items(), key=lambda item: _rank(item[0]))
            if model not in registry.BASELINE_MODELS
        ]
        if body:
            parts.append(f"`{recipe}`, `realistic`:\n\n" + table([["model", *OPERATOR_COLUMNS.values()], *body]))
    about = "Alarms decide every second; a column is empty where a model has no predictions every second."
    return f"## Alarms, idle machines, load\n\n{about}\n\n" + "\n\n".join(parts) if parts else ""


def _render_variants(rows: Sequence[MetricRow]) -> str:
    """Render other inputs, smoothing and channel sets."""
    variants = [
        r
        for r in sorted(rows, key=lambda r: (r.recipe, r.channel_set, _rank(r.model), r.input, r.smoothing))
        if is_whole(r)
        and base_metric(r) == "macro_f1"
        and r.seed == "mean"
        and r.agent == AGENT.get(r.channel_set)
        and (r.channel_set, r.input, r.smoothing) != (DEFAULT_HEADLINE.channel_set, DEFAULT_HEADLINE.input, "none")
        and (r.channel_set == DEFAULT_HEADLINE.channel_set or r.smoothing == "none")
    ]
    if not variants:
        return ""
    body = [
        [r.recipe, r.channel_set, r.agent or "on and off", str(r.model), r.input, r.smoothing, render_interval(r)]
        + [render_interval(_find_variant_gap(rows, r, metric), sign=True) for metric in ("macro_f1", "macro_f1_3class")]
        for r in variants
    ]
    about = (
        "`schedule` uses no telemetry: it predicts from the order and length of the phases alone. Gaps are paired over "
        "the same sessions, against the same model without smoothing, on raw values and `realistic` channels."
    )
    head = ["recipe", "channel set", "agent", "model", "input", "smoothing", "macro-F1", "gap", "gap, 3 states"]
    return f"## Smoothing, inputs, channel sets\n\n{about}\n\n" + table([head, *body])


def _find_variant_gap(rows: Sequence[MetricRow], variant: MetricRow, metric: str) -> MetricRow | None:
    """Return the row of a variant's paired gap, of the kind in which it differs; None if it differs in two."""
    kinds = {
        "filter": (variant.smoothing != "none", "none"),
        "table": (variant.input != "raw", "raw"),
        "threat": (variant.channel_set != "realistic", "realistic"),
    }
    changed = [(kind, base) for kind, (differs, base) in kinds.items() if differs]
    if len(changed) != 1:
        return None
    (kind, base) = changed[0]
    return next(
        (
            r
            for r in rows
            if (r.metric, r.compared_to, r.seed, r.agent) == (f"{metric}_{kind}_gap", base, "mean", variant.agent)
            and (r.recipe, r.channel_set, r.model, r.input, r.smoothing)
            == (variant.recipe, variant.channel_set, variant.model, variant.input, variant.smoothing)
            and is_whole(r, paired=True)
        ),
        None,
    )


def _render_seeds(rows: Sequence[MetricRow]) -> str:
    found: dict[tuple[str, str], dict[int, MetricRow]] = {}
    for r in rows:
        is_score = is_whole(r) and base_metric(r) == "macro_f1" and isinstance(r.seed, int)
        if is_score and _scored_on(r) == (r.recipe, "pooled", "realistic", "off"):
            found.setdefault((r.recipe, r.model or ""), {})[int(str(r.seed))] = r
    body = [
        [recipe, model, *(render_interval(seeds.get(s)) for s in range(3))]
        for (recipe, model), seeds in sorted(found.items(), key=lambda item: (item[0][0], _rank(item[0][1])))
        if len(seeds) > 1
    ]
    return "## Seeds\n\n" + table([["recipe", "model", "seed 0", "seed 1", "seed 2"], *body]) if body else ""


def _render_notes(rows: Sequence[MetricRow]) -> str:
    notes = sorted({r.note for r in rows if r.metric == "note" and r.note and _scored_on(r)})
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def base_metric(row: MetricRow) -> str:
    """Return the metric's name without the coverage that older files append to it."""
    return row.metric.partition("@")[0]


def is_whole(row: MetricRow, *, paired: bool = False) -> bool:
    """Whether a row covers all phases, profiles, hosts and samples; `paired` allows a row that compares two models."""
    parts: list[object] = [row.phase, row.profile, row.host_id, row.sample_name]
    return all(part is None for part in (*parts, None if paired else row.compared_to))


def describe_sample(rows: Sequence[MetricRow]) -> str:
    """Describe how many episodes, sessions, hosts and windows the scores rest on."""
    r = next(r for r in rows if is_whole(r) and r.n_episodes)
    hosts = "host" if r.n_hosts == 1 else "hosts"
    return f"{r.n_episodes} episodes in {r.n_sessions} sessions of {r.n_hosts} {hosts}, {r.n_windows:,} windows"


def render_interval(row: MetricRow | None, *, sign: bool = False) -> str:
    """Render a value with its interval, or with the reason why it has none."""
    if row is None or row.value is None:
        return ""
    value = f"{row.value:+.2f}" if sign else f"{row.value:.2f}"
    if row.low is None or row.high is None:
        return f"{value} (no interval: {row.note})"
    return f"{value} [{row.low:.2f}, {row.high:.2f}]"


def _render_p(p: float | None) -> str:
    return "" if p is None else f"{p:.4f}" if p >= 0.001 else "< 0.001"


def _rank(model: str | None) -> int:
    return ORDER.index(model) if model in ORDER else len(ORDER)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table; the first row is its head."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def main() -> None:
    """Write the page that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--command", required=True, help="the command that made the run, as the page shows it")
    parser.add_argument("--title", default="lab-v1: scores of all models")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    metrics, notes = read_metrics(given.run), read_split_notes(given.run)
    given.out.write_text(
        render(metrics, notes, read_audit(given.run), title=given.title, command=given.command), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
