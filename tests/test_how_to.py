"""Every shell line of the how-to pages is run as it stands, or stands in `NOT_RUN` with the reason."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "how-to").glob("*.md"))}

# Page → its lines that take seconds and need neither a VM nor a run.
RUN = {
    "alarms": [
        "phasewatch check-config --example > /etc/phasewatch/watch.toml",
        "phasewatch check-config /etc/phasewatch/watch.toml",
        "phasewatch alarms list --state /var/lib/phasewatch",
        "phasewatch alarms silence --vm 'build*' --kind activity --for 2h --note \"nightly build\" "
        "--state /var/lib/phasewatch",
    ],
    "own-channels": ["phasewatch channels --custom-channels extra.toml"],
    "own-profile": ["phasewatch record --profile-file log-wiper.toml --out my-store --dry-run"],
    "record": ["phasewatch doctor", "phasewatch record --plan lab-v1 --out my-lab --dry-run"],
}
# Page → its lines that take minutes, run with `make soak`.
RUN_LONG = {
    "simulate": [
        "phasewatch simulate --hosts 6 --episodes 240 --seed 1 --out simulated",
        "phasewatch simulate --hosts 10 --episodes 5000 --seed 2 --faults 0.15 --out faulty",
        "phasewatch simulate --hosts 4 --episodes 80 --faults 0.5 --fault-kinds gap,missing-netflow,clock-base "
        "--out three-faults",
        "phasewatch validate faulty --out runs/faulty",
        "phasewatch run simulated --out runs/simulated",
    ],
}
# Page → file that its line reads → language of the block that shows the file.
FILES = {"own-channels": ("extra.toml", "toml"), "own-profile": ("log-wiper.toml", "toml")}

# Beginning of a line, or page and colon for a whole page → why it is not run here.
NOT_RUN = {
    "collect:": "tests/test_collect_walk.py runs the whole page",
    "own-vm:": "tests/lab/test_docs_driver.py runs the driver; the image is the reader's own",
    "proxmox:": "needs a Proxmox host",
    "container:": "needs a container engine; tests/package/test_containerfile.py checks its commands",
    "device:": "needs a second machine; the page says what was run in a network namespace",
    "adapt:": "needs hours of the reader's VMs; tests/cli/test_adapt.py adapts a model",
    "own-machines:": "needs recordings of the reader's VMs; tests/cli/test_labelling.py labels some",
    "scale-out:": "the command of record.md with more processes",
    "read-a-report:": "RUN stands for a folder of the reader's",
    "own-model:": "tests/test_readme.py trains the example in a fresh clone; it needs a trained run",
    "edge-box:": "needs a trained run and a second machine; tests/package tests the wheel",
    "phasewatch watch": "needs a running VM; tests/live runs it on real ones",
    "setpriv": "needs a libvirt domain; tests/live/test_real_libvirt.py runs one",
    "phasewatch baseline": "needs a running VM; tests/live runs it on real ones",
    "phasewatch dashboard": "serves until it is interrupted; tests/dashboard starts it",
    "curl": "needs a running dashboard; tests/dashboard posts to one",
    "phasewatch import": "needs recordings of another program; tests/importing makes some",
    "phasewatch alarms show": "the id is made up; tests/alarms/test_command.py has real ones",
    "phasewatch alarms ack": "the id is made up",
    "phasewatch alarms silence --end": "the id is made up",
    "phasewatch check-config /etc/phasewatch/watch.toml --connect": "connects to the reader's receivers",
    "phasewatch record --plan": "boots VMs for minutes to hours; tests/test_readme.py records the plan smoke",
    "phasewatch record --profile-file": "boots VMs; tests/lab/test_custom_workload.py records a profile",
    "phasewatch validate my-store": "needs recordings; every pipeline test validates a store",
    "phasewatch run my-": "needs recordings; tests/test_readme.py runs the pipeline",
    "phasewatch --install-completion": "changes the shell's files; tests/package/test_wheel.py completes a word",
    "python3 -m venv": "downloads 300 MB; tests/package/test_clean_environments.py installs each extra",
    "venv/bin/": "as above",
    "pip install": "as above",
    "apt-get": "changes the system",
    "sudo": "changes the system",
}


def list_lines(page: str) -> list[str]:
    """Return the command lines of a page's `sh` blocks, without comments; a script is no command."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", PAGES[page], flags=re.S | re.M)
    lines = [line.strip() for block in blocks if "#!/bin/sh" not in block for line in block.splitlines()]
    return [re.sub(r"\s+#\s.*", "", line) for line in lines if line]


def test_every_line_is_run_or_has_a_reason_not_to_be() -> None:
    open_lines = [
        (page, line)
        for page in PAGES
        for line in list_lines(page)
        if line not in [*RUN.get(page, ()), *RUN_LONG.get(page, ())]
        and not any(line.startswith(start) or f"{page}:" == start for start in NOT_RUN)
    ]

    assert open_lines == []


def test_every_line_to_run_stands_on_its_page() -> None:
    gone = [
        line for runs in (RUN, RUN_LONG) for page, lines in runs.items() for line in set(lines) - {*list_lines(page)}
    ]

    assert gone == []


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A folder and an empty home where a reader follows a page; ``/etc`` and ``/var/lib`` are folders below it."""

    folder: Path

    def run(self, line: str) -> None:
        """Run a line as a shell does, and expect success and no more files than it names."""
        for system in ("/etc/phasewatch", "/var/lib/phasewatch"):
            (self.folder / system.removeprefix("/")).mkdir(parents=True, exist_ok=True)
            line = line.replace(system, str(self.folder / system.removeprefix("/")))
        env = {
            "HOME": str(self.folder / "home"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TERM": "dumb",
        }
        done = subprocess.run(
            ["sh", "-c", line], cwd=self.folder, env=env, capture_output=True, text=True, timeout=3000
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def make_reader(page: str, folder: Path) -> Reader:
    (folder / "home").mkdir()
    if page in FILES:
        name, language = FILES[page]
        block = re.search(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.S | re.M)
        assert block is not None
        (folder / name).write_text(block[1])
    return Reader(folder=folder)


@pytest.mark.parametrize("page", RUN)
def test_the_lines_of_a_page_work_in_a_clean_place(page: str, tmp_path: Path) -> None:
    reader = make_reader(page, tmp_path)

    for line in RUN[page]:
        reader.run(line)


@pytest.mark.soak
@pytest.mark.parametrize("page", RUN_LONG)
def test_the_long_lines_of_a_page_work_in_a_clean_place(page: str, tmp_path: Path) -> None:
    reader = make_reader(page, tmp_path)

    for line in RUN_LONG[page]:
        reader.run(line)
