"""The description of an installation for a bug report."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import phasewatch
from phasewatch.cli import app
from phasewatch.diagnostics import InstallationInfo, PackageInfo, describe_installation, find_extra, hide_home

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_every_required_distribution_is_listed() -> None:
    here = describe_installation()

    assert set(here.extras) == set(PROJECT["optional-dependencies"])
    assert {"numpy", "pyarrow", "typer"} <= {p.name for p in here.packages if not p.extra}
    assert (here.version, here.place) == (phasewatch.__version__, "a checkout")


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("torch.nn.functional", "train"),
        ("sklearn", "train"),
        ("lightgbm", "train"),
        ("onnxruntime", "live"),
        ("sse_starlette", "serve"),
        ("ray", "ray"),
        ("numpy", None),
        ("phasewatch.oops", None),
        ("antigravity", None),
        ("", None),
    ],
)
def test_module_maps_to_its_extra(module: str, extra: str | None) -> None:
    assert find_extra(module) == extra


def test_incomplete_extra_names_the_missing_package() -> None:
    packages = (
        PackageInfo(name="numpy", extra="", version="2.4"),
        PackageInfo(name="torch", extra="train", version=None),
        PackageInfo(name="scipy", extra="train", version="1.17"),
        PackageInfo(name="starlette", extra="serve", version="1.1"),
    )
    bare = InstallationInfo(version="1", place="", python="", system="", machine="", packages=packages, settings={})

    assert bare.extras == {"train": "lacks torch", "serve": "installed"}


def test_home_folder_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")

    assert hide_home("/home/ada/corpus") == "~/corpus"


def test_doctor_json_has_the_facts_for_a_bug_report() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    result = json.loads(done.stdout)["result"]

    assert done.exit_code in (0, 1)
    assert set(result["installation"]) >= {"version", "python", "system", "machine", "packages", "extras", "settings"}
    assert {"kvm", "python", "qemu-img"} <= {check["name"] for check in result["checks"]}
    assert result["corpus"].endswith("corpus/lab-v1")


def test_doctor_text_has_the_same_facts() -> None:
    lines = CliRunner().invoke(app, ["doctor"]).stdout.splitlines()

    assert lines[0].split()[:2] == ["phasewatch", f"{phasewatch.__version__},"]
    assert [line for line in lines if line.startswith("extra train")]
    assert [line for line in lines if " kvm " in line]
