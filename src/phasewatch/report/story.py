"""Evidence becomes the page's argument: the claim, how sure it is, where it fails, what it rests on, how to repeat it."""

from __future__ import annotations

from phasewatch.audit.checks import Audit
from phasewatch.evaluate.rows import METRICS, MetricRow, headline
from phasewatch.report import scores
from phasewatch.report.blocks import Claim, Page, Tile, bracket, count, number
from phasewatch.report.evidence import PLACE, Evidence
from phasewatch.report.failings import Told, where_it_fails
from phasewatch.report.grounds import grounds, repeat
from phasewatch.report.inflation import inflation, sentence
from phasewatch.report.looks import looks
from phasewatch.report.proof import NOT_AUDITED, refusal
from phasewatch.report.ringing import ringing
from phasewatch.report.rivals import how_sure
from phasewatch.report.trust import trust
from phasewatch.report.windows import origin_words, scored


def tell(evidence: Evidence) -> Page:
    """Build the page from whatever a run has."""
    all_rows = evidence.metrics.metrics if evidence.metrics else ()
    rows = scores.headline_rows(all_rows)
    model = scores.headline_model(rows, all_rows)
    windows = None
    if evidence.predictions is not None:
        windows = scored(evidence.predictions, model or PLACE.model)
    origin = origin_words(windows, evidence.bundles)
    told = Told(rows=rows, all_rows=all_rows, model=model, windows=windows, origin=origin)
    audit = evidence.audit
    is_broken = audit is not None and not audit.passes
    line = headline(evidence.metrics) if evidence.metrics else ""
    return Page(
        origin=origin,
        claim=_refused(audit) if audit is not None and is_broken else _claim(told, line),
        notices=(*_simulated(origin), *evidence.notes, *(() if audit is not None else (NOT_AUDITED,))),
        sections=(
            inflation(told),
            how_sure(told),
            where_it_fails(told, evidence.folds),
            ringing(told),
            trust(told),
            looks(told, evidence.bundles),
            grounds(evidence, told.windows, origin),
            repeat(evidence),
        ),
    )


def _refused(audit: Audit) -> Claim:
    """Make no claim for a run that breaks its promises; its numbers stand below for whoever looks for the fault."""
    words = "; ".join(f"{check.name}: {check.words}" for check in audit.broken)
    return Claim(words=refusal(audit), line="", tiles=(), verdict=words, holds=False)


def _simulated(origin: str) -> tuple[str, ...]:
    if "simulated" not in origin:
        return ()
    what = "All" if origin == "simulated" else "Some"
    return (
        f"{what} test episodes are simulated: what they show is that the pipeline works, not how well real VMs can be told.",
    )


def _claim(told: Told, line: str) -> Claim:
    if told.model is None:
        words = f"No claim can be made: {METRICS} holds no macro-F1 of a model on {PLACE.recipe.replace('_', ' ')}."
        return Claim(words=words, line=line, tiles=(), verdict="`phasewatch evaluate RUN` computes it.", holds=False)
    five, three, clock, majority = (
        scores.pick(told.rows, base, model=model)
        for base, model in (
            ("macro_f1", told.model),
            ("macro_f1_3", told.model),
            ("macro_f1", scores.CLOCK),
            ("macro_f1", "majority"),
        )
    )
    tiles = tuple(
        Tile(name=name, value=number(row.value), interval=bracket(row), about=about, beside=beside)
        for row, name, about, beside in (
            (five, "five phases", f"macro-F1, {told.model}, host never seen", False),
            (three, "three states", "quiet, infecting, active: armed and dormant hardly differ from clean", False),
            (clock, "elapsed time alone", "the same five phases, told by the clock without any telemetry", True),
            (majority, "majority", "always the most frequent phase", True),
        )
        if row is not None
    )
    gap = scores.clock_gap(told.all_rows, told.model)
    above = scores.above_clock(five, clock, gap)
    inflated = sentence(told.all_rows, told.model)
    return Claim(
        words=inflated or _in_words(told.model, five),
        line=line,
        tiles=tiles,
        verdict=_verdict(above, clock, gap),
        holds=above is True,
    )


def _in_words(model: str, five: MetricRow | None) -> str:
    if five is None or five.value is None:
        return f"How well {model} tells the phase on an unseen host was not measured."
    where = f"on {count(five.n_hosts, 'host')} that its training never saw" if five.n_hosts > 1 else "on an unseen host"
    return f"{model} tells the five phases {where} with macro‑F1 {five.value:.2f} {bracket(five)}."


def _verdict(above: bool | None, clock: MetricRow | None, gap: scores.Gap | None) -> str:
    paired = ""
    if gap is not None:
        span = f" [{gap.low:+.2f}, {gap.high:+.2f}]" if gap.low is not None and gap.high is not None else ""
        paired = f" (paired gap {gap.value:+.2f}{span})"
    if above is True:
        return f"The model is above what elapsed time alone would score{paired}."
    if above is False:
        return f"The model is not above elapsed time: what it scores, a clock could score as well{paired}."
    if clock is None or clock.value is None:
        return (
            "Elapsed time alone was not scored, so it cannot be said whether the telemetry adds anything to the clock."
        )
    return "Without an interval it cannot be said whether the model is above elapsed time."
