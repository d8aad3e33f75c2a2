"""No load path unpickles: every loader runs in a process in which unpickling is an error."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from tests.factories.bundles import episode
from tests.factories.stores import put, write_store
from tests.factories.synthetic_runs import World, write_run
from tests.models.test_models import fitted

from phasewatch.dataset import write_splits
from phasewatch.errors import PhasewatchError
from phasewatch.models import registry
from phasewatch.pipeline import stages
from phasewatch.training.experiment import Experiment
from phasewatch.training.train import train_experiments

CORPUS = Path(__file__).parents[2] / "corpus" / "lab-v1"
MODELS = ("gbt", "mlp", "minirocket")  # one of each kind of weights

# Runs first in the probe's process: an import hook puts alarmed doors in place of every unpickler that is imported,
# and an audit hook hears those that C code opens by itself.
ALARM = """
import builtins, importlib, sys
UNPICKLERS = {'pickle': ('load', 'loads', 'Unpickler'), '_pickle': ('load', 'loads', 'Unpickler'),
              'dill': ('load', 'loads', 'Unpickler'), 'cloudpickle': ('load', 'loads'), 'joblib': ('load',),
              'shelve': ('open',)}
class Unpickled(BaseException):
    pass
def alarm(*args, **kwargs):
    raise Unpickled('something was unpickled')
class Door:
    def __init__(self, *args, **kwargs):
        alarm()
    def __init_subclass__(cls, **kwargs):
        pass
def guard(name):
    module = sys.modules.get(name)
    for attribute in UNPICKLERS.get(name, ()):
        if hasattr(module, attribute):
            setattr(module, attribute, Door if attribute == 'Unpickler' else alarm)
real_import = builtins.__import__
def watched(name, *args, **kwargs):
    module = real_import(name, *args, **kwargs)
    for known in UNPICKLERS:
        if known in sys.modules:
            guard(known)
    return module
builtins.__import__ = watched
def hear(event, args):
    if event == 'pickle.find_class':
        alarm()
sys.addaudithook(hear)
import pickle
"""

PROBE = """
import sys
from pathlib import Path
store, run, corpus = map(Path, sys.argv[1:4])
from phasewatch.dataset import load, read_fold
from phasewatch.bundle.archive import unpack_bundle, unpack_manifest
from phasewatch.features.schema import schema_hash
from phasewatch.binning.storage import open_bins
from phasewatch.models import registry
from phasewatch.store.local import DiskStore
from phasewatch.training.predictions import read_predictions
from phasewatch.artifacts import PREDICTIONS_FILE, VALIDATION_FILE
from phasewatch.validate.index import read_index
seen = 0
for place in (store, corpus):
    for item in list(DiskStore(place).walk())[:5]:
        data = DiskStore(place).read(item)
        unpack_manifest(data, file=item.path)
        unpack_bundle(data, file=item.path)
        seen += 1
read_index(store.parent / 'swept' / VALIDATION_FILE)
open_bins(store.parent / 'swept' / 'grids')
open_bins(run / 'grids')
read_fold(run, 'held_out_host', 'host-0')
for folder in sorted(run.glob('models/**/checkpoint.json')):
    model = registry.load(folder.parent)
    sets = load(run, 'held_out_host', 'host-0', 'realistic', registry.find_model(model.key).kind)
    model.predict_proba(sets.test.inputs)
    seen += 1
for folder in sorted((run / 'alone').iterdir()):
    registry.load(folder)
    seen += 1
read_predictions(run / PREDICTIONS_FILE)
print('loaded', seen)
"""


def probe(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALARM + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("load")
    store = write_store(folder / "store", hosts=1, sessions=1)
    settings = stages.RunSettings(store=store, run=folder / "swept", workers=1)
    stages.validate(settings)
    stages.build_features(settings)
    run = write_run(folder / "run", World(windows=8))
    write_splits(run, "held_out_host")
    train_experiments(
        run, [Experiment(recipe="held_out_host", fold="host-0", threat="realistic", model="majority")], workers=1
    )
    for key in MODELS:
        fitted(key).save(run / "alone" / key)
    return store, run


def test_no_loader_unpickles(loaded: tuple[Path, Path]) -> None:
    done = probe(PROBE, *loaded, CORPUS)

    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) == 2 + 5 + 1 + len(MODELS)


@pytest.mark.parametrize(
    "program",
    [
        "pickle.loads(b'\\x80\\x04K\\x01.')",
        "from pickle import loads; loads(b'\\x80\\x04K\\x01.')",
        "import io; pickle.Unpickler(io.BytesIO(b'')).load()",
        "import numpy, io; b = io.BytesIO(); numpy.save(b, numpy.array([{}]), allow_pickle=True); b.seek(0); "
        "numpy.load(b, allow_pickle=True)",
    ],
    ids=["by its module", "by its name", "by its class", "inside numpy"],
)
def test_the_alarm_rings(program: str) -> None:
    assert "something was unpickled" in probe(program).stderr


def test_a_pickle_in_the_place_of_any_file_is_refused_in_words(tmp_path: Path) -> None:
    bomb = pickle.dumps({"any": "thing"})
    path = put(tmp_path / "store", episode())
    path.write_bytes(bomb)
    (tmp_path / "checkpoint.json").write_bytes(bomb)

    from phasewatch.bundle.archive import unpack_bundle

    for load in (lambda: unpack_bundle(path.read_bytes(), file="x"), lambda: registry.load(tmp_path)):
        with pytest.raises(PhasewatchError):
            load()
