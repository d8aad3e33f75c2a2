"""The command line: thin commands that parse options, call one public function and print its result.

`main` is the program `phasewatch`. A command's module is imported when the command is used, so ``--help`` is fast.
"""

from __future__ import annotations

import logging
import os

import typer

from phasewatch._version import __version__
from phasewatch.cli.common import run_command_line
from phasewatch.cli.groups import LazyGroup
from phasewatch.cli.logs import configure_logging
from phasewatch.cli.streams import prepare_streams

__all__ = ["app", "main"]

_EXIT_CODES = """\b
Exit codes:
  0  success
  1  findings, refused bundles or a failed check
  2  wrong command, option or value
  3  missing or invalid data
  4  the data, the model or the VM do not fit together
  5  the machine: missing packages or programs, full disk, busy folder
  130  interrupted (Ctrl-C)

`phasewatch COMMAND --help` shows the options of a command. -v and -q are also accepted after the command."""

app = typer.Typer(
    name="phasewatch",
    cls=LazyGroup,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phasewatch {__version__}")
        raise typer.Exit


@app.callback(epilog=_EXIT_CODES)
def _phasewatch(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Print debug messages, with the logger's name."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print no progress and no messages below warnings."),
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Detect malware phases in a virtual machine from outside, and measure how well it works.

    Start with `phasewatch doctor` or `phasewatch demo`.
    """
    configure_logging(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def main() -> None:
    """Run the command line."""
    # Idle OpenMP threads that spin make training on a busy machine three times slower; set before any of them starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prepare_streams()
    run_command_line(lambda: app(prog_name="phasewatch"))
