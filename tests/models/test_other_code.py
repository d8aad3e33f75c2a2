"""A checkpoint under other feature code: another divisor is refused in words and with exit code 4, a comment is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.models.test_models import examples

import phasewatch
from phasewatch.channels import BASE_CHANNELS
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import schema_hash
from phasewatch.models import registry
from phasewatch.models.base import InputSpec, LabelledExamples, ModelInputs

SRC = Path(phasewatch.__file__).parent
LOAD = """
import sys
from pathlib import Path
from phasewatch.errors import PhasewatchError
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.channels import BASE_CHANNELS
from phasewatch.features.schema import schema_hash
from phasewatch.models import checkpoint, registry
from phasewatch.models.base import InputKind, InputSpec

folder = Path(sys.argv[1])
header = checkpoint.read_header(folder)
mine = InputSpec(kind=InputKind(header.input_kind), names=header.columns, mask=header.mask,
                 schema_hash=schema_hash(BASE_CHANNELS),
                 behaviour_fingerprint=behaviour_fingerprint(BASE_CHANNELS))
try:
    print(registry.load(folder, expected=mine).key)
except PhasewatchError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    data = examples("majority")
    spec = InputSpec(
        kind=data.inputs.spec.kind, names=data.inputs.spec.names, mask="realistic",
        schema_hash=schema_hash(BASE_CHANNELS),
        behaviour_fingerprint=behaviour_fingerprint(BASE_CHANNELS),
    )  # fmt: skip
    mine = LabelledExamples(inputs=ModelInputs(x=data.inputs.x, spec=spec), y=data.y)
    registry.create("majority").fit(mine, mine).save(folder)
    return folder


def load_under(code: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, "-c", LOAD, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def changed(tmp_path: Path, old: str, new: str) -> Path:
    shutil.copytree(SRC, tmp_path / "phasewatch", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "phasewatch" / "features" / "stats.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return tmp_path


def test_a_changed_ddof_is_refused_with_the_difference_and_exit_code_four(stored: Path, tmp_path: Path) -> None:
    said = load_under(
        changed(tmp_path, "_sum_rows(x) / WINDOW_BINS, out=out[1]", "_sum_rows(x) / (WINDOW_BINS - 1), out=out[1]"),
        stored,
    )

    assert said.returncode == 4, said.stderr
    ours = behaviour_fingerprint(BASE_CHANNELS)
    assert "behaviour fingerprint" in said.stdout
    assert f"the model needs {ours[:16]}" in said.stdout
    assert "train it again on these features" in said.stdout


def test_a_changed_comment_is_not(stored: Path, tmp_path: Path) -> None:
    said = load_under(changed(tmp_path, "from __future__", "# Nothing that counts.\nfrom __future__"), stored)

    assert (said.returncode, said.stdout) == (0, "majority\n"), said.stderr
