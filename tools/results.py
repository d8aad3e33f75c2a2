"""Set a run's numbers in tables: `python -m tools.results RUN --out docs/results/lab-v1.md --command "..."`.

Every number is a row of the run's `metrics_v2.json`; what has no row is not shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from phasewatch.artifacts import PREDICTIONS_FILE
from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.evaluation.metric_table import MetricRow, MetricTable, render_headline, select_headline, select_rows
from phasewatch.models import registry
from phasewatch.report.summary import IN_DISTRIBUTION, describe_inversion
from phasewatch.splits import SPLIT_RECIPES, Recipe, parse_fold

AGENT = {"realistic": "off", "portable": "off", "oracle": "on"}  # whose episodes a threat model is scored on
ORDER = [row.key for row in registry.BUILTIN_MODELS]


def notes_of(run: Path) -> dict[str, tuple[str, ...]]:
    """Read what the splits of each recipe say that a reader of their scores must know."""
    found: dict[str, dict[str, None]] = {}
    for path in sorted((run / "splits").glob("*.json")):
        fold = parse_fold(path.read_bytes(), file=str(path))
        if not fold.leaky:  # the page says that of the recipe
            found.setdefault(fold.recipe, {}).update(dict.fromkeys(fold.notes))
    return {recipe: tuple(words) for recipe, words in found.items()}


def render(metrics: MetricTable, notes: Mapping[str, Sequence[str]], *, title: str, command: str) -> str:
    """Give the page."""
    rows = [r for r in metrics.metrics if r.fold == "pooled"]
    digest = metrics.inputs.get(PREDICTIONS_FILE, "unknown")
    parts = [
        f"# {title}",
        f"Generated from the numbers of one run, none typed in; its `{PREDICTIONS_FILE}` has sha256 `{digest}`.",
        f"```\n{command}\n```",
        f"**{render_headline(metrics)}**",
        "Intervals are 95 %, over sessions resampled within hosts, and hold for these hosts, samples and seeds. "
        "`realistic` and `portable` are scored on test episodes without the guest's agent, `oracle` on those with it. "
        "A baseline is set in italics. `macro_f1, 5 of 6 profiles` gives how many of the malicious profiles were tested.",
    ]
    parts += [of for row in SPLIT_RECIPES if (of := _recipe(row, notes.get(row.name, ()), metrics, rows))]
    parts += [_significance(rows, select_headline(metrics.metrics).model), _variants(rows), _seeds(rows), _notes(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _recipe(recipe: Recipe, notes: Sequence[str], metrics: MetricTable, rows: Sequence[MetricRow]) -> str:
    name = recipe.name
    mine = select_rows(rows, recipe=name, input="raw", smoothing="none")
    threats = [t for t in AGENT if any(r.channel_set == t for r in mine)]
    lines = []
    for threat in threats:
        of = select_rows(mine, channel_set=threat, agent=AGENT[threat])
        if body := _scores(of):
            lines.append(f"`{threat}`, all folds that were trained, {standing(of)}:\n\n{body}")
    for fold in sorted({r.fold for r in metrics.metrics if r.recipe == name} - {"pooled"}):
        lines += _one_fold(name, fold, metrics, rows)
    if not lines:
        return ""
    if name == IN_DISTRIBUTION and (words := describe_inversion(metrics.metrics)):
        lines.append(words)
    said = ["**It leaks; never a headline.**"] if recipe.leaky else [f"**{w[0].upper()}{w[1:]}.**" for w in notes]
    return f"## {name}\n\n{' '.join((recipe.about, *said))}\n\n" + "\n\n".join(lines)


def _one_fold(name: str, fold: str, metrics: MetricTable, pooled: Sequence[MetricRow]) -> list[str]:
    """Give the table of a fold on which more models stand than on all folds together."""
    found = []
    for threat, agent in AGENT.items():
        where = {"recipe": name, "channel_set": threat, "agent": agent, "input": "raw", "smoothing": "none"}
        here = metrics.select(fold=fold, **where)
        overall = {r.model for r in select_rows(pooled, **where)}
        if {r.model for r in here} - overall and (body := _scores(here)):
            found.append(f"`{threat}`, fold {fold} alone, {standing(here)}:\n\n{body}")
    return found


def _scores(rows: Sequence[MetricRow]) -> str:
    whole = select_rows(rows, overall=True, compared_to=None, seed="mean")
    five = {r.model: r for r in select_rows(whole, "macro_f1")}
    three = {r.model: r for r in select_rows(whole, "macro_f1_3class")}
    if not five:
        return ""
    ranked = sorted((m for m in five if m), key=lambda m: -(five[m].value or 0.0))
    body = []
    for model in ranked:
        worst = min(
            (r for r in select_rows(rows, "macro_f1", model=model, profile=None) if r.host_id and r.value is not None),
            key=lambda r: r.value or 0.0,
            default=None,
        )
        low = "" if worst is None else f"{worst.value:.2f} ({worst.host_id})"
        named = f"*{model}*" if model in registry.BASELINE_MODELS else model
        body.append([named, span(five[model]), span(three.get(model)), low])
    first = five[ranked[0]]
    name = f"{first.metric}, {first.n_profiles_tested} of {first.n_profiles} profiles"
    return table([["model", name, "3 states", "worst host"], *body])


def _significance(rows: Sequence[MetricRow], model: str) -> str:
    """Hold every model of the headline's recipe against the headline's, paired."""
    mine = select_rows(
        rows,
        "macro_f1_gap",
        overall=True,
        recipe="held_out_host",
        channel_set="realistic",
        input="raw",
        smoothing="none",
        agent="off",
    )
    if not mine:
        return ""
    body = [
        [f"{r.model} − {r.compared_to}", span(r, sign=True), _p(r.p), _p(r.p_holm)]
        for r in mine
        if model in (r.model, r.compared_to)
    ]
    return (
        "## Is the difference significant?\n\nPaired over the same sessions, `held_out_host`, `realistic`; Holm over all pairs.\n\n"
        + table([["pair", "gap of macro-F1", "p", "p (Holm)"], *body])
    )


def _variants(rows: Sequence[MetricRow]) -> str:
    """Show filters and tables beside the plain ones."""
    body = [
        [str(r.recipe), str(r.channel_set), str(r.model), r.input, r.smoothing, span(r)]
        for r in sorted(
            select_rows(rows, "macro_f1", overall=True, compared_to=None, seed="mean"),
            key=lambda r: (r.recipe, r.channel_set, _place(r.model), r.input, r.smoothing),
        )
        if r.agent == AGENT.get(r.channel_set)
        and ((r.input, r.smoothing) != ("raw", "none") or r.channel_set == "portable")
    ]
    if not body:
        return ""
    words = "`schedule` hears no telemetry at all: what the order and length of phases alone would tell."
    return f"## Filters, tables, masks\n\n{words}\n\n" + table(
        [["recipe", "threat", "model", "table", "filter", "macro-F1"], *body]
    )


def _seeds(rows: Sequence[MetricRow]) -> str:
    found: dict[tuple[str, str], dict[int, MetricRow]] = {}
    where = {"channel_set": "realistic", "input": "raw", "smoothing": "none", "agent": "off", "compared_to": None}
    for r in select_rows(rows, "macro_f1", overall=True, **where):
        if isinstance(r.seed, int):
            found.setdefault((r.recipe, r.model or ""), {})[r.seed] = r
    body = [
        [recipe, model, *(span(seeds.get(s)) for s in range(3))]
        for (recipe, model), seeds in sorted(found.items(), key=lambda item: (item[0][0], _place(item[0][1])))
        if len(seeds) > 1
    ]
    return "## Seeds\n\n" + table([["recipe", "model", "seed 0", "seed 1", "seed 2"], *body]) if body else ""


def _notes(rows: Sequence[MetricRow]) -> str:
    told = sorted({r.note for r in select_rows(rows, "note", input="raw", smoothing="none") if r.note})
    return "## To be said\n\n" + "\n".join(f"- {words}" for words in told) if told else ""


def is_whole(row: MetricRow) -> bool:
    """Return whether a row is a score over all phases, profiles, hosts and samples."""
    return bool(select_rows([row], overall=True, compared_to=None))


def standing(rows: Sequence[MetricRow]) -> str:
    """Say over how much the numbers stand."""
    r = next(r for r in rows if is_whole(r) and r.n_episodes)
    return f"{r.n_episodes} episodes in {r.n_sessions} sessions of {r.n_hosts} {'host' if r.n_hosts == 1 else 'hosts'}, {r.n_windows:,} windows"


def span(row: MetricRow | None, *, sign: bool = False) -> str:
    """Set a value with its interval, or the words why it has none."""
    if row is None or row.value is None:
        return ""
    value = f"{row.value:+.2f}" if sign else f"{row.value:.2f}"
    return (
        f"{value} [{row.low:.2f}, {row.high:.2f}]"
        if row.low is not None and row.high is not None
        else f"{value} (no interval: {row.note})"
    )


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.4f}" if p >= 0.001 else "< 0.001"


def _place(model: str | None) -> int:
    return ORDER.index(model) if model in ORDER else len(ORDER)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Set a Markdown table; the first row is its head."""
    head, *body = rows
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *("| " + " | ".join(row) + " |" for row in body)]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--command", required=True, help="what made the run, as the page shows it")
    parser.add_argument("--title", default="lab-v1: what the models scored")
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(render(read_metrics(asked.run), notes_of(asked.run), title=asked.title, command=asked.command))
