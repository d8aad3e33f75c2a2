"""The pages agree with the code: generated pages are fresh, links lead somewhere, commands and options exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import typer.main

from phasewatch import artifacts
from phasewatch.bundle.model import HostMetadata, Manifest
from phasewatch.cli import app
from phasewatch.inference import offline
from phasewatch.models.checkpoint import CHECKPOINT_FILE, CHECKPOINT_FORMAT, CheckpointHeader
from phasewatch.training import predictions

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SRC = ROOT / "src" / "phasewatch"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "corpus").rglob("*.md"), *SRC.rglob("*.md")])
GROUP = typer.main.get_command(app)
# Pages that show the commands of their own time.
DATED = {ROOT / "CHANGELOG.md", *(DOCS / "adr").glob("*.md"), *(DOCS / "results").glob("*.md")}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors_of(page: Path) -> set[str]:
    """The anchors that a site makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_generated_pages_are_fresh() -> None:
    command = [sys.executable, "-m", "tools.generate", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_every_link_leads_to_a_file_and_heading() -> None:
    broken = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            linked = page.parent / file if file else page
            if "://" in target:
                continue
            if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors_of(linked)):
                broken.append(f"{name_of(page)}: {target}")

    assert broken == []


def test_every_command_that_is_shown_exists_with_its_options() -> None:
    unknown = []
    for page in PAGES:
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
        for line in "".join(blocks if page not in DATED else ()).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "phasewatch" not in words:
                continue
            name, *rest = words[words.index("phasewatch") + 1 :]
            if name.startswith("-"):
                continue
            try:
                _, command, _ = GROUP.resolve_command(click.Context(GROUP), [name])  # type: ignore[attr-defined]
            except click.UsageError:
                unknown.append(f"{name_of(page)}: no command {name}")
                continue
            known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
            used = {word.partition("=")[0] for word in rest if word.startswith("--")}
            unknown += [f"{name_of(page)}: {name} has no {option}" for option in sorted(used - known)]

    assert unknown == []


def test_every_field_of_an_event_is_described() -> None:
    rows = re.findall(r"^\| `.*$", (DOCS / "reference" / "events.md").read_text(encoding="utf-8"), flags=re.M)

    assert len(rows) > 70
    assert [row for row in rows if row.endswith("|  |")] == []


def test_the_tour_names_existing_files_and_every_package() -> None:
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*(?:\.py|/))`", (DOCS / "tour.md").read_text(encoding="utf-8")))
    packages = {path.name for path in SRC.iterdir() if (path / "__init__.py").is_file()}

    assert {name for name in named if not (SRC / name).exists() and not (ROOT / name).exists()} == set()
    assert packages - {name.partition("/")[0] for name in named} == set()


def test_the_run_page_lists_every_file_and_column() -> None:
    page = (DOCS / "formats" / "run.md").read_text(encoding="utf-8")
    files = {value for name, value in vars(artifacts).items() if name.endswith("_FILE")}
    files -= {artifacts.BINS_FILE, artifacts.LEVELS_FILE, artifacts.BINS_INDEX_FILE, *artifacts.OLD_METRICS_FILES}
    files |= {*artifacts.FEATURE_FILES, *artifacts.BINS_PATHS}
    columns = {*predictions.build_predictions_schema().names, *offline.build_prediction_schema().names}

    assert {name for name in files | columns if f"`{name}`" not in page} == set()


def test_the_bundle_page_lists_every_field_of_the_manifest() -> None:
    page = (DOCS / "formats" / "bundle.md").read_text(encoding="utf-8")
    fields = {*Manifest.__struct_fields__, *HostMetadata.__struct_fields__}

    assert {field for field in fields if f"`{field}`" not in page} == set()


def test_the_checkpoint_page_lists_every_field_of_the_header() -> None:
    page = (DOCS / "formats" / "checkpoint.md").read_text(encoding="utf-8")
    names = {CHECKPOINT_FORMAT, CHECKPOINT_FILE, *CheckpointHeader.__struct_fields__}

    assert {name for name in names if f"`{name}`" not in page} == set()


def test_every_decision_record_is_in_the_index_with_one_layout() -> None:
    index = (DOCS / "adr" / "README.md").read_text(encoding="utf-8")
    records = sorted((DOCS / "adr").glob("0*.md"))
    wrong = []
    for path in records:
        text = path.read_text(encoding="utf-8")
        title = f"# {int(path.name[:4])}. "
        parts = ("\n\nStatus: ", "\n## Decision\n")
        if not text.startswith(title) or any(part not in text for part in parts) or f"({path.name})" not in index:
            wrong.append(path.name)

    assert wrong == []
