"""The container file names only files, packages, commands and options that exist; no engine builds it here."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from phasewatch.cli.groups import load_command

ROOT = Path(__file__).parents[2]
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "VOLUME", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


def read_steps() -> list[tuple[str, str]]:
    """Return instruction and arguments of each step."""
    lines = (ROOT / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")]


def arguments_of(instruction: str) -> list[str]:
    return [rest for word, rest in read_steps() if word == instruction]


def test_every_instruction_is_known_and_the_first_is_from() -> None:
    words = [word for word, _ in read_steps()]

    assert words[0] == "FROM"
    assert set(words) <= KNOWN


def test_every_copied_file_exists_and_is_sent_to_the_engine() -> None:
    sources = [s for rest in arguments_of("COPY") if "--from=" not in rest for s in shlex.split(rest)[:-1]]
    sent = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}

    assert [s for s in sources if not (ROOT / s).exists()] == []
    assert set(sources) == sent


@pytest.mark.parametrize("line", arguments_of("RUN"))
def test_the_shell_understands_a_step(line: str) -> None:
    assert subprocess.run(["sh", "-n", "-c", line], capture_output=True, check=False).returncode == 0


def test_the_distribution_has_the_packages() -> None:
    if shutil.which("apt-cache") is None:
        pytest.skip("apt-cache is not at hand")
    installs = [rest.split("--no-install-recommends")[1] for rest in arguments_of("RUN") if "apt-get install" in rest]
    listed = [words.split("&&")[0].split() for words in installs]
    names = sorted({name for words in listed for name in words})

    known = subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True, check=True).stdout.split()
    if not known:
        pytest.skip("apt has no lists")
    assert [name for name in names if name not in known] == []


def test_the_image_installs_extras_that_exist_and_starts_a_command_with_options_that_it_has() -> None:
    extras = set(re.findall(r"\.\[([a-z,]+)\]", "\n".join(arguments_of("RUN")))[0].split(","))
    (program,), (name, *words) = json.loads(arguments_of("ENTRYPOINT")[0]), json.loads(arguments_of("CMD")[0])
    options = {option for parameter in load_command(name).params for option in parameter.opts}

    assert program == "/opt/phasewatch/bin/phasewatch"
    assert {word for word in words if word.startswith("--")} <= options
    assert all(re.search(rf"^{extra} = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras)
