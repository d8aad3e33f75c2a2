"""Fit a model to recorded hosts and to a site's clean hours, and compare both on hosts that neither has seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch.adaptation.site_hours import SiteHours, SitePart, read_site_hours
from phasewatch.dataset import FoldData, load
from phasewatch.models import registry
from phasewatch.models.alarm import (
    LIVE_STRIDE_S,
    AlarmKind,
    AlarmRule,
    apply_alarm_rule,
    compute_alarm_score,
    find_alarm_rule,
    find_alarm_starts,
    find_false_alarm_windows,
    list_announced_onsets,
    raise_threshold,
)
from phasewatch.models.base import LabelledExamples, PhaseModel
from phasewatch.training.live_scores import LiveScores, predict_live_windows
from phasewatch.training.train import FittedModel, fit_model
from phasewatch.types import Phase

__all__ = ["FoldComparison", "SiteFit", "compare_fold", "count_false_alarms", "fit_site_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFit:
    """What to fit: one model on one fold of a run.

    Attributes:
        run: Run of the recorded hosts.
        site: Folder with the site's bins.
        model, channel_set, table, seed: The model and its input.
    """

    run: Path
    site: Path
    recipe: str
    fold: str
    model: str
    channel_set: str
    table: str
    seed: int = 0

    def load(self) -> FoldData:
        """Load the windows of the fold."""
        kind = registry.find_model(self.model).kind
        return load(self.run, self.recipe, self.fold, self.channel_set, kind, self.table)

    def create(self) -> PhaseModel:
        """Create the model, not fitted."""
        return registry.create(self.model, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldComparison:
    """The test windows of one fold, decided by the model without and with the site's hours.

    Attributes:
        host, session: ``(n,)`` str of each test window.
        y, before, after: ``(n,)`` int64 true phase and both decisions.
        onset_host, onset_session: ``(m,)`` str of each infection after which 30 s were recorded.
        announced_before, announced_after: ``(m,)`` bool: whether the infection alarm started within 30 s.
        false_before, false_after: False infection alarms on quiet time of the test hosts, soak included.
        quiet_hours: VM-hours of that time.
    """

    host: NDArray[np.str_]
    session: NDArray[np.str_]
    y: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    onset_host: NDArray[np.str_]
    onset_session: NDArray[np.str_]
    announced_before: NDArray[np.bool_]
    announced_after: NDArray[np.bool_]
    false_before: int
    false_after: int
    quiet_hours: float


def fit_site_model(fit: SiteFit) -> PhaseModel:
    """Fit a model to the recorded hosts and the site's hours; its thresholds stay within budget on both."""
    sets, site = fit.load(), read_site_hours(fit.site)
    return _fit_with_site(fit, sets, site, without_host="").model


def compare_fold(fit: SiteFit) -> FoldComparison:
    """Fit the model of one fold without and with the site's hours, and decide on the test set with both."""
    sets, site = fit.load(), read_site_hours(fit.site)
    windows = sets.test.windows
    tested = {e.host_id for e in windows.episodes}
    plain = fit_model(fit.create(), sets)
    adapted = _fit_with_site(fit, sets, site, without_host=min(tested, default=""))
    hosts = np.array([e.host_id for e in windows.episodes], dtype=np.str_)
    sessions = np.array([e.session for e in windows.episodes], dtype=np.str_)
    before, after = (_judge_alarms(fitted, sets, tested) for fitted in (plain, adapted))
    return FoldComparison(
        host=hosts[windows.episode_index],
        session=sessions[windows.episode_index],
        y=windows.y,
        before=plain.model.predict(sets.test.inputs),
        after=adapted.model.predict(sets.test.inputs),
        onset_host=before.host,
        onset_session=before.session,
        announced_before=before.announced,
        announced_after=after.announced,
        false_before=before.false_alarms,
        false_after=after.false_alarms,
        quiet_hours=before.quiet_hours,
    )


def _fit_with_site(fit: SiteFit, sets: FoldData, site: SiteHours, *, without_host: str) -> FittedModel:
    """Fit a model with the site's windows among its training windows, then raise its thresholds on held-back ones.

    Args:
        fit: The model.
        sets: The fold.
        site: The site's hours.
        without_host: A host of the site whose name the fold holds out; its windows are not learnt from.
    """
    spec = sets.train.inputs.spec
    n_clean = int((sets.train.y == Phase.CLEAN.code).sum())
    own = site.build_examples(spec, without_host=without_host, at_most=n_clean)
    extra = [part for part in (sets.extra, own) if part is not None]
    joined = replace(sets, extra=LabelledExamples.concatenate(extra) if extra else None)
    fitted = fit_model(fit.create(), joined)
    model, rules = fitted.model, []
    scores = {s: site.score(model, spec, SitePart.THRESHOLD, s) for s in {rule.stride_s for rule in model.alarms}}
    for rule in model.alarms:
        score = scores[rule.stride_s]
        rules.append(raise_threshold(rule, score.p, score.labels))
        model.trained_on[f"decide_site_{rule.stride_s}s"] = score.sha256
        model.trained_with[f"decide_site_{rule.stride_s}s"] = len(score.p)
    model.alarms = tuple(rules)
    return fitted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _AlarmCounts:
    host: NDArray[np.str_]
    session: NDArray[np.str_]
    announced: NDArray[np.bool_]
    false_alarms: int
    quiet_hours: float


def _judge_alarms(fitted: FittedModel, sets: FoldData, hosts: set[str]) -> _AlarmCounts:
    """Count what the infection alarm of a live watcher does on the test episodes, and on the soak of their hosts."""
    rule = find_alarm_rule(fitted.model.alarms, AlarmKind.INFECTION, LIVE_STRIDE_S)
    lab = predict_live_windows(fitted.model, sets, sets.test.windows.episodes)
    if rule is None or lab is None:
        return _AlarmCounts(
            host=np.zeros(0, np.str_),
            session=np.zeros(0, np.str_),
            announced=np.zeros(0, np.bool_),
            false_alarms=0,
            quiet_hours=0.0,
        )
    parts = [lab]
    if fitted.soak_live is not None:
        soak = fitted.soak_live
        parts.append(soak.select_episodes({e.episode_id for e in soak.windows.episodes if e.host_id in hosts}))
    false = quiet = 0
    for score in parts:
        found = count_false_alarms(rule, score)
        false, quiet = false + found[0], quiet + found[1]
    episodes, announced = list_announced_onsets(rule, lab.p, lab.windows.label_sequence)
    of = [lab.windows.episodes[i] for i in episodes]
    return _AlarmCounts(
        host=np.array([e.host_id for e in of], dtype=np.str_),
        session=np.array([e.session for e in of], dtype=np.str_),
        announced=announced,
        false_alarms=false,
        quiet_hours=quiet * LIVE_STRIDE_S / 3600,
    )


def count_false_alarms(rule: AlarmRule, scores: LiveScores) -> tuple[int, int]:
    """Count the false starts of an alarm, and the quiet windows, in predictions of every second."""
    labels = scores.windows.label_sequence
    is_active = apply_alarm_rule(rule, compute_alarm_score(scores.p, rule.kind), labels.episode_index)
    is_quiet = find_false_alarm_windows(labels)
    starts = find_alarm_starts(is_active, labels.episode_index)
    return int(np.count_nonzero(starts & is_quiet)), int(np.count_nonzero(is_quiet))
