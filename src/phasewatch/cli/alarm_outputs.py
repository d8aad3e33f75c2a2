"""The outputs of a watch on the command line: options and configuration file, and the outputs around the watch.

Both the watch of one VM and that of many use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from phasewatch.alarms.config import CommandConfig, MetricsConfig, OutputConfig, SyslogConfig, WebhookConfig
from phasewatch.alarms.delivery import OutputCounters
from phasewatch.alarms.outputs import AlarmOutputs, open_outputs
from phasewatch.events.schema import EventEnvelope
from phasewatch.live.config import WatchConfig, read_watch_config
from phasewatch.live.watcher import WatchCallbacks

__all__ = ["OutputOptions", "attach_outputs", "describe_counters", "merge_options", "read_configuration", "run_outputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Options of the command line; each wins over the table of the same name in the file.

    Attributes:
        config: Configuration file.
        state: State folder.
        webhook: URL.
        on_alarm: Program and arguments.
        metrics: Port; 0 for none.
        syslog: Address.
    """

    config: Path | None = None
    state: Path | None = None
    webhook: str = ""
    on_alarm: str = ""
    metrics: int = 0
    syslog: str = ""


def read_configuration(options: OutputOptions) -> WatchConfig:
    """Read the configuration file, and put the options of the command line in it.

    Raises:
        UsageError: If the file has faults.
    """
    config = read_watch_config(options.config) if options.config else WatchConfig()
    outputs = merge_options(
        config.outputs,
        webhook=options.webhook,
        on_alarm=options.on_alarm,
        metrics=options.metrics,
        syslog=options.syslog,
    )
    watch = msgspec.structs.replace(config.watch, state=str(options.state)) if options.state else config.watch
    return msgspec.structs.replace(config, outputs=outputs, watch=watch)


def merge_options(
    config: OutputConfig, *, webhook: str = "", on_alarm: str = "", metrics: int = 0, syslog: str = ""
) -> OutputConfig:
    """Return the settings with those of the command line; an option replaces the table of the file."""
    tables: dict[str, object] = {}
    if webhook:
        tables["webhook"] = WebhookConfig(url=webhook)
    if on_alarm:
        tables["command"] = CommandConfig(command=on_alarm)
    if metrics:
        tables["metrics"] = MetricsConfig(port=metrics)
    if syslog:
        tables["syslog"] = SyslogConfig(address=syslog)
    return msgspec.structs.replace(config, **tables)


@contextmanager
def run_outputs(config: WatchConfig, *, write_line: Callable[[str], None]) -> Iterator[AlarmOutputs | None]:
    """Open the outputs and close them at the end of the block; None if none is asked for.

    Args:
        config: The configuration.
        write_line: Prints a line on standard output without blocking.

    Raises:
        UsageError: If a setting cannot be used.
        MachineError: If the port of the metrics is in use.
    """
    if config.outputs == OutputConfig() and not config.watch.state:
        yield None
        return
    state = Path(config.watch.state) if config.watch.state else None
    with open_outputs(config.outputs, state, write_line=write_line) as outputs:
        yield outputs


def attach_outputs(callbacks: WatchCallbacks, outputs: AlarmOutputs | None) -> WatchCallbacks:
    """Return callbacks that also pass every event to the outputs."""
    if outputs is None:
        return callbacks

    def pass_on(event: EventEnvelope, is_alarm_change: bool) -> None:
        outputs.on_event(event, is_alarm_change)  # first: printing may end the watch
        callbacks.on_event(event, is_alarm_change)

    return replace(callbacks, on_event=pass_on, count_backlog=outputs.count_backlog)


def describe_counters(counters: Sequence[OutputCounters]) -> list[str]:
    """Return one line about the outputs that lost something; none if nothing was lost."""
    lost = [f"{each.name} {each.lost}" for each in counters if each.lost]
    return [f"alarms not delivered: {', '.join(lost)}"] if lost else []
