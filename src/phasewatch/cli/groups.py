"""The list of commands and the group that loads a command's module only when the command is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from keyword import iskeyword
from typing import Any

import typer.main
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.models import CommandInfo

from phasewatch.cli.common import handle_errors, select_custom_channels
from phasewatch.cli.logs import configure_logging

__all__ = ["COMMANDS", "CommandSpec", "LazyGroup", "load_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSpec:
    """Where a command is defined.

    Attributes:
        module: Module of `phasewatch.cli` with a function of the command's name, with underscores for hyphens.
        summary: One sentence of at most 64 characters; the first line of the function's docstring.
    """

    module: str
    summary: str


def _spec(module: str, summary: str) -> CommandSpec:
    return CommandSpec(module=module, summary=summary)


# In the order of the data.
SECTIONS: Mapping[str, Mapping[str, CommandSpec]] = {
    "Record": {
        "record": _spec("record", "Record episodes in real VMs and write one bundle per episode."),
        "image": _spec("record", "Build a guest image now, so that recording needs no network."),
        "import": _spec("importing", "Import telemetry that other programs recorded."),
        "label": _spec("labelling", "Label saved bundles as clean or as another phase."),
        "simulate": _spec("record", "Generate a store of simulated episodes and a ground-truth file."),
    },
    "Learn": {
        "demo": _spec("run", "Run the pipeline on the bundled recordings."),
        "run": _spec("run", "Run the whole pipeline, from validation to the report."),
        "validate": _spec("data", "Check every bundle of a store."),
        "features": _spec("data", "Compute the feature tables of a validated run."),
        "split": _spec("data", "Build the training, validation and test folds of a run."),
        "train": _spec("run", "Train the experiments of a run."),
        "evaluate": _spec("run", "Compute metrics with confidence intervals and baselines."),
        "audit": _spec("run", "Check a run: rebuild, retrain, rescore, look for shortcuts."),
        "report": _spec("run", "Write the report of a run as HTML, Markdown or JSON."),
        "compare": _spec("compare", "Compare two runs on the test windows that both have."),
    },
    "Watch": {
        "export": _spec("predict", "Export a trained model as an edge bundle or an ONNX file."),
        "adapt": _spec("adapting", "Adapt a model to the known-clean hours of your own VMs."),
        "predict": _spec("predict", "Predict phases and alarms for recorded episodes."),
        "baseline": _spec("live", "Measure the normal telemetry of a VM while it is clean."),
        "watch": _spec("live", "Watch running VMs and print their phases and alarms."),
        "alarms": _spec("alarms", "List the alarms of a watch, acknowledge one, or silence some."),
        "check-config": _spec("alarms", "Check a configuration, and show what would be sent where."),
        "dashboard": _spec("dashboard", "Serve the dashboard for a run or for running VMs."),
        "publish": _spec("dashboard", "Send a run's events to a dashboard, a file or stdout."),
    },
    "Transfer": {
        "ship": _spec("transfer", "Send recorded bundles to a receiver."),
        "receive": _spec("transfer", "Receive bundles from many hosts over HTTP."),
    },
    "Inspect": {
        "doctor": _spec("doctor", "Check the installation and this machine."),
        "channels": _spec("inspection", "List the telemetry channels."),
        "inspect": _spec("inspection", "Show one bundle: labels, rows, findings and sparklines."),
        "explain": _spec("inspection", "Show which channels one prediction depends on."),
    },
}
COMMANDS: Mapping[str, CommandSpec] = {name: spec for section in SECTIONS.values() for name, spec in section.items()}


class LazyGroup(TyperGroup):
    """A group whose commands are known by name and summary, and loaded when one of them is run or completed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        stubs: MutableMapping[str, Any] = self.commands
        for name, spec in COMMANDS.items():
            stubs[name] = TyperCommand(name, help=spec.summary, short_help=spec.summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Load the command that the arguments name.

        Custom channels are selected first: the tables of `phasewatch.channels` are built when it is imported.
        """
        name, command, rest = super().resolve_command(ctx, args)
        if name is None or name not in COMMANDS:
            return name, command, rest
        if not ctx.resilient_parsing:  # completion changes nothing
            handle_errors(select_custom_channels)(rest)
        return name, handle_errors(load_command)(name), rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands by section, in the order of the data."""
        for section, specs in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(f"{name:<12}", spec.summary) for name, spec in specs.items()])


def load_command(name: str) -> Any:
    """Import a command's module and build its parser, with ``-v`` and ``-q`` as after the program's name.

    Raises:
        ModuleNotFoundError: If a package that the command needs is not installed.
    """
    # `import` is a keyword of Python, so its function has an underscore at the end.
    attribute = f"{name}_" if iskeyword(name) else name.replace("-", "_")
    function = getattr(import_module(f"phasewatch.cli.{COMMANDS[name].module}"), attribute)
    info = CommandInfo(
        name=name,
        callback=handle_errors(function),
        short_help=COMMANDS[name].summary,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    command = typer.main.get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode=None)
    for flags, level in ((["-v", "--verbose"], logging.DEBUG), (["-q", "--quiet"], logging.WARNING)):
        command.params.append(_build_verbosity_option(flags, level))
    return command


def _build_verbosity_option(flags: list[str], level: int) -> TyperOption:
    def configure(ctx: Any, param: Any, value: bool) -> bool:
        if value:
            configure_logging(level)
        return value

    return TyperOption(
        param_decls=flags, is_flag=True, default=False, callback=configure, expose_value=False, hidden=True, type=bool
    )
