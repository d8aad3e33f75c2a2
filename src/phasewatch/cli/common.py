"""What every command shares: the JSON document, plain text for the terminal, progress on stderr, the bundled corpus."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import typer

from phasewatch._version import __version__
from phasewatch.artifacts import CHANNELS_FILE, RUN_FILES
from phasewatch.channels import CHANNELS_VARIABLE
from phasewatch.cli.streams import STANDARD_OUTPUT, drop_output, flush_output
from phasewatch.errors import MachineError, PhasewatchError, RunError, StoreError, UsageError, describe_os_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phasewatch.splits import SetAsideEpisode
    from phasewatch.training.train import FailedExperiment


EXIT_CODES_HELP = "Exit codes: 0 done, 1 findings, 2 usage, 3 bad or absent data, 4 does not fit, 5 the machine."
MAX_LISTED = 20  # of a list that goes on in a file
_PROGRESS_INTERVAL_S = 20.0  # without a terminal, a long stage says where it stands so often
CHANNELS_HELP = "A TOML file with channels of your own; the run remembers it."
_CORPUS_VARIABLE = "PHASEWATCH_CORPUS"
BUNDLED_CORPUS_DIR = Path("corpus") / "lab-v1"
BUNDLED_MODEL_FILE = "lab-v1.edge.zip"  # beside the corpus: the bundled model


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"phasewatch {__version__}")
        raise typer.Exit


def escape_for_terminal(text: str) -> str:
    """Make text from data harmless to a terminal: what does not print is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_result(result: dict[str, Any], *, as_json: bool, lines: Sequence[str] = ()) -> None:
    """Print a command's result: one JSON document, in which what is no number is null, or lines for people."""
    if as_json:
        typer.echo(json.dumps({"result": _without_nan(result)}, indent=1, sort_keys=True, default=str))
        return
    for line in lines:
        typer.echo(escape_for_terminal(line))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_names(words: str) -> tuple[str, ...]:
    """Read names separated by commas."""
    return tuple(word.strip() for word in words.split(",") if word.strip())


def check_option_pair(option: str, partner: str, *, alone: bool) -> None:
    """Refuse an option that would be ignored in silence.

    Raises:
        UsageError: If it stands alone.
    """
    from phasewatch.errors import UsageError

    if alone:
        raise UsageError(f"{option} goes with {partner}; add it, or leave out {option}")


def describe_set_aside(aside: Sequence[SetAsideEpisode]) -> list[dict[str, Any]]:
    """Return the episodes that splits do without, as JSON."""
    return [
        {
            "host_id": a.host_id, "episode_id": a.episode_id, "profile": a.profile, "code": str(a.code),
            "recipes": list(a.recipes),
        }
        for a in aside
    ]  # fmt: skip


def render_set_aside(aside: Sequence[SetAsideEpisode]) -> list[str]:
    """Return the first of them, a line each, and what their codes mean."""
    lines = [
        f"set aside: {a.host_id}/{a.episode_id} ({a.profile}) [{a.code}]{' for ' + ', '.join(a.recipes) if a.recipes else ''}"
        for a in aside[:MAX_LISTED]
    ]
    if len(aside) > MAX_LISTED:
        lines.append(f"… and {len(aside) - MAX_LISTED:,} more; splits_v1.json has each")
    return [*lines, *(f"  {code}: {code.about}" for code in dict.fromkeys(a.code for a in aside))]


def describe_failures(failed: Sequence[FailedExperiment]) -> list[dict[str, Any]]:
    """Return the cells that could not be trained, as JSON."""
    return [
        f.cell.keys() | {"seed": f.cell.seed, "why": f.failure.words, "exit_code": f.failure.exit_code} for f in failed
    ]


def render_failures(failed: Sequence[FailedExperiment]) -> list[str]:
    """Return a line for each cell that could not be trained."""
    more = [f"… and {len(failed) - MAX_LISTED:,} more; --json lists each"] if len(failed) > MAX_LISTED else []
    return [*(f"failed: {f}" for f in failed[:MAX_LISTED]), *more]


def render_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Set rows in columns, two spaces apart, the last column free."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def find_bundled_corpus() -> Path:
    """Find the recordings that come with phasewatch: where a variable says, beside the checkout's code, or below here.

    A wheel holds no recordings (they are larger than all of its code); the source distribution and the repository do.

    Raises:
        StoreError: If they are not there; names both ways to give them.
    """
    told = os.environ.get(_CORPUS_VARIABLE)
    if told and not Path(told).is_dir():
        raise StoreError(f"{told}: {_CORPUS_VARIABLE} names this folder, and it is not there; unset it or mend it")
    beside = Path(__file__).resolve().parents[3] / BUNDLED_CORPUS_DIR
    for corpus in (Path(told),) if told else (beside, BUNDLED_CORPUS_DIR):
        if corpus.is_dir():
            return corpus
    raise StoreError(
        f"{BUNDLED_CORPUS_DIR}: the bundled corpus is not here, because an installed phasewatch has none; name a store, work in a "
        f"checkout or an unpacked source distribution, or set {_CORPUS_VARIABLE} to its {BUNDLED_CORPUS_DIR}"
    )


