"""The folders that commands work on: a run, the bundled recordings and the bundled model."""

from __future__ import annotations

import os
from pathlib import Path

from phasewatch.errors import RunError, StoreError

__all__ = ["BUNDLED_CORPUS_DIR", "BUNDLED_MODEL_FILE", "check_run_folder", "find_bundled_corpus", "find_bundled_model"]

BUNDLED_CORPUS_DIR = Path("corpus") / "lab-v1"
BUNDLED_MODEL_FILE = "lab-v1.edge.zip"  # next to the recordings
_CORPUS_VARIABLE = "PHASEWATCH_CORPUS"


def find_bundled_corpus() -> Path:
    """Return the folder of the bundled recordings.

    It is the folder that ``PHASEWATCH_CORPUS`` names, else the checkout's, else ``corpus/lab-v1`` below the current
    folder. A wheel has no recordings, because they are larger than its code; the source distribution has them.

    Raises:
        StoreError: If there is no such folder.
    """
    wanted = os.environ.get(_CORPUS_VARIABLE)
    if wanted and not Path(wanted).is_dir():
        raise StoreError(
            f"{wanted}: {_CORPUS_VARIABLE} names this folder, and it does not exist; unset it or correct it"
        )
    checkout = Path(__file__).resolve().parents[3] / BUNDLED_CORPUS_DIR
    for corpus in (Path(wanted),) if wanted else (checkout, BUNDLED_CORPUS_DIR):
        if corpus.is_dir():
            return corpus
    raise StoreError(
        f"{BUNDLED_CORPUS_DIR}: the bundled recordings are not here, and an installed phasewatch has none; name a "
        f"store, work in a checkout or an unpacked source distribution, or set {_CORPUS_VARIABLE} to its "
        f"{BUNDLED_CORPUS_DIR}"
    )


def find_bundled_model() -> Path:
    """Return the edge bundle next to the bundled recordings.

    Raises:
        StoreError: If ``PHASEWATCH_CORPUS`` names a folder that does not exist.
        RunError: If there is no bundled model.
    """
    try:
        edge = find_bundled_corpus().parent / BUNDLED_MODEL_FILE
    except StoreError:
        if os.environ.get(_CORPUS_VARIABLE):
            raise
        edge = BUNDLED_CORPUS_DIR.parent / BUNDLED_MODEL_FILE
    if not edge.is_file():
        raise RunError(
            f"{edge}: the bundled model is not here, and an installed phasewatch has none; name one with --model "
            "(`phasewatch export RUN --out X.zip` makes it)"
        )
    return edge


def check_run_folder(run: Path) -> Path:
    """Return the folder of a run, or raise before anything is written to a folder that is no run.

    Raises:
        RunError: If it does not exist, is a store, or holds no file of a run.
    """
    # Here, so that `doctor` can look for the recordings where a package is missing.
    from phasewatch.artifacts import RUN_FILES
    from phasewatch.store.base import has_bundle

    if run.is_file():
        raise RunError(f"{run}: not a run: it is a file; name the folder that `phasewatch run STORE --out RUN` made")
    if not run.is_dir():
        raise RunError(f"{run}: there is no such run; make one with `phasewatch run STORE --out {run}`")
    is_store = has_bundle(run)  # even with the index of its accepted bundles, a file that a run has too
    if is_store or not any((run / name).is_file() for name in RUN_FILES):
        what = "it holds bundles, so it is a store" if is_store else "it holds no file of a run"
        raise RunError(f"{run}: not a run: {what}; make a run with `phasewatch run STORE --out RUN`")
    return run
