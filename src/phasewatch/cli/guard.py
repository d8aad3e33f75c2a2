"""What a user can understand and mend becomes one clear line on stderr and an exit code; broken code shows its traceback."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

import typer

from phasewatch.cli import base
from phasewatch.cli.streams import STANDARD_OUTPUT, drop_output, flush_output
from phasewatch.errors import MachineError, PhasewatchError, UsageError, describe_os_error
from phasewatch.extras import CHANNELS_FILE, VARIABLE

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130  # 128 + SIGINT, as shells count
_SURROGATE = re.compile("[\ud800-\udfff]")  # what Python makes of such bytes in arguments, variables and file names


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            check_numbers(kwargs)
            choose_channels(kwargs)
            result = function(*args, **kwargs)
            flush_output()
            return result
        except PhasewatchError as error:
            _fail(str(error), error.exit_code)
        except ModuleNotFoundError as error:
            from phasewatch.installation import extra_of

            extra = extra_of(error.name or "")
            if extra is None:
                raise  # broken code, not a package that was left out
            _fail(f"{error.name} is not installed: pip install 'phasewatch[{extra}]'", MachineError.exit_code)
        except UnicodeEncodeError as error:
            if not _SURROGATE.search(error.object):
                raise  # broken code, not a name
            _fail(
                f"{error.object[:200]}: this name holds bytes that are not UTF-8, which Parquet, JSON and URLs cannot hold; "
                "rename it",
                UsageError.exit_code,
            )
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader had enough: `phasewatch channels | head`
            drop_output()
            raise typer.Exit(0) from None
        except OSError as error:
            if error.filename == STANDARD_OUTPUT:
                drop_output()
            _fail(_words_of(error), MachineError.exit_code)

    return run


def guard_output(run: Callable[[], object]) -> None:
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
        sys.stderr.write(f"error: {base.plain(_words_of(error))}\n")
        sys.exit(MachineError.exit_code)


def _is_folder_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _words_of(error: OSError) -> str:
    if error.filename == STANDARD_OUTPUT:
        return f"{STANDARD_OUTPUT}: {error.strerror}; what was printed is not complete"
    if isinstance(error, FileNotFoundError) and _is_folder_gone():
        return "the current folder was deleted; change to another"
    return describe_os_error(error)


def check_numbers(options: Mapping[str, object]) -> None:
    """Refuse what reads as a number and is none that anything can wait for, compare with or count to.

    Raises:
        UsageError: If an option is ``nan`` or ``inf``.
    """
    for name, value in options.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{name.replace('_', '-')} {number}: a finite number is needed")


def choose_channels(options: Mapping[str, object]) -> None:
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
        os.environ[VARIABLE] = str(Path(told or kept).resolve())


def _fail(words: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {base.plain(words)}\n")
    raise typer.Exit(code)
