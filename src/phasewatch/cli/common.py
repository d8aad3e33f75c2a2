"""What every command shares: results as text or JSON, option checks, custom channels and error handling."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import typer

from phasewatch.cli.streams import STANDARD_OUTPUT, drop_output, escape_for_terminal, flush_output
from phasewatch.errors import MachineError, PhasewatchError, UsageError, describe_os_error
from phasewatch.types import CHANNELS_FILE, CHANNELS_VARIABLE

if TYPE_CHECKING:
    from phasewatch.splits import SetAsideEpisode
    from phasewatch.training.train import FailedExperiment

__all__ = [
    "MAX_LISTED",
    "check_option_pair",
    "describe_failures",
    "describe_set_aside",
    "handle_errors",
    "parse_names",
    "print_result",
    "render_failures",
    "render_set_aside",
    "render_table",
    "run_command_line",
    "select_custom_channels",
]

MAX_LISTED = 20  # rows printed of a list that a file holds completely
_CUSTOM_CHANNELS_OPTION = "--custom-channels"
_INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as in shells
_SURROGATE_PATTERN = re.compile("[\ud800-\udfff]")  # how Python decodes arguments and file names that are not UTF-8

P = ParamSpec("P")
R = TypeVar("R")


def print_result(result: Mapping[str, Any], *, as_json: bool, lines: Sequence[str] = ()) -> None:
    """Print a command's result on standard output.

    Args:
        result: The JSON document's ``result``; NaN and infinite numbers become null.
        as_json: Whether to print the document instead of the lines.
        lines: The same as lines of text for people.
    """
    if as_json:
        typer.echo(json.dumps({"result": _without_nan(result)}, indent=1, sort_keys=True, default=str))
        return
    for line in lines:
        typer.echo(escape_for_terminal(line))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_names(text: str) -> tuple[str, ...]:
    """Parse names separated by commas; spaces around names and empty names are dropped."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_option_pair(option: str, partner: str, *, is_partner_missing: bool) -> None:
    """Refuse an option that has no effect without another one.

    Args:
        option: The option.
        partner: The option or argument that it needs.
        is_partner_missing: Whether `option` was given without `partner`.

    Raises:
        UsageError: If `is_partner_missing`.
    """
    if is_partner_missing:
        raise UsageError(f"{option} needs {partner}; add it, or leave out {option}")


def describe_set_aside(episodes: Sequence[SetAsideEpisode]) -> list[dict[str, Any]]:
    """Return the episodes that the splits leave out, as JSON objects."""
    return [
        {
            "host_id": e.host_id,
            "episode_id": e.episode_id,
            "profile": e.profile,
            "code": str(e.code),
            "recipes": list(e.recipes),
        }
        for e in episodes
    ]


def render_set_aside(episodes: Sequence[SetAsideEpisode]) -> list[str]:
    """Return a line for each of the first `MAX_LISTED` left-out episodes, then the meaning of their codes."""
    lines = [
        f"set aside: {e.host_id}/{e.episode_id} ({e.profile}) [{e.code}]"
        + (f" for {', '.join(e.recipes)}" if e.recipes else "")
        for e in episodes[:MAX_LISTED]
    ]
    if len(episodes) > MAX_LISTED:
        lines.append(f"… and {len(episodes) - MAX_LISTED:,} more; splits_v1.json lists all")
    return [*lines, *(f"  {code}: {code.about}" for code in dict.fromkeys(e.code for e in episodes))]


def describe_failures(failed: Sequence[FailedExperiment]) -> list[dict[str, Any]]:
    """Return the experiments that could not be trained, as JSON objects."""
    return [
        f.cell.keys() | {"seed": f.cell.seed, "why": f.failure.words, "exit_code": f.failure.exit_code} for f in failed
    ]


def render_failures(failed: Sequence[FailedExperiment]) -> list[str]:
    """Return a line for each of the first `MAX_LISTED` experiments that could not be trained."""
    more = [f"… and {len(failed) - MAX_LISTED:,} more; --json lists all"] if len(failed) > MAX_LISTED else []
    return [*(f"failed: {f}" for f in failed[:MAX_LISTED]), *more]


def render_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as aligned columns, two spaces apart; the last column is not padded."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def select_custom_channels(arguments: Sequence[str]) -> None:
    """Set the environment variable of the custom channels, before `phasewatch.channels` is imported.

    The file is that of ``--custom-channels``, or the one stored in a run folder that an argument names.

    Args:
        arguments: The words after the command's name.

    Raises:
        UsageError: If both exist and differ.
    """
    wanted, kept = "", ""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before == _CUSTOM_CHANNELS_OPTION:
            wanted = word
        elif word.startswith(f"{_CUSTOM_CHANNELS_OPTION}="):
            wanted = word.partition("=")[2]
        elif before != "--model" and _holds_channels(folder := word.removeprefix("--out=")):
            kept = str(Path(folder) / CHANNELS_FILE)
    if wanted and kept and Path(wanted).is_file() and Path(wanted).read_bytes() != Path(kept).read_bytes():
        raise UsageError(f"{wanted}: the run was made with other channels, those of {kept}; name another --out")
    if wanted or kept:
        os.environ[CHANNELS_VARIABLE] = str(Path(wanted or kept).resolve())


def _holds_channels(folder: str) -> bool:
    try:
        return bool(folder) and (Path(folder) / CHANNELS_FILE).is_file()
    except (OSError, ValueError):  # too long for a path, or a null byte
        return False


def handle_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: an expected error becomes one line on standard error and an exit code."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            _check_finite_options(kwargs)
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
                f"{error.object[:200]}: this name is not valid UTF-8, as Parquet, JSON and URLs need it; rename it",
                UsageError.exit_code,
            )
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED_EXIT_CODE) from None
        except BrokenPipeError:  # the reader had enough: `phasewatch channels | head`
            drop_output()
            raise typer.Exit(0) from None
        except OSError as error:
            if error.filename == STANDARD_OUTPUT:
                drop_output()
            _exit_with_error(_render_os_error(error), MachineError.exit_code)

    return run


def run_command_line(run: Callable[[], object]) -> None:
    """Run the command line; an output error outside any command (``--help > /dev/full``) is reported as within one."""
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
    """Reject NaN and infinite option values.

    Raises:
        UsageError: If an option is ``nan`` or ``inf``.
    """
    for name, value in options.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{name.replace('_', '-')} {number}: a finite number is needed")


def _exit_with_error(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {escape_for_terminal(message)}\n")
    raise typer.Exit(code)
