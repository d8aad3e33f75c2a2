"""Where a model fails: by phase, profile and host, what it takes for what, and three episodes window by window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from phasewatch.evaluate.rows import METRICS, MetricRow
from phasewatch.report import figures, scores
from phasewatch.report.blocks import Block, Section, Table, count, listed, metric_table, number, score_of
from phasewatch.report.evidence import PLACE
from phasewatch.report.windows import STRIDE_S, Scored, Shown, chosen_episodes
from phasewatch.split import Fold
from phasewatch.train.predictions import PREDICTIONS
from phasewatch.vocab import PHASES

EVALUATE = "phasewatch evaluate RUN && phasewatch report RUN"
NO_METRICS = f"No row for this in {METRICS}; `phasewatch evaluate RUN` writes them."
NO_WINDOWS = f"No test window of the headline's model in {PREDICTIONS}; `phasewatch train RUN` writes them."

_OVER_WHAT = "Each number is over the phases that occur there."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Told:
    """What the sections share, looked up once.

    Attributes:
        rows: The headline's recipe, table and filter; `all_rows` has the paired gaps too.
        model: The model that the page is about, None where no row names one.
        windows: Its scored test windows, None where there are none.
    """

    rows: tuple[MetricRow, ...]
    all_rows: tuple[MetricRow, ...]
    model: str | None
    windows: Scored | None
    origin: str


def where_it_fails(told: Told, folds: Sequence[Fold]) -> Section:
    """Build the section from the headline's rows and windows."""
    labels = [str(p) for p in PHASES]
    blocks = [_grouped(told, "class", "By phase", "phase", labels)]
    profiles, hosts = _names(told, "profile"), _names(told, "host_id")
    blocks.append(_grouped(told, "profile", "By profile", "profile", profiles))
    blocks.append(_grouped(told, "host", "By host", "host_id", hosts))
    blocks += [_samples(told), _heat(told, folds)]
    blocks.append(_confusion(told))
    if told.windows is None:
        blocks.append(Block(key="ribbons", title="Three episodes", absent=NO_WINDOWS, command=EVALUATE))
    else:
        blocks += [_ribbon(told, told.windows, shown) for shown in chosen_episodes(told.windows)]
    return Section(key="fails", title="Where it fails", blocks=tuple(blocks))


def _names(told: Told, key: str) -> list[str]:
    """Name the groups that have rows, and with them the profiles that the evaluation lists as untested."""
    own = {str(getattr(r, key)) for r in told.rows if r.model == told.model and getattr(r, key) is not None}
    untested = {r.profile for r in told.rows if key == "profile" and r.metric == "untested_profile" and r.profile}
    return sorted(own | untested)


def _grouped(told: Told, key: str, title: str, field: str, names: list[str]) -> Block:
    metric = scores.group_metric(told.rows, model=told.model, by=(field,)) if told.model else None
    if told.model is None or metric is None:
        return Block(key=f"by-{key}", title=title, absent=NO_METRICS, command=EVALUATE)
    words = scores.METRIC_WORDS[metric]
    own = [(n, scores.pick(told.rows, metric, model=told.model, **{field: n})) for n in names]
    series, table = [], []
    for model in (told.model, scores.CLOCK):
        found = [(n, scores.pick(told.rows, metric, model=model, **{field: n})) for n in names]
        if model == told.model or any(row is not None for _, row in found):
            series.append(
                figures.Series(name=scores.model_words(model), scores=tuple(score_of(n, row) for n, row in found))
            )
            table += [(n, f"{words}, {scores.model_words(model)}", row) for n, row in found]
    return Block(
        key=f"by-{key}",
        title=title,
        sentences=(
            *((_OVER_WHAT,) if metric == "macro_f1" else ()),
            *_weakest(words, own),
            *(_hosts_apart(told) if field == "host_id" else ()),
        ),
        figure=figures.whiskers(series, title=words, origin=told.origin),
        table=metric_table(table),
        command=EVALUATE,
    )


def _hosts_apart(told: Told) -> tuple[str, ...]:
    """Say what can be said of the spread between hosts: an interval from twenty on, else points only."""
    row = scores.one(told.rows, "macro_f1_mean_of_hosts", model=told.model, threat=PLACE.threat, agent=PLACE.agent)
    if row is None or row.value is None:
        return ()
    if row.low is not None and row.high is not None:
        return (f"Over hosts the mean is {row.value:.2f} [{row.low:.2f}, {row.high:.2f}].",)
    return (f"Of the spread between hosts nothing but these points is claimed: {row.why}.",)


def _samples(told: Told) -> Block:
    """List every sample's score: names are unique within a profile only."""
    found = [
        r for r in scores.find(told.rows, "macro_f1", model=told.model, threat=PLACE.threat, agent=PLACE.agent)
        if r.sample_name is not None
    ]  # fmt: skip
    if not found:
        return Block(key="by-sample", title="By sample", absent=NO_METRICS, command=EVALUATE)
    ranked = sorted(found, key=lambda r: (r.value or 0.0, r.profile or "", r.sample_name or ""))
    table = metric_table([(f"{r.profile}, {r.sample_name}", "macro-F1", r) for r in ranked])
    said = ("Weakest first. A sample is a few episodes: a place to look, not a number to quote.",)
    return Block(key="by-sample", title="By sample", sentences=said, table=table, command=EVALUATE)


