"""What the claim rests on: coverage, the ledger, what the data cannot say; and how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.dataset import SplitIndex
from phasewatch.report import figures
from phasewatch.report.blocks import Block, Section, Table, count, listed
from phasewatch.report.evidence import (
    LEDGER,
    PLACE,
    SCHEMA,
    Bundles,
    Evidence,
    Schema,
    Stage,
    coverage_of,
)
from phasewatch.report.proof import audit_block
from phasewatch.report.windows import Scored
from phasewatch.split import Fold

DRIFT_DAYS = 7  # below this span nothing can be said of drift (DESIGN section 7)


def grounds(evidence: Evidence, windows: Scored | None, origin: str) -> Section:
    """Build the section that says what lies under the numbers."""
    return Section(
        key="grounds",
        title="What it rests on",
        points=caveats(evidence, windows, origin),
        blocks=(
            _coverage(evidence.folds, windows),
            *_set_aside(evidence.splits),
            _ledger(evidence, origin),
            _reasons(evidence.bundles),
            audit_block(evidence.audit),
        ),
    )


def caveats(evidence: Evidence, windows: Scored | None, origin: str) -> tuple[str, ...]:
    """Say what the data itself forbids to conclude."""
    said = [f"Origin of the test episodes: {origin}."]
    hosts = (
        sorted({h for h, _ in windows.count_by()})
        if windows
        else list(evidence.bundles.hosts if evidence.bundles else ())
    )
    if len(hosts) == 1:
        said.append(f"There is one host ({hosts[0]}): nothing here says anything about another one.")
    elif hosts:
        said.append(
            f"There are {count(len(hosts), 'host')}: {listed(hosts)}. A host is hardware, hypervisor and VM shape taken together; "
            "a run cannot tell whether two of them are one physical machine. "
            "Unless the corpus's datasheet names several, read “unseen host” as “unseen VM shape on one machine”, "
            "not as “unseen data centre”."
        )
    span = evidence.bundles.span_days if evidence.bundles else None
    if span is not None and span < DRIFT_DAYS:
        said.append(f"The recordings span {_span(span)}: no drift over time can be seen.")
    if windows is not None and not windows.agent_off:
        said.append("No test episode ran without the guest agent, whose own cost is then part of what the host sees.")
    if evidence.schema is not None:
        s = evidence.schema
        said.append(
            f"The {PLACE.threat} threat model sees {s.n_host_channels} of {s.n_channels} channels: those that need no word of the guest."
        )
    return tuple(said)


def repeat(evidence: Evidence) -> Section:
    """Build the section with the commands and the digests that a second run must meet."""
    facts = [*_schema_facts(evidence.schema)]
    facts += [(f"sha256 of {name}", digest) for name, digest in sorted(evidence.digests.items())]
    table = Table(columns=("what", "value"), numeric=(False, False), rows=tuple(facts)) if facts else None
    return Section(
        key="repeat",
        title="How to repeat it",
        lead=(
            "The same store gives the same files, byte by byte, from any number of workers; times and host facts stand "
            "only in `run.json`. In all commands RUN is the folder in which this page lies, STORE the folder of the bundles."
        ),
        blocks=(
            Block(
                key="digests",
                title="What a second run must meet",
                table_name="Digests",
                table=table,
                shown=True,
                absent="" if table else "No file of the run could be read.",
                command="phasewatch run STORE --out RUN",
            ),
        ),
    )


def _schema_facts(schema: Schema | None) -> tuple[tuple[str, str], ...]:
    if schema is None:
        return (("feature schema", f"{SCHEMA} is absent"),)
    return (("feature schema", schema.schema_hash), ("behaviour fingerprint", schema.behaviour_fingerprint))


def _coverage(folds: Sequence[Fold], windows: Scored | None) -> Block:
    base_title = "Coverage: what was tested, what was not"
    of_recipe = [f for f in folds if f.recipe == PLACE.recipe]
    command = "phasewatch split RUN && phasewatch report RUN"
    if not of_recipe:
        return Block(
            key="coverage",
            title=base_title,
            absent=f"No split of recipe {PLACE.recipe}; `phasewatch split RUN` makes them.",
            command=command,
        )
    scored = windows.count_by() if windows is not None else {}
    cells = coverage_of(of_recipe)
    profiles = {c.profile for c in cells if c.test}
    never = sorted(set.intersection(*(set(f.untested_profiles) for f in of_recipe)))
    phases = sorted(set.intersection(*({str(p) for p in f.untested_phases} for f in of_recipe)))
    embargoed = sum(len(f.embargoed) for f in of_recipe)
    said = [
        f"{count(sum(c.test for c in cells), 'test episode')} over {count(len(of_recipe), 'fold')}; "
        f"{len(profiles)} of {count(len(profiles | set(never)), 'profile')} tested, benign ones counted too, where the "
        "headline counts the malicious ones of its own episodes.",
        f"Untested profiles: {listed(never) or 'none'}. Untested phases: {listed(phases) or 'none'}.",
    ]
    if embargoed:
        said.append(
            f"{count(embargoed, 'episode')} kept out of training, fold by fold, because they share a session or rows with a test episode."
        )
    body = [
        (c.host_id, c.profile, str(c.test) if c.test else "untested", str(scored.get((c.host_id, c.profile), 0)))
        for c in cells
    ]
    body += [("every host", p, "untested", "0") for p in never]
    columns = ("host", "profile", "test episodes", "of these in the headline")
    return Block(
        key="coverage",
        title=base_title,
        sentences=tuple(said),
        table=Table(columns=columns, numeric=(False, False, True, True), rows=tuple(body)),
        command=command,
    )


def _set_aside(splits: SplitIndex) -> tuple[Block, ...]:
    """Build the list of episodes that splits do without; nothing where there are none."""
    if not splits.set_aside:
        return ()
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for a in splits.set_aside:
        groups.setdefault((a.host_id, a.profile, a.code, listed(a.recipes) or "all"), []).append(a.episode_id)
    codes = list(dict.fromkeys(a.code for a in splits.set_aside))
    body = tuple(
        (host, profile, code, recipes, str(len(ids)), f"{ids[0]}{' …' if len(ids) > 1 else ''}")
        for (host, profile, code, recipes), ids in sorted(groups.items())
    )
    return (
        Block(
            key="set-aside",
            title="Episodes set aside",
            sentences=(
                f"{count(len({a.episode_id for a in splits.set_aside}), 'episode')} in no fold of some or all recipes; "
                "`splits_v1.json` names each.",
                *(f"{code}: {code.about}." for code in codes),
            ),
            table=Table(
                columns=("host", "profile", "reason", "recipes", "episodes", "first of them"),
                numeric=(False, False, False, False, True, False),
                rows=body,
            ),
            command="phasewatch split RUN",
        ),
    )


def _ledger(evidence: Evidence, origin: str) -> Block:
    stages = evidence.stages or _from_validation(evidence.bundles)
    command = "phasewatch validate STORE --out RUN"
    if not stages:
        return Block(
            key="ledger",
            title="Ledger",
            absent=f"No {LEDGER}; `phasewatch validate STORE --out RUN` writes it.",
            command=command,
        )
    tallies = tuple(figures.Tally(stage=s.name, counts=s.outcomes) for s in stages)
    said = ["In = accepted + degraded + rejected + errored, at each stage.", *(_balance(s) for s in stages)]
    names = list(dict.fromkeys(name for s in stages for name, _ in s.outcomes))

    def cell(n: int | None) -> str:
        return "–" if n is None else f"{n:,}"

    body = tuple(
        (
            s.name,
            cell(s.taken),
            *(cell(dict(s.outcomes).get(n)) for n in names),
            cell(s.rows_in),
            cell(s.rows_used),
            _lost(s),
        )
        for s in stages
    )
    columns = ("stage", "in", *names, "rows in", "rows used", "rows lost")
    numeric = (False, *(True,) * (len(names) + 3), False)
    return Block(
        key="ledger",
        title="Ledger: nothing is lost silently",
        sentences=tuple(said),
        figure=figures.ledger(tallies, origin=origin),
        table=Table(columns=columns, numeric=numeric, rows=body),
        command=command,
    )


def _from_validation(bundles: Bundles | None) -> tuple[Stage, ...]:
    if bundles is None:
        return ()
    return (Stage(name="validate", taken=bundles.total, outcomes=bundles.by_status),)


def _balance(stage: Stage) -> str:
    total = sum(n for _, n in stage.outcomes)
    parts = " + ".join(f"{n:,} {name}" for name, n in stage.outcomes)
    if stage.taken is None or stage.taken == total:
        return f"{stage.name}: {total:,} = {parts}."
    return f"{stage.name} does not balance: {stage.taken:,} went in, {total:,} = {parts} came out."


def _lost(stage: Stage) -> str:
    if stage.rows_in is None:
        return "–"
    return ", ".join(f"{n:,} {reason}" for reason, n in stage.rows_lost) or "0"


def _reasons(bundles: Bundles | None) -> Block:
    command = "phasewatch validate STORE --out RUN"
    if bundles is None:
        return Block(
            key="reasons",
            title="Why bundles were not simply accepted",
            absent="No validation_v1.parquet.",
            command=command,
        )
    if not bundles.by_reason:
        return Block(
            key="reasons",
            title="Why bundles were not simply accepted",
            sentences=("No bundle has a finding.",),
            command=command,
        )
    return Block(
        key="reasons",
        title="Why bundles were not simply accepted",
        sentences=("A bundle counts under each of its reasons.",),
        table=Table(
            columns=("status", "reason", "bundles"),
            numeric=(False, False, True),
            rows=tuple((s, reason, f"{n:,}") for s, reason, n in bundles.by_reason),
        ),
        shown=len(bundles.by_reason) <= 12,
        command=command,
    )


def _span(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"
