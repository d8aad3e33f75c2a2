"""Report section on error analysis: scores by phase, profile, host and sample, confusion matrix, three episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from phasewatch.artifacts import METRICS_FILE, PREDICTIONS_FILE
from phasewatch.evaluation import query
from phasewatch.evaluation.leaderboard import ELAPSED_TIME
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, ConfusionMatrix, MetricRow, select_rows
from phasewatch.report import charts
from phasewatch.report.data import EpisodeRibbon, HeadlineWindows, choose_episodes
from phasewatch.report.layout import (
    ReportBlock,
    ReportSection,
    ReportTable,
    build_metric_table,
    build_score_mark,
    join_words,
    render_count,
    render_number,
)
from phasewatch.splits import Fold
from phasewatch.types import PHASES, STRIDE_S

__all__ = ["EVALUATE_COMMAND", "NO_METRICS", "ReportContext", "build_error_section"]

EVALUATE_COMMAND = "phasewatch evaluate RUN && phasewatch report RUN"
NO_METRICS = f"{METRICS_FILE} has no row for this; `phasewatch evaluate RUN` computes it."
_NO_WINDOWS = (
    f"{PREDICTIONS_FILE} has no test window of the headline's model; `phasewatch train RUN` writes the predictions."
)

_CLASSES_NOTE = "Each score covers the phases that occur in the group."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportContext:
    """Data that all sections use.

    Attributes:
        rows: Metric rows of the headline's split, input and filter; `all_rows` holds all others too.
        model: Name of the model that the report is about; None if no row names one.
        windows: Test windows of that model; None without any.
        origin: Origin of the episodes: recorded, simulated or both.
    """

    rows: tuple[MetricRow, ...]
    all_rows: tuple[MetricRow, ...]
    model: str | None
    windows: HeadlineWindows | None
    origin: str


def build_error_section(context: ReportContext, folds: Sequence[Fold]) -> ReportSection:
    """Build the section from the rows and test windows of the headline's model."""
    labels = [str(p) for p in PHASES]
    blocks = [_build_group_block(context, "class", "By phase", "phase", labels)]
    profiles, hosts = _find_group_names(context, "profile"), _find_group_names(context, "host_id")
    blocks.append(_build_group_block(context, "profile", "By profile", "profile", profiles))
    blocks.append(_build_group_block(context, "host", "By host", "host_id", hosts))
    blocks += [_build_sample_block(context), _build_host_profile_block(context, folds)]
    blocks.append(_build_confusion_block(context))
    if context.windows is None:
        blocks.append(ReportBlock(key="ribbons", title="Three episodes", absent=_NO_WINDOWS, command=EVALUATE_COMMAND))
    else:
        blocks += [_build_ribbon_block(context, context.windows, shown) for shown in choose_episodes(context.windows)]
    return ReportSection(key="fails", title="Error analysis", blocks=tuple(blocks))


def _find_group_names(context: ReportContext, key: str) -> list[str]:
    """Return the groups that have rows, sorted, with the profiles that the evaluation lists as untested."""
    own = {str(getattr(r, key)) for r in context.rows if r.model == context.model and getattr(r, key) is not None}
    untested = {r.profile for r in context.rows if key == "profile" and r.metric == "untested_profile" and r.profile}
    return sorted(own | untested)


def _build_group_block(context: ReportContext, key: str, title: str, field: str, names: list[str]) -> ReportBlock:
    metric = query.choose_group_metric(context.rows, model=context.model, by=(field,)) if context.model else None
    base = ReportBlock(key=f"by-{key}", title=title, command=EVALUATE_COMMAND)
    if context.model is None or metric is None:
        return replace(base, absent=NO_METRICS)
    words = query.METRIC_LABELS[metric]
    own = [(n, query.find_score(context.rows, metric, model=context.model, **{field: n})) for n in names]
    series, table = [], []
    for model in (context.model, ELAPSED_TIME):
        found = [(n, query.find_score(context.rows, metric, model=model, **{field: n})) for n in names]
        if model == context.model or any(row is not None for _, row in found):
            series.append(
                charts.ScoreSeries(
                    name=query.render_model_name(model), scores=tuple(build_score_mark(n, row) for n, row in found)
                )
            )
            table += [(n, f"{words}, {query.render_model_name(model)}", row) for n, row in found]
    return replace(
        base,
        sentences=(
            f"{words[0].upper()}{words[1:]} of {context.model} on unseen hosts, with the elapsed-time baseline.",
            *((_CLASSES_NOTE,) if metric == "macro_f1" else ()),
            *_describe_range(words, own),
            *(_describe_host_spread(context) if field == "host_id" else ()),
        ),
        figure=charts.draw_intervals(series, title=words, origin=context.origin),
        table=build_metric_table(table),
    )