def find_bundled_model() -> Path:
    """Find the edge bundle that stands beside the bundled recordings.

    Raises:
        StoreError: If the variable for the recordings names a folder that is not there.
        RunError: If there is none; names the option that gives another.
    """
    try:
        edge = find_bundled_corpus().parent / BUNDLED_MODEL_FILE
    except StoreError:
        if os.environ.get(_CORPUS_VARIABLE):
            raise
        edge = BUNDLED_CORPUS_DIR.parent / BUNDLED_MODEL_FILE
    if not edge.is_file():
        raise RunError(
            f"{edge}: the bundled model is not here, an installed phasewatch has none; name one with --model, "
            "`phasewatch export RUN --out X.zip` makes it"
        )
    return edge


def check_run_folder(run: Path) -> Path:
    """Return the run's folder if it is there and holds anything of a run; nothing is written to any other folder.

    Raises:
        RunError: If it is absent or no run.
    """
    if not run.is_dir():
        raise RunError(f"{run}: there is no such run; make one with `phasewatch run STORE --out {run}`")
    if not any((run / name).is_file() for name in RUN_FILES):
        from phasewatch.store.base import has_bundle

        what = "it holds bundles, so it is a store" if has_bundle(run) else "it holds no file of one"
        raise RunError(f"{run}: no run: {what}; make a run with `phasewatch run STORE --out RUN`")
    return run


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int, str], None]]:
    """Show stages on stderr: a bar where that is a terminal, else a line now and then and as each stage ends."""
    if quiet:
        yield lambda stage, done, total, words: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, highlight=False)
    columns = (
        TextColumn("{task.fields[stage]:<9}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}
        said_s: dict[str, float] = {}

        def tell(stage: str, done: int, total: int, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task("", total=total, stage=stage)
                said_s[stage] = time.monotonic()
            bar.update(tasks[stage], completed=done, total=total, description=escape_for_terminal(words)[:100])
            if not console.is_terminal and total > 1 and time.monotonic() - said_s[stage] > _PROGRESS_INTERVAL_S:
                said_s[stage] = time.monotonic()
                console.print(f"{stage:<9} {done:,}/{total:,}  {escape_for_terminal(words)}", soft_wrap=True)
            if done >= total and total == 1 and words:
                bar.console.print(f"{stage:<9} {escape_for_terminal(words)}", soft_wrap=True)

        yield tell


P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells count
_SURROGATE_PATTERN = re.compile(
    "[\ud800-\udfff]"
)  # what Python makes of such bytes in arguments, variables and file names


def handle_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            _check_finite_options(kwargs)
            _set_channels_variable(kwargs)
            result = function(*args, **kwargs)
            flush_output()
            return result
        except PhasewatchError as error:
            _exit_with_error(str(error), error.exit_code)
        except ModuleNotFoundError as error:
            from phasewatch.diagnostics import find_extra

            extra = find_extra(error.name or "")
            if extra is None:
                raise  # broken code, not a package that was left out
            _exit_with_error(
                f"{error.name} is not installed: pip install 'phasewatch[{extra}]'", MachineError.exit_code
            )
        except UnicodeEncodeError as error:
            if not _SURROGATE_PATTERN.search(error.object):
                raise  # broken code, not a name
            _exit_with_error(
                f"{error.object[:200]}: this name holds bytes that are not UTF-8, which Parquet, JSON and URLs cannot hold; "
                "rename it",
                UsageError.exit_code,
            )
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
        except BrokenPipeError:  # the reader had enough: `phasewatch channels | head`
            drop_output()
            raise typer.Exit(0) from None
        except OSError as error:
            if error.filename == STANDARD_OUTPUT:
                drop_output()
            _exit_with_error(_render_os_error(error), MachineError.exit_code)

    return run


def run_command_line(run: Callable[[], object]) -> None:
    """Run the command line, and treat an output that fails outside any command (`--help > /dev/full`) as within one."""
    try:
        try:
            run()
        finally:
            flush_output()
    except BrokenPipeError:
        drop_output()
        sys.exit(0)
    except OSError as error:
        drop_output()
        sys.stderr.write(f"error: {escape_for_terminal(_render_os_error(error))}\n")
        sys.exit(MachineError.exit_code)


def _is_current_folder_deleted() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _render_os_error(error: OSError) -> str:
    if error.filename == STANDARD_OUTPUT:
        return f"{STANDARD_OUTPUT}: {error.strerror}; what was printed is not complete"
    if isinstance(error, FileNotFoundError) and _is_current_folder_deleted():
        return "the current folder was deleted; change to another"
    return describe_os_error(error)


def _check_finite_options(options: Mapping[str, object]) -> None:
    """Refuse what reads as a number and is none that anything can wait for, compare with or count to.

    Raises:
        UsageError: If an option is ``nan`` or ``inf``.
    """
    for name, value in options.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{name.replace('_', '-')} {number}: a finite number is needed")


def _set_channels_variable(options: Mapping[str, object]) -> None:
    """Name the user's own channels before the tables are made: those of `--channels`, else those that the run was made with.

    Raises:
        UsageError: If both are there and differ.
    """
    told, kept = str(options.get("channels") or options.get("extra") or ""), ""
    for name in ("run", "out"):
        folder = options.get(name)
        if isinstance(folder, Path) and (folder / CHANNELS_FILE).is_file():
            kept = str(folder / CHANNELS_FILE)
    if told and kept and Path(told).is_file() and Path(told).read_bytes() != Path(kept).read_bytes():
        raise UsageError(f"{told}: the run was made with other channels, those of {kept}; name another --out")
    if told or kept:
        os.environ[CHANNELS_VARIABLE] = str(Path(told or kept).resolve())


def _exit_with_error(words: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {escape_for_terminal(words)}\n")
    raise typer.Exit(code)
