"""Assemble the report page: headline, notices and sections; and the section on leakage by split protocol."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch._version import __version__
from phasewatch.artifacts import METRICS_FILE
from phasewatch.audit.checks import AuditReport
from phasewatch.evaluation import query
from phasewatch.evaluation.detection import HEADLINE_TIME_S
from phasewatch.evaluation.headline import (
    Headline,
    HeadlineBlock,
    HeadlineNumber,
    HeadlineVerdict,
    build_headline,
    render_headline,
)
from phasewatch.evaluation.leaderboard import ELAPSED_TIME, LOAD_ONLY
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow
from phasewatch.report import charts
from phasewatch.report.alarms import build_alarm_section
from phasewatch.report.audit import describe_audit, describe_failed_audit
from phasewatch.report.calibration import build_calibration_section
from phasewatch.report.charts import SvgFigure
from phasewatch.report.coverage import (
    build_coverage_section,
    build_reproducibility_section,
)
from phasewatch.report.data import ReportData, describe_origin, select_headline_windows
from phasewatch.report.errors import EVALUATE_COMMAND, ReportContext, build_error_section
from phasewatch.report.importance import build_importance_section
from phasewatch.report.layout import (
    HeadlineClaim,
    HeadlineTile,
    ReportBlock,
    ReportPage,
    ReportSection,
    ReportTable,
    build_score_mark,
    render_count,
    render_interval,
    render_number,
)
from phasewatch.report.leaderboard import TRAIN_ALL_COMMAND, build_leaderboard_section
from phasewatch.training.predictions import NO_FILTER

__all__ = ["IN_DISTRIBUTION", "build_page", "build_protocol_section", "describe_inversion", "describe_protocol_scores"]

_PROTOCOL_MODEL = DEFAULT_HEADLINE.model  # one model under all recipes, whichever model the headline is about
_RANDOM_WINDOWS = "random_windows"
IN_DISTRIBUTION = "in_distribution"
_HELD_OUT_HOST = "held_out_host"
_HELD_OUT_BOTH = "held_out_both"
# Recipe → name and description, from the easiest split to the hardest.
_PROTOCOL_LABELS = {
    _RANDOM_WINDOWS: ("random windows", "windows of one episode in training and test (leaky; for comparison only)"),
    IN_DISTRIBUTION: ("random episodes", "other episodes of hosts and samples in the training set"),
    "held_out_sample": ("unseen sample", "hosts in the training set, samples not in it"),
    _HELD_OUT_HOST: ("unseen host", "samples in the training set, hosts not in it"),
    _HELD_OUT_BOTH: ("unseen host and sample", "hosts and samples not in the training set"),
}

_TEST_WORDS = {_HELD_OUT_HOST: "on unseen hosts", _HELD_OUT_BOTH: "on unseen hosts and samples"}
_MAX_HOSTS_NAMED = 8

_EASIER_SPLIT_LABELS = {
    _RANDOM_WINDOWS: "with a random window split, which leaks",
    IN_DISTRIBUTION: "on other episodes of hosts and samples in the training set",
}


def _find_protocol_score(rows: Sequence[MetricRow], recipe: str, base: str = "macro_f1") -> MetricRow | None:
    """Return the overall score of `_PROTOCOL_MODEL` under one recipe, or None."""
    where = {
        "recipe": recipe,
        "fold": "pooled",
        "channel_set": DEFAULT_HEADLINE.channel_set,
        "input": DEFAULT_HEADLINE.input,
        "smoothing": NO_FILTER,
    }
    return query.find_overall_row(
        rows, base, model=_PROTOCOL_MODEL, agent=DEFAULT_HEADLINE.agent, compared_to=None, **where
    )


_CLASS_WORDS = {"macro_f1": "five classes", "macro_f1_3class": "three classes"}


def describe_protocol_scores(rows: Sequence[MetricRow], base: str = "macro_f1") -> str | None:
    """Render the headline sentence: scores on unseen hosts, with the score of the leaky split for comparison.

    Args:
        rows: Rows of all recipes.
        base: The score, `macro_f1` or `macro_f1_3class`.

    Returns:
        The sentence, or None if the run lacks the score on unseen hosts or the score of the easier split.
    """
    by = {recipe: _find_protocol_score(rows, recipe, base) for recipe in _PROTOCOL_LABELS}
    easier = _RANDOM_WINDOWS if by[_RANDOM_WINDOWS] is not None else IN_DISTRIBUTION
    leaky = by[easier]
    places = ((_HELD_OUT_HOST, "on unseen hosts"), (_HELD_OUT_BOTH, "on unseen hosts and samples"))
    unseen = [(row, where) for recipe, where in places if (row := by[recipe]) is not None and row.value is not None]
    if leaky is None or leaky.value is None or not unseen:
        return None
    parts = ", ".join(f"{render_number(row.value)} {render_interval(row)} {where}" for row, where in unseen)
    return (
        f"Malware phase of a VM, {_CLASS_WORDS[base]}, macro-F1 of {_PROTOCOL_MODEL}: {parts}. "
        f"For comparison: {render_number(leaky.value)} {_EASIER_SPLIT_LABELS[easier]}."
    )


def describe_inversion(rows: Sequence[MetricRow]) -> str | None:
    """Explain a score on random episodes below the score on unseen hosts; return None if it is not below."""
    random, host = _find_protocol_score(rows, IN_DISTRIBUTION), _find_protocol_score(rows, _HELD_OUT_HOST)
    if random is None or host is None or random.value is None or host.value is None or random.value >= host.value:
        return None
    sizes = [_find_train_size(rows, recipe) for recipe in (IN_DISTRIBUTION, _HELD_OUT_HOST)]
    size = " after training on as many windows" if all(sizes) and abs(sizes[0] - sizes[1]) < 0.05 * sizes[1] else ""
    return (
        f"Random episodes score below an unseen host{size}, although they are the easier test. The assignment of "
        "sessions to folds is random and balances samples less well than a split by host. The interval does not "
        "include this variance; treat the two scores as equal."
    )


def build_protocol_section(context: ReportContext) -> ReportSection:
    """Build the section from the rows of all split recipes."""
    rows = context.all_rows
    found = {recipe: _find_protocol_score(rows, recipe) for recipe in _PROTOCOL_LABELS}
    absent = [_PROTOCOL_LABELS[r][0] for r, row in found.items() if row is None]
    sentences = [
        f"Score of {_PROTOCOL_MODEL} with the same settings under five split protocols. Training size: windows per "
        "fold, mean over folds."
    ]
    if inversion := describe_inversion(rows):
        sentences.append(inversion)
    if absent:
        sentences.append(f"Not trained in this run: {', '.join(absent)}.")
    block = ReportBlock(
        key="inflation",
        title="Score by split protocol",
        sentences=tuple(sentences),
        figure=_draw_protocol_scores(context, found) if any(found.values()) else None,
        absent="" if any(found.values()) else "No split protocol of this comparison was trained in this run.",
        table=_build_protocol_table(rows, found),
        is_table_open=True,
        command=TRAIN_ALL_COMMAND if absent else EVALUATE_COMMAND,
    )
    lead = (
        "A score depends on the split. Windows of one episode in training and test leak information. Shared hosts or "
        "samples make the test easier than a new machine with new malware."
    )
    return ReportSection(key="inflation", title="Leakage: score by split protocol", lead=lead, blocks=(block,))


def _draw_protocol_scores(context: ReportContext, found: dict[str, MetricRow | None]) -> SvgFigure:
    series = tuple(
        charts.ScoreSeries(
            name=name,
            scores=tuple(
                build_score_mark(_PROTOCOL_LABELS[r][0], _find_protocol_score(context.all_rows, r, base)) for r in found
            ),
        )
        for base, name in (("macro_f1", "five phases"), ("macro_f1_3class", "three states"))
    )
    return charts.draw_intervals(series, title="macro-F1", origin=context.origin)


def _build_protocol_table(rows: Sequence[MetricRow], found: dict[str, MetricRow | None]) -> ReportTable:
    body = []
    for recipe, row in found.items():
        name, about = _PROTOCOL_LABELS[recipe]
        size = _find_train_size(rows, recipe)
        body.append(
            (
                f"{name}: {about}",
                render_number(row.value if row else None),
                render_interval(row) if row else "not trained in this run",
                _render_protocol_gap(rows, recipe),
                f"{size:,.0f}" if size else "–",
                f"{row.n_windows:,}" if row else "–",
                f"{row.n_episodes:,}" if row else "–",
            )
        )
    columns = (
        "evaluated on",
        "macro-F1",
        "95 % interval",
        "difference to unseen host",
        "training windows per fold",
        "test windows",
        "test episodes",
    )
    return ReportTable(columns=columns, numeric=(False, True, False, False, True, True, True), rows=tuple(body))


def _find_train_size(rows: Sequence[MetricRow], recipe: str) -> float:
    """Return the number of training windows per fold, averaged over folds; 0 if unknown."""
    row = query.find_overall_row(
        rows,
        "train_windows",
        recipe=recipe,
        channel_set=DEFAULT_HEADLINE.channel_set,
        input=DEFAULT_HEADLINE.input,
        model=_PROTOCOL_MODEL,
    )
    return row.value if row is not None and row.value is not None else 0.0


def _render_protocol_gap(rows: Sequence[MetricRow], recipe: str) -> str:
    """Render the paired difference to the score on unseen hosts; the metric row may hold either sign."""
    if recipe == _HELD_OUT_HOST:
        return "–"
    for one, other, sign in ((recipe, _HELD_OUT_HOST, 1.0), (_HELD_OUT_HOST, recipe, -1.0)):
        row = query.find_overall_row(rows, "macro_f1_recipe_gap", recipe=one, compared_to=other, model=_PROTOCOL_MODEL)
        if row is not None and row.value is not None:
            ends = sorted(sign * v for v in (row.low, row.high) if v is not None)
            span = f" [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else f" (no interval: {row.note})"
            return f"{sign * row.value:+.2f}{span}"
    return "–"


def build_page(evidence: ReportData) -> ReportPage:
    """Build the report from the files that the run has."""
    all_rows = evidence.metrics.metrics if evidence.metrics else ()
    rows = query.select_recipe_rows(all_rows)
    model = query.find_headline_model(rows, all_rows)
    windows = None
    if evidence.predictions is not None:
        windows = select_headline_windows(evidence.predictions, model or DEFAULT_HEADLINE.model)
    origin = describe_origin(windows, evidence.bundles)
    context = ReportContext(rows=rows, all_rows=all_rows, model=model, windows=windows, origin=origin)
    audit = evidence.audit
    is_broken = audit is not None and not audit.passes
    headline = build_headline(evidence.metrics) if evidence.metrics else None
    claim = (
        _build_failed_audit_claim(audit)
        if audit is not None and is_broken
        else _build_claim(context, headline, audit.build_verdict() if audit is not None else None)
    )
    return ReportPage(
        origin=origin,
        claim=claim,
        notices=(*_describe_simulation(origin), *evidence.notes, *describe_audit(audit)),
        facts=_list_facts(evidence, context, headline),
        sections=(
            build_alarm_section(context),
            build_error_section(context, evidence.folds),
            build_leaderboard_section(context),
            build_protocol_section(context),
            build_calibration_section(context),
            build_importance_section(context, evidence.bundles),
            build_coverage_section(evidence, context.windows, origin),
            build_reproducibility_section(evidence),
        ),
    )


def _list_facts(evidence: ReportData, context: ReportContext, headline: Headline | None) -> tuple[tuple[str, str], ...]:
    """List what was tested: store, recordings, machines, model and run; unknown facts are left out."""
    bundles, facts = evidence.bundles, []
    if evidence.corpus:
        facts.append(("Store", evidence.corpus))
    if bundles is not None and bundles.first_day:
        days = (
            bundles.first_day if bundles.first_day == bundles.last_day else f"{bundles.first_day} to {bundles.last_day}"
        )
        facts.append(("Recordings", f"{days}, {bundles.vm_hours:,.1f} VM-hours, {context.origin}"))
    if bundles is not None and bundles.hosts:
        few = bundles.hosts[:_MAX_HOSTS_NAMED]
        more = f" and {len(bundles.hosts) - len(few)} more" if len(bundles.hosts) > len(few) else ""
        facts.append(("Machines", f"{render_count(len(bundles.hosts), 'host')}: {', '.join(few)}{more}"))
    if headline is not None and context.model is not None:
        facts.append(("Model", f"{headline.model}, channel set {headline.channels}, input {headline.input}"))
    if digest := evidence.digests.get(METRICS_FILE):
        facts.append(("Run", f"{digest[:12]} (digest of {METRICS_FILE}), phasewatch {__version__}"))
    return tuple(facts)


def _build_failed_audit_claim(audit: AuditReport) -> HeadlineClaim:
    """Build the headline of a run whose audit failed: no score, only the failed checks."""
    words = "; ".join(f"{check.name}: {check.words}" for check in audit.failed_checks)
    return HeadlineClaim(words=describe_failed_audit(audit), line="", tiles=(), verdict=words, holds=False)


def _describe_simulation(origin: str) -> tuple[str, ...]:
    if "simulated" not in origin:
        return ()
    what = "All" if origin == "simulated" else "Some"
    return (
        f"{what} test episodes are simulated. Scores on them check the pipeline and do not predict performance on real "
        "VMs.",
    )


def _build_operator_tiles(numbers: HeadlineBlock) -> tuple[HeadlineTile, ...]:
    """Build the tiles of what an operator asks first; a number that was not measured has none."""
    where = _TEST_WORDS[numbers.recipe]
    return tuple(
        HeadlineTile(
            name=name,
            value=render_number(number.value),
            interval=_render_span(number),
            about=about,
        )
        for number, name, about in (
            (
                numbers.infection_recall_30s,
                "infections announced",
                f"share within {HEADLINE_TIME_S} s, {where}; {render_count(numbers.n_onsets, 'infection')}",
            ),
            (numbers.median_delay_s, "seconds to the alarm", f"median delay after the start of an infection, {where}"),
            (numbers.false_alarms_per_vm_hour, "false alarms per VM-hour", f"of the infection alarm, {where}"),
            (numbers.idle_called_clean, "idle called clean", "share of windows of idle clean machines"),
        )
        if number.value is not None
    )


def _build_claim(
    context: ReportContext, headline: Headline | None, verdict: HeadlineVerdict | None = None
) -> HeadlineClaim:
    """Build the first page: the headline, its tiles and the comparison with elapsed time.

    An audit that withdraws the five-phase scores leaves the three-class ones.
    """
    line = render_headline(headline, verdict) if headline is not None else ""
    has_five = verdict is None or not verdict.withdraws_five_phases
    if headline is not None and headline.is_single_host:
        return _build_single_host_claim(headline, line, has_five=has_five)
    if context.model is None:
        recipe = DEFAULT_HEADLINE.recipe.replace("_", " ")
        words = f"No score: {METRICS_FILE} holds no macro-F1 of a model for the split {recipe}."
        return HeadlineClaim(
            words=words, line=line, tiles=(), verdict="`phasewatch evaluate RUN` computes it.", holds=False
        )
    five, three, clock, majority, load = (
        query.find_score(context.rows, base, model=model)
        for base, model in (
            ("macro_f1", context.model),
            ("macro_f1_3class", context.model),
            ("macro_f1", ELAPSED_TIME),
            ("macro_f1", "majority"),
            ("macro_f1", LOAD_ONLY),
        )
    )
    tiles = (
        *(_build_operator_tiles(headline) if headline is not None else ()),
        *(
            HeadlineTile(
                name=name,
                value=render_number(row.value),
                interval=render_interval(row),
                about=about,
                is_reference=beside,
            )
            for row, name, about, beside in (
                (five, "five phases", f"macro-F1 of {context.model} on unseen hosts", False),
                (three, "three states", "macro-F1; quiet (clean, armed, dormant), infecting, active", False),
                (
                    clock,
                    "elapsed time alone",
                    "baseline without telemetry: phase predicted from the time since the start",
                    True,
                ),
                (load, "load alone", "baseline without telemetry: phase predicted from whether a load runs", True),
                (majority, "majority class", "baseline: always the most frequent phase", True),
            )
            if row is not None and (has_five or row is not five)
        ),
    )
    gap = query.find_elapsed_time_gap(context.all_rows, context.model)
    above = query.is_above_elapsed_time(five, clock, gap)
    scores = describe_protocol_scores(
        context.all_rows, "macro_f1" if has_five else "macro_f1_3class"
    ) or _describe_score(context.model, five if has_five else three, "five" if has_five else "three")
    alarms = _describe_alarms(headline) if headline is not None else ""
    return HeadlineClaim(
        words=alarms or scores,
        scores=scores if alarms else "",
        line=line,
        tiles=tiles,
        verdict=_describe_verdict(above, clock, gap),
        holds=above is True,
    )


def _build_single_host_claim(headline: Headline, line: str, *, has_five: bool) -> HeadlineClaim:
    """Build the headline of a store of one host: what its last episodes show, and what cannot be known."""
    numbers = (
        (headline.macro_f1, "five phases", f"macro-F1 of {headline.model}", has_five),
        (headline.macro_f1_3class, "three states", "macro-F1; quiet (clean, armed, dormant), infecting, active", True),
        (headline.time_only, "elapsed time alone", "baseline without telemetry", True),
    )
    tiles = tuple(
        HeadlineTile(
            name=name,
            value=render_number(number.value),
            interval=_render_span(number),
            about=f"{about}, on later episodes of the same host",
            is_reference=number is headline.time_only,
        )
        for number, name, about, is_shown in numbers
        if is_shown and number.value is not None
    )
    known = headline.macro_f1_3class.value
    score = (
        "No score: this host has too few sessions to test on its last episodes."
        if known is None
        else f"Malware phase of this VM, three classes, macro-F1 of {headline.model}: {known:.2f} "
        f"{_render_span(headline.macro_f1_3class)} on later episodes of the same host."
    )
    return HeadlineClaim(
        words=f"{score} The store has one host: no score on an unseen host exists, and nothing is known about others.",
        line=line,
        tiles=tiles,
        verdict="Record on a second host to learn how well the model transfers.",
        holds=False,
    )


def _render_span(number: HeadlineNumber) -> str:
    if number.low is None or number.high is None:
        return f"(no interval: {number.note})"
    return f"[{number.low:.2f}, {number.high:.2f}]"


def _describe_alarms(numbers: HeadlineBlock) -> str:
    """Render what an operator asks first as a sentence, or nothing if it was not measured."""
    recall, false_alarms, delay = (
        numbers.infection_recall_30s,
        numbers.false_alarms_per_vm_hour,
        numbers.median_delay_s,
    )
    if recall.value is None or false_alarms.value is None:
        return ""
    after = f", after a median of {delay.value:.0f} s" if delay.value is not None else ""
    return (
        f"{recall.value:.0%}{_render_range(recall, percent=True)} of {render_count(numbers.n_onsets, 'infection')} "
        f"announced within {HEADLINE_TIME_S} s{after}, at {false_alarms.value:.2f}{_render_range(false_alarms)} false "
        f"alarms per VM-hour, {_TEST_WORDS[numbers.recipe]}."
    )


def _render_range(number: HeadlineNumber, *, percent: bool = False) -> str:
    """Render ` [low, high]`, or nothing without an interval."""
    if number.low is None or number.high is None:
        return ""
    if percent:
        return f" [{100 * number.low:.0f}, {100 * number.high:.0f}]"
    return f" [{number.low:.2f}, {number.high:.2f}]"


def _describe_score(model: str, score: MetricRow | None, n_classes: str) -> str:
    if score is None or score.value is None:
        return f"No macro-F1 of {model} on unseen hosts: it was not measured in this run."
    where = f"on {render_count(score.n_hosts, 'unseen host')}" if score.n_hosts > 1 else "on one unseen host"
    return (
        f"Malware phase of a VM, {n_classes} classes, macro-F1 of {model}: "
        f"{score.value:.2f} {render_interval(score)} {where}."
    )


def _describe_verdict(above: bool | None, clock: MetricRow | None, gap: query.ElapsedTimeGap | None) -> str:
    paired = ""
    if gap is not None:
        span = f" [{gap.low:+.2f}, {gap.high:+.2f}]" if gap.low is not None and gap.high is not None else ""
        paired = f" (paired difference of macro-F1 {gap.value:+.2f}{span})"
    if above is True:
        return f"The model is above the elapsed-time baseline{paired}."
    if above is False:
        return f"The model is not above the elapsed-time baseline, which uses no telemetry{paired}."
    if clock is None or clock.value is None:
        return "The elapsed-time baseline was not scored, so the benefit of the telemetry is unknown."
    return "There is no interval, so it is unknown whether the model is above the elapsed-time baseline."
