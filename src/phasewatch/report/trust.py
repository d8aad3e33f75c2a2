"""Whether its probabilities can be believed: reliability, flips, and what it does before malware that it never saw."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.evaluate.calibration import KEEP
from phasewatch.evaluate.rows import MetricRow
from phasewatch.report import figures, scores
from phasewatch.report.blocks import Block, Section, Table, bracket, metric_table
from phasewatch.report.evidence import PLACE
from phasewatch.report.failings import EVALUATE, NO_METRICS, Told
from phasewatch.report.rivals import NOT_TRAINED, TRAIN_ALL
from phasewatch.train.predictions import NO_FILTER

FILTERS = ((NO_FILTER, "no filter"), ("phase", "phase filter"), ("schedule", "schedule alone"))
UNSEEN = "held_out_profile"


def trust(told: Told) -> Section:
    """Build the section from the rows of the headline's model."""
    lead = "A temperature is fitted on validation; nothing here saw the test before."
    blocks = (_reliability(told), _flips(told), _abstention(told))
    return Section(key="trust", title="Whether it can be believed", lead=lead, blocks=blocks)


def _own(told: Told, *, recipe: str = PLACE.recipe, filter_: str = NO_FILTER) -> list[MetricRow]:
    where = (recipe, "pooled", PLACE.threat, PLACE.table, filter_, PLACE.agent)
    return [r for r in told.all_rows if (r.recipe, r.fold, r.threat, r.table, r.filter, r.agent) == where]


def _reliability(told: Told) -> Block:
    rows = _own(told)
    found = [r for r in scores.find(rows, "reliability", model=told.model) if r.x is not None and r.value is not None]
    base = Block(key="reliability", title="Reliability", absent=NO_METRICS, command=EVALUATE)
    if not found:
        return base
    marks = [
        figures.Score(
            label="", value=r.value, low=r.low, high=r.high,
            words=f"said {r.x:.2f}, right {r.value:.2f} {bracket(r)}, {r.n_windows:,} windows",
        )
        for r in found
    ]  # fmt: skip
    pairs = (
        ("ece_debiased", "calibration error, sampling bias subtracted"),
        ("confidence_less_accuracy", "mean confidence less accuracy"),
        ("brier", "Brier score"),
    )
    overall = [(words, metric, scores.one(rows, metric, model=told.model)) for metric, words in pairs]
    said = [
        f"{words[0].upper()}{words[1:]} {row.value:.3f} {_three(row)}."
        for words, _, row in overall
        if row and row.value is not None
    ]
    body = tuple((f"{r.x:.2f}", f"{r.value:.2f}", bracket(r), f"{r.n_windows:,}") for r in found)
    return Block(
        key=base.key,
        title=base.title,
        sentences=("Below the dashed line it is surer than it is right.", *said),
        figure=figures.reliability(marks, [float(r.x or 0.0) for r in found], origin=told.origin),
        table=Table(
            columns=("said", "right", "95 % interval", "windows"), numeric=(True, True, False, True), rows=body
        ),
        command=EVALUATE,
    )


def _three(row: MetricRow) -> str:
    return f"[{row.low:.3f}, {row.high:.3f}]" if row.low is not None and row.high is not None else bracket(row)


def _flips(told: Told) -> Block:
    base = Block(key="flips", title="How often it changes its mind", command=TRAIN_ALL)
    body, said = [], []
    truth = scores.one(_own(told), "true_flips_per_minute")
    if truth is not None and truth.value is not None:
        body.append(("the truth", f"{truth.value:.2f}", bracket(truth), "–"))
    for filter_, words in FILTERS:
        own = _own(told, filter_=filter_)
        row, score = (scores.one(own, m, model=told.model) for m in ("flips_per_minute", "macro_f1"))
        if row is None or row.value is None:
            body.append((words, "–", NOT_TRAINED, "–"))
            continue
        quality = f"{score.value:.2f} {bracket(score)}" if score is not None and score.value is not None else "–"
        body.append((words, f"{row.value:.2f}", bracket(row), quality))
    if len(body) <= len(FILTERS) and all(b[1] == "–" for b in body):
        return Block(key=base.key, title=base.title, absent=NO_METRICS, command=TRAIN_ALL)
    said.append(
        "The filter knows how phases follow one another in these plans; “schedule alone” is that knowledge without any "
        "telemetry, and what the filter adds counts only above it."
    )
    columns = ("decisions", "flips a minute", "95 % interval", "macro-F1")
    return Block(
        key=base.key, title=base.title, sentences=tuple(said), shown=True, command=TRAIN_ALL,
        table=Table(columns=columns, numeric=(False, True, False, False), rows=tuple(body)),
    )  # fmt: skip


def _abstention(told: Told) -> Block:
    base = Block(key="unseen-profile", title="Malware that it never saw", command=TRAIN_ALL)
    body: list[tuple[str, str, MetricRow | None]] = []
    for recipe, words in ((PLACE.recipe, "unseen host"), (UNSEEN, "unseen profile")):
        rows: Sequence[MetricRow] = _own(told, recipe=recipe)
        model = told.model if any(r.model == told.model for r in rows) else PLACE.model
        for metric, name in (("accuracy", "right, all windows"), ("accuracy_decided", "right, where it decides"),
                             ("abstained", "windows left undecided"), ("macro_f1", "macro-F1")):  # fmt: skip
            row = scores.one(rows, metric, model=model)
            if row is not None:
                body.append((words, name, row))
    if not body:
        return Block(
            key=base.key, title=base.title, absent=f"Abstention and {UNSEEN}: {NOT_TRAINED}.", command=TRAIN_ALL
        )
    said = [f"It keeps silent below the confidence that would leave {1 - KEEP:.0%} of its validation undecided."]
    if not any(words == "unseen profile" for words, _, _ in body):
        said.append(f"No profile was held out: {UNSEEN} was {NOT_TRAINED}.")
    return Block(
        key=base.key, title=base.title, sentences=tuple(said), table=metric_table(body), shown=True, command=TRAIN_ALL
    )
