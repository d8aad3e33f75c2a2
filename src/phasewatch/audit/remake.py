"""Everything before training made again from the bundles, in a folder of its own, and held against the run's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phasewatch.audit.checks import Check, collecting, judge, untested
from phasewatch.audit.disjoint import crowded_digests, faults_of, faults_over
from phasewatch.dataset import file_sha256
from phasewatch.dataset.splits import read_episodes, read_folds, read_split_index
from phasewatch.split import SetAside, SplitEpisode, recipes
from phasewatch.vocab import Role

REMADE = "remade-from-bundles"
REMADE_PROMISE = "Verdicts, grids, features and splits are what the bundles give, byte for byte."
DISJOINT = "disjoint"
DISJOINT_PROMISE = "No host, sample, session, time, plan or near-duplicate that a recipe holds out was learnt from."
NOTHING_HELD_OUT = ("deploy",)


def check_remade(run: Path, copy: Path, files: tuple[str, ...]) -> Check:
    """Hold the run's files against those that were made again.

    Args:
        run: The run.
        copy: The folder where the stages before training were made again from the same store.
        files: Their names, the splits aside.
    """
    faults: list[str] = []
    with collecting(faults):
        splits = {f"splits/{p.name}" for folder in (run, copy) for p in (folder / "splits").glob("*.json")}
        for name in (*files, *sorted(splits)):
            ours, theirs = ((f / name) for f in (run, copy))
            if not ours.is_file() or not theirs.is_file() or file_sha256(ours) != file_sha256(theirs):
                faults.append(f"{name} is not what the bundles give")
    return judge(REMADE, REMADE_PROMISE, faults, looked_at=f"{len(files) + len(splits)} files made again")


def check_disjoint(run: Path, episodes_from: Path) -> Check:
    """Check each fold's claims on episodes as the bundles tell them.

    Args:
        run: Whose splits are looked at.
        episodes_from: A run whose verdicts and features were made from the bundles.
    """
    faults: list[str] = []
    looked: list[str] = []
    with collecting(faults):
        found = read_episodes(episodes_from)
        episodes = {e.episode_id: e for e in found}
        index = read_split_index(run)
        if index.recipes and (there := read_split_index(episodes_from)).recipes and there != index:
            faults.append("splits_v1.json sets other episodes aside than the bundles give")
        # An id that another host keeps is set aside for this host alone.
        odd = [a for a in index.set_aside if a.episode_id in episodes and episodes[a.episode_id].host_id == a.host_id]
        crowded = _crowded(found, odd)
        for recipe in recipes.RECIPES:
            if recipe.leaky or recipe.name in NOTHING_HELD_OUT or not list(run.glob(f"splits/{recipe.name}-*.json")):
                continue
            folds = read_folds(run, recipe.name)
            looked.append(f"{len(folds)} folds of {recipe.name}")
            aside = {a.episode_id for a in odd if not a.recipes or recipe.name in a.recipes}
            faults += faults_over(folds, episodes, aside)
            for fold in folds:
                faults += faults_of(fold, episodes, crowded)
    if not looked and not faults:
        return untested(DISJOINT, DISJOINT_PROMISE, "the run has no split that holds something out")
    return judge(DISJOINT, DISJOINT_PROMISE, faults, looked_at=", ".join(looked))


def _crowded(episodes: Sequence[SplitEpisode], aside: Sequence[SetAside]) -> frozenset[int]:
    """Return the digests that tell nothing among the episodes that a split uses."""
    odd = {a.episode_id for a in aside if not a.recipes}
    return crowded_digests(e for e in episodes if e.role is Role.LAB and e.phases and e.episode_id not in odd)
