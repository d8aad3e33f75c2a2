"""Adapt a model to the known-clean hours of a site, and write it as an edge bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch import atomic
from phasewatch.adaptation.claims import FalseAlarmClaim, UnseenHostChange, bound_false_alarms, compare_unseen_hosts
from phasewatch.adaptation.fit import FoldComparison, SiteFit, compare_fold, fit_site_model
from phasewatch.adaptation.site_hours import SiteHours, SitePart, read_site_hours
from phasewatch.artifacts import BINS_DIR, FEATURE_SCHEMA_FILE
from phasewatch.binning.storage import index_rows_by_id, open_bins
from phasewatch.channels import CHANNELS
from phasewatch.dataset import read_folds, read_schema
from phasewatch.dataset.loader import build_input_spec
from phasewatch.dataset.split_files import read_all_folds
from phasewatch.errors import MismatchError, StoreError
from phasewatch.features.windows import WINDOW_NS
from phasewatch.inference.edge_bundle import TrainingOrigin, parse_edge_bundle
from phasewatch.inference.export import PARITY_WINDOWS, ExportedModel, pack_models, read_training_origin, render_card
from phasewatch.inference.model_selection import ModelCandidate, choose_model, find_bundle_models
from phasewatch.inference.onnx_export import check_parity, to_onnx
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.models import registry
from phasewatch.models.alarm import AlarmKind, apply_alarm_rule, compute_alarm_score, find_alarm_starts
from phasewatch.models.base import InputKind, InputVariant, ModelInputs, PhaseModel
from phasewatch.parallel.pool import map_ordered
from phasewatch.pipeline import runner
from phasewatch.pipeline.stages import RunSettings
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.store.base import StoreLocation
from phasewatch.training.experiment import Experiment
from phasewatch.training.grids import DEPLOY_RECIPE, HEADLINE_RECIPE
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS
from phasewatch.validate.sweep import sweep
from phasewatch.validate.verdict import USABLE_STATUSES

__all__ = [
    "AdaptRequest",
    "Adaptation",
    "PreparedSite",
    "SiteAlarm",
    "adapt",
    "prepare_corpus",
    "prepare_site",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteAlarm:
    """An alarm of the old model in time that is labelled clean.

    Attributes:
        at_s: Decision, in seconds since the episode's first label.
        score: The alarm's score in the window that started it.
    """

    host_id: str
    episode_id: str
    kind: AlarmKind
    at_s: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedSite:
    """A validated site with the old model's alarms on it.

    Attributes:
        hours: The clean hours.
        chosen: The old model with the channel set that `watch` would choose for these VMs.
        candidates: The old models whose channels the site has, the preferred one first.
        alarms: Every alarm of `chosen` in the clean hours.
        false_before: Infection alarms of `chosen` on the part that only tests.
        left_out: File and reason of every bundle that validation rejected.
    """

    hours: SiteHours
    chosen: PhasePredictor
    candidates: tuple[ModelCandidate, ...]
    alarms: tuple[SiteAlarm, ...]
    false_before: int
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptRequest:
    """What to adapt.

    Attributes:
        corpus: Run of the recorded hosts that the old model was trained on, with features and splits.
        out: Edge bundle to write.
        force: Write it even if the detection on unseen hosts got worse.
    """

    corpus: Path
    out: Path
    workers: int = 2
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """The result.

    Attributes:
        path: The edge bundle; None if it was refused.
        channel_sets: Channel sets of the bundle, the largest first.
        channel_set: The one that `watch` chooses for the site, which the numbers are about.
        before, after: False infection alarms on the site's hours that nothing was fitted to.
        change: What changed on unseen hosts of the corpus; None if it has one host, so nothing is known.
        theta_before, theta_after: Threshold of the infection alarm of every second; None without one.
    """

    path: Path | None
    channel_sets: tuple[str, ...]
    channel_set: str
    learn_hours: float
    threshold_hours: float
    before: FalseAlarmClaim
    after: FalseAlarmClaim
    change: UnseenHostChange | None
    theta_before: float | None
    theta_after: float | None
    parity: float


def prepare_corpus(store: StoreLocation, run: Path, *, workers: int, progress: Progress = NO_PROGRESS) -> Path:
    """Validate the corpus, and compute its features and splits; what is unchanged is kept."""
    runner.prepare_run(RunSettings(store=store, run=run, workers=workers), progress=progress)
    return run


def prepare_site(
    store: StoreLocation,
    run: Path,
    candidates: Sequence[ModelCandidate],
    *,
    workers: int,
    progress: Progress = NO_PROGRESS,
) -> PreparedSite:
    """Validate the site's store, choose the model as `watch` does, and find its alarms in the clean hours.

    Args:
        store: Store of bundles that are labelled clean throughout.
        run: Folder for the site's index and bins.
        candidates: The old models.
        workers: Number of processes.
        progress: Progress of the task ``site``.

    Raises:
        StoreError: If a bundle is not clean, or there is too little clean time.
        MismatchError: If no model fits the site's channels.
    """
    swept = sweep(store, run, workers=workers, progress=progress, task="site")
    hours = read_site_hours(run)
    bins = open_bins(run / BINS_DIR)
    known = np.zeros(len(CHANNELS), np.bool_)
    for row in hours.rows:
        known |= np.isfinite(np.asarray(bins.episode_bins(row))).any(axis=0)
    available = {c.full_name for c, has in zip(CHANNELS, known, strict=True) if has}
    arch = hours.rows[0].arch
    chosen = choose_model(candidates, available, arch=arch)
    usable = tuple(
        c
        for c in candidates
        if c.spec.table is not InputVariant.COMMISSIONED and not c.find_missing_channels(available, arch)
    )
    alarms = _find_site_alarms(chosen, hours)
    tested = [a for a in alarms if a[0].kind is AlarmKind.INFECTION and a[1] == SitePart.TEST]
    return PreparedSite(
        hours=hours,
        chosen=chosen,
        candidates=usable,
        alarms=tuple(a for a, _ in alarms),
        false_before=len(tested),
        left_out=tuple(v.detail or v.path for v in swept.verdicts if v.status not in USABLE_STATUSES),
    )


def adapt(site: PreparedSite, request: AdaptRequest, *, progress: Progress = NO_PROGRESS) -> Adaptation:
    """Train the adapted models, measure them, and write the edge bundle unless unseen hosts are detected worse.

    Args:
        site: From `prepare_site`.
        request: What to adapt.
        progress: Progress of the task ``adapt``: the comparison's folds, then the models.

    Raises:
        MismatchError: If the corpus is not the one that the old model was trained on.
        StoreError: If an episode of the site is in the corpus.
    """
    trained = read_training_origin(request.corpus, DEPLOY_RECIPE, _find_deploy_fold(request.corpus))
    _check_corpus(site, request.corpus, trained)
    comparisons = [_build_fit(site, request, site.chosen, HEADLINE_RECIPE, f) for f in _list_folds(request.corpus)]
    fold = _find_deploy_fold(request.corpus)
    models = [_build_fit(site, request, c, DEPLOY_RECIPE, fold) for c in site.candidates]
    n = len(comparisons) + len(models)
    folds: list[FoldComparison] = []
    for done in map_ordered(compare_fold, comparisons, workers=request.workers):
        folds.append(done.unwrap("adapt"))
        progress.update("adapt", len(folds), n, f"without {comparisons[done.index].fold}")
    change = compare_unseen_hosts(folds) if folds else None
    exported: list[ExportedModel] = []
    parity = 0.0
    for result in map_ordered(partial(_export_fit, corpus=request.corpus), models, workers=request.workers):
        one, error = result.unwrap("adapt")
        parity = max(parity, error)
        exported.append(one)
        progress.update("adapt", len(folds) + len(exported), n, one.cell.threat)
    exported.sort(key=lambda one: (-len(one.model.spec.names if one.model.spec else ()), one.cell.threat))
    origin = _join_origins(trained, site.hours)
    card = render_card(exported, origin, lambda _: "") + _render_site_section(site, change)
    schema = (request.corpus / FEATURE_SCHEMA_FILE).read_bytes()
    data = pack_models(exported, origin, schema=schema, card=card)
    adapted = _find_predictor(data, request.out, site.chosen)
    after = sum(
        alarm.kind is AlarmKind.INFECTION and part == SitePart.TEST
        for alarm, part in _find_site_alarms(adapted, site.hours)
    )
    is_refused = change is not None and change.is_worse and not request.force
    if not is_refused:
        atomic.make_folder(request.out.absolute().parent)
        atomic.write_atomic(request.out, data)
    hours = site.hours.count_hours(SitePart.TEST)
    return Adaptation(
        path=None if is_refused else request.out,
        channel_sets=tuple(one.cell.threat for one in exported),
        channel_set=site.chosen.threat,
        learn_hours=site.hours.count_hours(SitePart.LEARN),
        threshold_hours=site.hours.count_hours(SitePart.THRESHOLD),
        before=bound_false_alarms(site.false_before, hours),
        after=bound_false_alarms(after, hours),
        change=change,
        theta_before=_find_theta(site.chosen),
        theta_after=_find_theta(adapted),
        parity=parity,
    )


def _find_site_alarms(predictor: PhasePredictor, hours: SiteHours) -> list[tuple[SiteAlarm, int]]:
    """Return each alarm that a model starts in the clean hours, as a watcher would, with the part of its window.

    A window in which all of the model's channels are unknown has no decision.
    """
    bins = open_bins(hours.run / BINS_DIR)
    found: list[tuple[SiteAlarm, int]] = []
    for number, row in enumerate(hours.rows):
        own = np.flatnonzero(hours.windows.episode_index == number)
        values = np.asarray(bins.episode_bins(row))
        p = predictor.predict_windows(values, LIVE_STRIDE_BINS)
        known = predictor.compute_known_share(values, LIVE_STRIDE_BINS)
        at = (hours.windows.t_center_ns[own] - WINDOW_NS // 2 - row.t0_ns) // (BIN_NS * LIVE_STRIDE_BINS)
        own, at = own[known[at] > 0.0], at[known[at] > 0.0]
        for kind in AlarmKind:
            found += _list_starts(predictor, hours, kind, own, p[at])
    return sorted(found, key=lambda one: (one[0].host_id, one[0].episode_id, one[0].at_s, one[0].kind))


def _list_starts(
    predictor: PhasePredictor, hours: SiteHours, kind: AlarmKind, own: NDArray[np.intp], p: NDArray[np.float64]
) -> list[tuple[SiteAlarm, int]]:
    rule = predictor.find_rule(kind, LIVE_STRIDE_BINS)
    if rule is None or not len(own):
        return []
    windows = hours.windows
    score = compute_alarm_score(p, kind)
    starts = find_alarm_starts(apply_alarm_rule(rule, score, windows.episode_index[own]), windows.episode_index[own])
    alarms = []
    for i in np.flatnonzero(starts):
        episode = windows.episodes[windows.episode_index[own[i]]]
        alarm = SiteAlarm(
            host_id=episode.host_id,
            episode_id=episode.episode_id,
            kind=kind,
            at_s=float(windows.t_center_s[own[i]]) + WINDOW_NS / 2e9,
            score=float(score[i]),
        )
        alarms.append((alarm, int(hours.part[own[i]])))
    return alarms


def _find_deploy_fold(corpus: Path) -> str:
    return read_folds(corpus, DEPLOY_RECIPE)[0].fold


def _list_folds(corpus: Path) -> list[str]:
    return [fold.fold for fold in read_all_folds(corpus, HEADLINE_RECIPE)]


def _check_corpus(site: PreparedSite, corpus: Path, trained: TrainingOrigin) -> None:
    old = site.chosen.trained
    if old.hosts and set(old.hosts) != set(trained.hosts):
        raise MismatchError(
            f"{site.chosen.where}: was trained on the hosts {', '.join(old.hosts)}, but the corpus has "
            f"{', '.join(trained.hosts)}; name the store that it was trained on with --corpus, or its run with --model"
        )
    known = index_rows_by_id(open_bins(corpus / BINS_DIR))
    if shared := sorted(e.episode_id for e in site.hours.windows.episodes if e.episode_id in known):
        raise StoreError(
            f"episode {shared[0]} is in the corpus too, so what changes on its hosts could not be measured; take it "
            "out of the site's store"
        )
    if any(c.model not in {row.key for row in registry.BUILTIN_MODELS} for c in site.candidates):
        raise MismatchError(f"{site.chosen.where}: holds a model of your own; only built-in models can be adapted")


def _build_fit(
    site: PreparedSite, request: AdaptRequest, model: ModelCandidate | PhasePredictor, recipe: str, fold: str
) -> SiteFit:
    return SiteFit(
        run=request.corpus,
        site=site.hours.run,
        recipe=recipe,
        fold=fold,
        model=model.model,
        channel_set=model.threat,
        table=str(model.spec.table),
        seed=model.seed,
    )


def _export_fit(fit: SiteFit, *, corpus: Path) -> tuple[ExportedModel, float]:
    """Fit one model, and return its export with the largest difference of a probability."""
    model = fit_site_model(fit)
    data = to_onnx(model)
    cell = Experiment(
        recipe=fit.recipe, fold=fit.fold, threat=fit.channel_set, model=fit.model, table=fit.table, seed=fit.seed
    )
    inputs = _sample_inputs(fit, corpus, model)
    exported = ExportedModel(cell=cell, model=model, onnx=data, versions=model.collect_versions())
    return exported, check_parity(model, data, inputs)


def _sample_inputs(fit: SiteFit, corpus: Path, model: PhaseModel) -> ModelInputs:
    spec = build_input_spec(
        read_schema(corpus), fit.channel_set, InputKind(registry.find_model(fit.model).kind), InputVariant(fit.table)
    )
    examples = read_site_hours(fit.site).build_examples(spec, at_most=PARITY_WINDOWS)
    if examples is None:
        raise StoreError(f"{fit.site}: no clean window to compare the exported model on")
    return examples.inputs


def _find_predictor(data: bytes, out: Path, old: PhasePredictor) -> PhasePredictor:
    """Load the adapted model of the channel set that `watch` chooses for the site."""
    candidates = find_bundle_models(parse_edge_bundle(data, file=str(out)))
    own = next(c for c in candidates if (c.threat, c.spec.table) == (old.threat, old.spec.table))
    return own.load_predictor()


def _find_theta(predictor: PhasePredictor) -> float | None:
    rule = predictor.find_rule(AlarmKind.INFECTION, LIVE_STRIDE_BINS)
    return None if rule is None else rule.theta


def _join_origins(trained: TrainingOrigin, hours: SiteHours) -> TrainingOrigin:
    """Return the origin of the corpus and of the site together."""

    def join(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
        return tuple(sorted({*first, *second}))

    episodes = hours.windows.episodes
    return TrainingOrigin(
        hosts=join(trained.hosts, hours.hosts),
        accels=join(trained.accels, [row.accel for row in hours.rows]),
        archs=join(trained.archs, [row.arch for row in hours.rows]),
        origins=join(trained.origins, [str(e.origin) for e in episodes]),
        profiles=join(trained.profiles, [e.profile for e in episodes]),
        episodes=trained.episodes + len(episodes),
    )


def _render_site_section(site: PreparedSite, change: UnseenHostChange | None) -> str:
    """Render the part of the card on the site and on unseen hosts of the corpus."""
    hours = site.hours
    lines = [
        "",
        "## Adapted to a site",
        "",
        f"Hosts {', '.join(hours.hosts)}: {hours.count_hours(SitePart.LEARN):.2f} clean VM-hours were learnt from, "
        f"{hours.count_hours(SitePart.THRESHOLD):.2f} bound the thresholds, "
        f"{hours.count_hours(SitePart.TEST):.2f} were held back from both.",
    ]
    if change is None:
        lines.append("The corpus has one host, so nothing is known about unseen hosts.")
    else:
        f1 = change.macro_f1_3class
        lines.append(
            f"On {change.n_hosts} unseen hosts of the corpus, {site.chosen.threat}: macro-F1 3 classes "
            f"{f1.before:.3f} before, {f1.after:.3f} after."
        )
    return "\n".join([*lines, ""])