def _describe_host_spread(context: ReportContext) -> tuple[str, ...]:
    """Describe the mean over hosts; without an interval (fewer than twenty hosts) give the reason."""
    row = query.find_overall_row(
        context.rows,
        "macro_f1_mean_of_hosts",
        model=context.model,
        channel_set=DEFAULT_HEADLINE.channel_set,
        agent=DEFAULT_HEADLINE.agent,
    )
    if row is None or row.value is None:
        return ()
    if row.low is not None and row.high is not None:
        return (f"Mean over hosts: {row.value:.2f} [{row.low:.2f}, {row.high:.2f}].",)
    return (f"No interval for the variance between hosts: {row.note}.",)


def _build_sample_block(context: ReportContext) -> ReportBlock:
    """List the score of every sample with its profile, because sample names are unique within a profile only."""
    found = [
        r
        for r in select_rows(
            context.rows,
            "macro_f1",
            model=context.model,
            channel_set=DEFAULT_HEADLINE.channel_set,
            agent=DEFAULT_HEADLINE.agent,
        )
        if r.sample_name is not None
    ]
    base = ReportBlock(key="by-sample", title="By sample", command=EVALUATE_COMMAND)
    if not found:
        return replace(base, absent=NO_METRICS)
    ranked = sorted(found, key=lambda r: (r.value or 0.0, r.profile or "", r.sample_name or ""))
    table = build_metric_table([(f"{r.profile}, {r.sample_name}", "macro-F1", r) for r in ranked])
    sentences = (
        f"Macro-F1 of {context.model} by sample, lowest score first. Each sample has only a few episodes, so single "
        "scores are uncertain.",
    )
    return replace(base, sentences=sentences, table=table)


def _describe_range(words: str, found: list[tuple[str, MetricRow | None]]) -> tuple[str, ...]:
    known = sorted((row.value, name) for name, row in found if row is not None and row.value is not None)
    missing = [name for name, row in found if row is None or row.value is None]
    sentences = []
    if any(row is not None and row.value is not None and row.low is None for _, row in found):
        sentences.append("Marks without whiskers have too few sessions for an interval; the table gives the reason.")
    if len(known) > 1:
        (low, worst), (high, best) = known[0], known[-1]
        sentences.append(f"{words[0].upper()}{words[1:]} ranges from {low:.2f} ({worst}) to {high:.2f} ({best}).")
    if missing:
        sentences.append(f"No score for {join_words(missing)}: no test window, or no row in {METRICS_FILE}.")
    return tuple(sentences)


