"""`pip install` of each extra into an environment of its own, with an empty home: what works there, and what says
why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "corpus" / "lab-v1"
HEAVY = ("torch", "lightgbm", "sklearn", "scipy", "plotly", "onnxruntime", "starlette")

pytestmark = pytest.mark.soak


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A clean environment."""

    python: Path
    home: Path

    def call(self, *arguments: str, code: int = 0) -> str:
        """Run phasewatch as its user would, and give what it said."""
        program = self.python.with_name("phasewatch")
        env = {"HOME": str(self.home), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "COLUMNS": "200"}
        done = subprocess.run(
            [str(program), *arguments], cwd=self.home, env=env, capture_output=True, text=True, timeout=600
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def weight(self) -> dict[str, int]:
        """Count the packages that were installed, and what they take on the disk."""
        site = next((self.python.parents[1] / "lib").glob("python*")) / "site-packages"
        size = sum(f.stat().st_size for f in site.rglob("*") if f.is_file() and f.suffix != ".pyc")
        return {"packages": len(list(site.glob("*.dist-info"))), "MiB": round(size / 2**20)}

    def has(self, module: str) -> bool:
        """Return whether a module can be found there."""
        probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        return subprocess.run([str(self.python), "-c", probe], check=False).returncode == 0


def install(folder: Path, what: str) -> Place:
    """Build an environment with nothing but what is asked for, by pip's own resolver rules and our pins."""
    uv = Path(sys.executable).with_name("uv")
    (folder / "home").mkdir(parents=True)
    subprocess.run([str(uv), "venv", "-q", "--python", sys.executable, str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    torch = ["--find-links", links] if links else ["--torch-backend", "cpu"]
    command = [str(uv), "pip", "install", "-q", "--python", str(python), "-c", str(ROOT / "constraints.txt"), *torch]
    subprocess.run([*command, what], check=True, timeout=900)
    return Place(python=python, home=folder / "home")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return next(out.glob("*.whl"))


def test_the_core_simulates_validates_and_makes_features(
    wheel: Path, tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    place = install(tmp_path, str(wheel))

    place.call("simulate", "--hosts", "2", "--episodes", "6", "--out", "made")
    place.call("validate", "made", "--out", "run")
    place.call("features", "run")
    place.call("channels")

    assert not [module for module in HEAVY if place.has(module)]
    assert "pip install 'phasewatch[train]'" in place.call("report", "run", code=5)
    assert "extra train" in place.call("doctor")
    assert "PHASEWATCH_CORPUS" in place.call("demo", code=3)
    soak_row("Clean environments", installed="the core", **place.weight())


def test_plain_pip_installs_the_folder_itself(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    place = Place(python=tmp_path / "venv" / "bin" / "python", home=tmp_path / "home")
    command = [str(place.python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", "constraints.txt"]
    subprocess.run([*command, "."], cwd=ROOT, check=True, timeout=900)

    assert place.call("--version").startswith("phasewatch ")


def test_train_takes_recordings_the_whole_way(wheel: Path, tmp_path: Path, soak_row: Callable[..., None]) -> None:
    place = install(tmp_path, f"{wheel}[train]")

    said = place.call("run", str(CORPUS), "--out", "run", "--models", "gbt,majority,elapsed_time")

    assert "macro-F1 of phase, unseen host, realistic, gbt: 0." in said
    assert (place.home / "run" / "report.html").is_file()
    soak_row("Clean environments", installed="[train]", **place.weight())


def test_live_brings_a_runtime_and_none_of_the_training(
    wheel: Path, tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    place = install(tmp_path, f"{wheel}[live]")

    assert place.has("onnxruntime")
    assert not [module for module in ("torch", "lightgbm", "sklearn", "scipy", "plotly") if place.has(module)]
    place.call("inspect", str(next(CORPUS.glob("*/*.tar.zst"))))
    soak_row("Clean environments", installed="[live]", **place.weight())


def test_serve_brings_a_server_and_none_of_the_training(
    wheel: Path, tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    place = install(tmp_path, f"{wheel}[serve]")

    assert place.has("starlette")
    assert not [module for module in ("torch", "lightgbm", "sklearn", "scipy", "onnxruntime") if place.has(module)]
    place.call("validate", str(CORPUS), "--out", "run")
    soak_row("Clean environments", installed="[serve]", **place.weight())