def _weakest(words: str, found: list[tuple[str, MetricRow | None]]) -> tuple[str, ...]:
    known = sorted((row.value, name) for name, row in found if row is not None and row.value is not None)
    missing = [name for name, row in found if row is None or row.value is None]
    said = []
    if any(row is not None and row.value is not None and row.low is None for _, row in found):
        said.append("Where no whisker is drawn, too little was recorded for an interval; the table says why.")
    if len(known) > 1:
        (low, worst), (high, best) = known[0], known[-1]
        said.append(f"{words[0].upper()}{words[1:]} runs from {low:.2f} ({worst}) to {high:.2f} ({best}).")
    if missing:
        said.append(f"Nothing can be said of {listed(missing)}: no test window, or no row.")
    return tuple(said)


def _heat(told: Told, folds: Sequence[Fold]) -> Block:
    base = Block(key="host-profile", title="Host × profile", command=EVALUATE)
    tested = told.windows.count_by() if told.windows is not None else {}
    metric = scores.group_metric(told.rows, model=told.model, by=("host_id", "profile")) if told.model else None
    absent = {p for fold in folds for p in fold.untested_profiles}
    known = {(c.host_id, c.profile) for fold in folds for c in fold.coverage}
    hosts = sorted({h for h, _ in tested} | {h for h, _ in known})
    profiles = sorted({p for _, p in tested} | {p for _, p in known} | absent)
    if not tested:
        return replace(base, absent=NO_WINDOWS)

    def row(host: str, profile: str) -> MetricRow | None:
        if told.model is None or metric is None:
            return None
        return scores.pick(told.rows, metric, model=told.model, host_id=host, profile=profile)

    cells = tuple(
        figures.Cell(
            host_id=h, profile=p, n_episodes=tested.get((h, p), 0), value=r.value if (r := row(h, p)) else None
        )
        for h in hosts
        for p in profiles
    )
    empty = [c for c in cells if not c.n_episodes]
    words = scores.METRIC_WORDS[metric] if metric else "test episodes"
    body = tuple(
        (
            c.host_id,
            c.profile,
            str(c.n_episodes) if c.n_episodes else "untested",
            number(c.value) if c.n_episodes else "–",
        )
        for c in cells
    )
    return replace(
        base,
        sentences=(
            f"{len(cells) - len(empty)} of {count(len(cells), 'cell')} have a scored test episode; hatched ones are untested.",
            "A cell holds few episodes: read it as a place to look, not as a number to quote."
            if metric
            else f"{METRICS} has no score of a cell, so the shade is the number of test episodes.",
        ),
        figure=figures.heat_map(cells, hosts=hosts, profiles=profiles, title=words, origin=told.origin),
        table=Table(columns=("host", "profile", "episodes", words), numeric=(False, False, True, True), rows=body),
    )


def _confusion(told: Told) -> Block:
    base = Block(key="confusion", title="What is taken for what", absent=NO_METRICS, command=EVALUATE)
    matrix = scores.confusion(told.all_rows, model=told.model) if told.model else None
    if matrix is None:
        return base

    def size(n: float) -> str:
        return f"{n:,.0f}" if n == round(n) else f"{n:,.1f}"

    rows = tuple(
        (truth, *(size(n) for n in row), size(sum(row)))
        for truth, row in zip(matrix.labels, matrix.counts, strict=True)
    )
    columns = ("truth, decided as →", *matrix.labels, "all")
    return replace(
        base,
        absent="",
        sentences=("Windows by truth and decision, over every label that occurs as either.", *_mixed(matrix)),
        figure=figures.confusion(matrix, origin=told.origin),
        table=Table(columns=columns, numeric=(False, *(True,) * (len(columns) - 1)), rows=rows),
    )


def _mixed(matrix: figures.Confusion) -> tuple[str, ...]:
    wrong = [
        (n, sum(row), truth, decided)
        for truth, row in zip(matrix.labels, matrix.counts, strict=True)
        for decided, n in zip(matrix.labels, row, strict=True)
        if n and truth != decided
    ]
    if not wrong:
        return ("No window was decided wrongly.",)
    n, total, truth, decided = max(wrong)
    return (f"The most frequent mistake: {n:,.0f} of {total:,.0f} windows of {truth} decided as {decided}.",)


def _ribbon(told: Told, windows: Scored, shown: Shown) -> Block:
    names = [str(p) for p in PHASES]
    body = tuple((f"{w.t_s:.0f}", names[w.truth], names[w.decided], *(f"{v:.2f}" for v in w.p)) for w in shown.windows)
    return Block(
        key=f"ribbon-{shown.rank.split()[0]}",
        title=f"The {shown.rank} test episode: {shown.profile}, {shown.sample_name}",
        sentences=(
            f"Episode {shown.episode_id} on host {shown.host_id}, {count(len(shown.windows), 'window')}; "
            "ranked by windows right, of those whose phase changes where there are three.",
            "Truth above decision (paler: less probable); below, the darker the likelier, and a line where the truth was.",
        ),
        figure=figures.ribbon(shown.windows, stride_s=STRIDE_S, origin=told.origin),
        table=Table(
            columns=("seconds", "truth", "decided", *(f"p({n})" for n in names)),
            numeric=(True, False, False, *(True,) * len(names)),
            rows=body,
        ),
        command="phasewatch train RUN && phasewatch report RUN",
    )