def _build_host_profile_block(context: ReportContext, folds: Sequence[Fold]) -> ReportBlock:
    base = ReportBlock(key="host-profile", title="Host × profile", command=EVALUATE_COMMAND)
    tested = context.windows.count_episodes() if context.windows is not None else {}
    metric = (
        query.choose_group_metric(context.rows, model=context.model, by=("host_id", "profile"))
        if context.model
        else None
    )
    absent = {p for fold in folds for p in fold.untested_profiles}
    known = {(c.host_id, c.profile) for fold in folds for c in fold.coverage}
    hosts = sorted({h for h, _ in tested} | {h for h, _ in known})
    profiles = sorted({p for _, p in tested} | {p for _, p in known} | absent)
    if not tested:
        return replace(base, absent=_NO_WINDOWS)

    def row(host: str, profile: str) -> MetricRow | None:
        if context.model is None or metric is None:
            return None
        return query.find_score(context.rows, metric, model=context.model, host_id=host, profile=profile)

    cells = tuple(
        charts.HeatMapCell(
            host_id=h, profile=p, n_episodes=tested.get((h, p), 0), value=r.value if (r := row(h, p)) else None
        )
        for h in hosts
        for p in profiles
    )
    empty = [c for c in cells if not c.n_episodes]
    words = query.METRIC_LABELS[metric] if metric else "test episodes"
    body = tuple(
        (
            c.host_id,
            c.profile,
            str(c.n_episodes) if c.n_episodes else "untested",
            render_number(c.value) if c.n_episodes else "–",
        )
        for c in cells
    )
    return replace(
        base,
        sentences=(
            f"{len(cells) - len(empty)} of {render_count(len(cells), 'cell')} (host × profile) have a scored test "
            "episode. Hatched cells are untested.",
            "Each cell has only a few episodes, so single scores are uncertain."
            if metric
            else f"{METRICS_FILE} has no score per cell; the shade shows the number of test episodes.",
        ),
        figure=charts.draw_heat_map(cells, hosts=hosts, profiles=profiles, title=words, origin=context.origin),
        table=ReportTable(
            columns=("host", "profile", "episodes", words), numeric=(False, False, True, True), rows=body
        ),
    )


def _build_confusion_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(key="confusion", title="Confusion matrix", absent=NO_METRICS, command=EVALUATE_COMMAND)
    matrix = query.build_confusion_matrix(context.all_rows, model=context.model) if context.model else None
    if matrix is None:
        return base

    def size(n: float) -> str:
        return f"{n:,.0f}" if n == round(n) else f"{n:,.1f}"

    rows = tuple(
        (truth, *(size(n) for n in row), size(sum(row)))
        for truth, row in zip(matrix.labels, matrix.counts, strict=True)
    )
    columns = ("true phase, predicted →", *matrix.labels, "all")
    return replace(
        base,
        absent="",
        sentences=(
            f"Number of test windows of {context.model} by true phase (rows) and predicted phase (columns), averaged "
            f"over seeds; {sum(map(sum, matrix.counts)):,.0f} windows in total.",
            *_describe_worst_confusion(matrix),
        ),
        figure=charts.draw_confusion(matrix, origin=context.origin),
        table=ReportTable(columns=columns, numeric=(False, *(True,) * (len(columns) - 1)), rows=rows),
    )


def _describe_worst_confusion(matrix: ConfusionMatrix) -> tuple[str, ...]:
    wrong = [
        (n, sum(row), truth, decided)
        for truth, row in zip(matrix.labels, matrix.counts, strict=True)
        for decided, n in zip(matrix.labels, row, strict=True)
        if n and truth != decided
    ]
    if not wrong:
        return ("No window was misclassified.",)
    n, total, truth, decided = max(wrong)
    return (f"Most frequent error: {n:,.0f} of {total:,.0f} windows of {truth} predicted as {decided}.",)


def _build_ribbon_block(context: ReportContext, windows: HeadlineWindows, shown: EpisodeRibbon) -> ReportBlock:
    names = [str(p) for p in PHASES]
    body = tuple((f"{w.t_s:.0f}", names[w.truth], names[w.decided], *(f"{v:.2f}" for v in w.p)) for w in shown.windows)
    return ReportBlock(
        key=f"ribbon-{shown.rank.split()[0]}",
        title=f"Test episode ({shown.rank}): {shown.profile}, {shown.sample_name}",
        sentences=(
            f"Episode {shown.episode_id} on host {shown.host_id}, {render_count(len(shown.windows), 'window')}. "
            "Episodes are ranked by accuracy, among those with more than one phase if there are at least three.",
            "Top: true and predicted phase; opacity shows the probability. Bottom: probability of each phase (darker "
            "is higher), with a frame at the true phase.",
        ),
        figure=charts.draw_ribbon(shown.windows, stride_s=STRIDE_S, origin=context.origin),
        table=ReportTable(
            columns=("seconds", "true phase", "predicted", *(f"p({n})" for n in names)),
            numeric=(True, False, False, *(True,) * len(names)),
            rows=body,
        ),
        command="phasewatch train RUN && phasewatch report RUN",
    )
