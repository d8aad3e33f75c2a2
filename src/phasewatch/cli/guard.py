"""What a user can understand and mend becomes one clear line on stderr and an exit code; broken code shows its traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

import typer

from phasewatch.cli import base
from phasewatch.errors import MachineError, PhasewatchError

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()
            return result
        except PhasewatchError as error:
            _fail(str(error), error.exit_code)
        except ModuleNotFoundError as error:
            from phasewatch.installation import extra_of

            extra = extra_of(error.name or "")
            if extra is None:
                raise  # broken code, not a package that was left out
            _fail(f"{error.name} is not installed: pip install 'phasewatch[{extra}]'", MachineError.exit_code)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader had enough: `phasewatch channels | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            _fail(
                f"{place}{error.strerror or error}; check the path, its permissions and the room on its disk",
                MachineError.exit_code,
            )

    return run


def _fail(words: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {base.plain(words)}\n")
    raise typer.Exit(code)
