"""`pip install phasewatch[live]` alone is enough to list VMs and to read an edge bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
@pytest.mark.slow
def test_the_live_extra_alone_reads_an_edge_bundle_and_lists_vms(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=300)
    python = venv / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), f"{ROOT}[live]"]
    subprocess.run(install, check=True, timeout=900)
    plain = {**os.environ, "PYTHONPATH": ""}
    listed = subprocess.run(
        [str(venv / "bin" / "phasewatch"), "watch", "--list"], env=plain, capture_output=True, text=True
    )
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from phasewatch.inference.model_selection import find_models\n"
        "scorer = find_models(Path(sys.argv[1]))[0].load_predictor()\n"
        "print(scorer.threat, scorer.predict_windows(np.zeros((20, 46), np.float32)).shape)\n"
        "heavy = ('torch', 'lightgbm', 'sklearn', 'scipy', 'plotly')\n"
        "import importlib.util; print([m for m in heavy if importlib.util.find_spec(m)])\n"
    )
    edge = ROOT / "corpus" / "lab-v1.edge.zip"
    read = subprocess.run([str(python), "-c", code, str(edge)], env=plain, capture_output=True, text=True)

    assert listed.returncode == 0, listed.stderr
    assert read.returncode == 0, read.stderr
    assert read.stdout.split("\n")[:2] == ["realistic (1, 5)", "[]"]
