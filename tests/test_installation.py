"""What an installation says of itself for a bug report, and what it keeps to itself."""

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


def test_everything_that_the_project_asks_for_is_looked_for() -> None:
    here = describe_installation()

    assert set(here.extras) == set(PROJECT["optional-dependencies"])
    assert {"numpy", "pyarrow", "typer"} <= {p.name for p in here.packages if not p.extra}
    assert (here.version, here.place) == (phasewatch.__version__, "a checkout")


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("torch.nn.functional", "train"), ("sklearn", "train"), ("xgboost", "train"), ("onnxruntime", "live"),
        ("qemu.qmp", "live"), ("sse_starlette", "serve"), ("ray", "ray"),
        ("numpy", None), ("phasewatch.oops", None), ("antigravity", None), ("", None),
    ],
)  # fmt: skip
def test_a_module_is_known_by_the_extra_that_brings_it(module: str, extra: str | None) -> None:
    assert find_extra(module) == extra


def test_an_extra_that_lacks_a_package_names_it() -> None:
    packages = (
        PackageInfo(name="numpy", extra="", version="2.4"), PackageInfo(name="torch", extra="train", version=None),
        PackageInfo(name="scipy", extra="train", version="1.17"), PackageInfo(name="starlette", extra="serve", version="1.1"),
    )  # fmt: skip
    bare = InstallationInfo(version="1", place="", python="", system="", machine="", packages=packages, settings={})

    assert bare.extras == {"train": "lacks torch", "serve": "installed"}


def test_a_home_is_nobodys_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")

    assert hide_home("/home/ada/corpus") == "~/corpus"


def test_doctor_tells_what_a_bug_report_needs() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    result = json.loads(done.stdout)["result"]

    assert done.exit_code in (0, 1)
    assert set(result["installation"]) >= {"version", "python", "system", "machine", "packages", "extras", "settings"}
    assert {"kvm", "python", "qemu-img"} <= {check["name"] for check in result["checks"]}
    assert result["corpus"].endswith("corpus/lab-v1")


def test_doctor_for_people_says_the_same() -> None:
    lines = CliRunner().invoke(app, ["doctor"]).stdout.splitlines()

    assert lines[0].split()[:2] == ["phasewatch", f"{phasewatch.__version__},"]
    assert [line for line in lines if line.startswith("extra train")]
    assert [line for line in lines if " kvm " in line]
