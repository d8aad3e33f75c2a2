"""The command line: thin commands that parse, call one public function and print. `main` is what `phasewatch` runs.

Nothing heavy is imported before a command is chosen, so `--help` answers at once.
"""

from __future__ import annotations

import os

import typer

from phasewatch.cli import common, dashboard, data, lab, live, run, transfer
from phasewatch.cli.common import handle_errors, run_command_line
from phasewatch.cli.streams import prepare_streams

__all__ = ["app", "main"]

app = typer.Typer(
    name="phasewatch", rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


@app.callback(epilog=common.EXIT_CODES_HELP)
def _phasewatch(
    version: bool = typer.Option(
        False, "--version", callback=common.show_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Tell which phase malware in a virtual machine is in, from outside, and how well that can be told."""


for room in (lab, transfer, data, run, live, dashboard, dashboard):
    room.register(app)
for command in app.registered_commands:
    if command.callback is not None:
        command.callback = handle_errors(command.callback)


def main() -> None:
    """Run the command line."""
    # Idle OpenMP threads that spin make a busy machine train three times slower; set before any of them starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prepare_streams()
    run_command_line(lambda: app(prog_name="phasewatch"))
