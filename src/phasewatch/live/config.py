"""The configuration file of a watch: what to watch, where its state is, and where its alarms go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from phasewatch.alarms.config import OutputConfig, find_output_faults
from phasewatch.atomic import read_regular
from phasewatch.errors import UsageError, describe_os_error
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE
from phasewatch.toml_config import TomlFault, find_toml_faults, find_toml_line, parse_toml

__all__ = ["WatchConfig", "WatchSection", "find_config_faults", "read_example", "read_watch_config"]

_MAX_CONFIG_BYTES = 1 << 20
_Globs = Annotated[
    tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=4096)], ...], msgspec.Meta(max_length=1024)
]
_Path = Annotated[str, msgspec.Meta(max_length=4096)]


class WatchSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Table ``[watch]``; a relative path is relative to the folder that the command runs in.

    Attributes:
        match: Globs of the names of the VMs to watch.
        exclude: Globs of the names of VMs that are left out.
        channels: Channel set of the model; empty chooses the largest that fits.
        model: Checkpoint, run or edge bundle; empty takes the bundled model.
        save: Store for the readings; empty saves nothing.
        state: Folder for what outlives the watch, such as the history of alarms; empty for none.
        smoothing: ``none`` or ``phase``.
    """

    match: _Globs = ()
    exclude: _Globs = ()
    channels: Annotated[str, msgspec.Meta(max_length=200)] = ""
    model: _Path = ""
    save: _Path = ""
    state: _Path = ""
    smoothing: str = SMOOTHING_NONE


class WatchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A configuration file.

    Attributes:
        watch: What to watch, and how.
        outputs: Where alarms and figures go.
    """

    watch: WatchSection = WatchSection()
    outputs: OutputConfig = OutputConfig()


def find_config_faults(path: Path) -> tuple[WatchConfig | None, tuple[str, ...]]:
    """Return the configuration, and one line for each fault; nothing is connected or written.

    Args:
        path: The file.

    Returns:
        The configuration, None if its keys are wrong; and the faults, each with file, line, key and remedy.
    """
    try:
        data = read_regular(path, _MAX_CONFIG_BYTES)
    except OSError as exc:
        return None, (describe_os_error(OSError(exc.errno, exc.strerror, str(path))),)
    if len(data) > _MAX_CONFIG_BYTES:
        return None, (f"{path}: longer than {_MAX_CONFIG_BYTES:,} bytes; it is not a configuration",)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None, (f"{path}: not UTF-8, as TOML must be",)
    where = str(path)
    if faults := find_toml_faults(text, WatchConfig):
        return None, tuple(fault.render(where) for fault in faults)
    config = parse_toml(text, WatchConfig, where=where)
    lines = text.splitlines()
    faults = tuple(
        TomlFault(key=key, words=words, line=find_toml_line(lines, tuple(key.split("."))))
        for key, words in _find_value_faults(config)
    )
    return config, tuple(fault.render(where) for fault in faults)


def read_example() -> str:
    """Return the example that is installed with the package: all tables and keys, most of them as comments."""
    return Path(__file__).with_name("example.toml").read_text(encoding="utf-8")


def read_watch_config(path: Path) -> WatchConfig:
    """Read a configuration.

    Raises:
        UsageError: If it has faults; the message has the first one.
    """
    config, faults = find_config_faults(path)
    if config is None or faults:
        more = f" (and {len(faults) - 1} more: phasewatch check-config {path})" if len(faults) > 1 else ""
        raise UsageError(faults[0] + more)
    return config


def _find_value_faults(config: WatchConfig) -> list[tuple[str, str]]:
    faults = [(f"outputs.{fault.key}", fault.words) for fault in find_output_faults(config.outputs)]
    watch = config.watch
    if watch.smoothing not in (SMOOTHING_NONE, SMOOTHING_PHASE):
        faults.append(("watch.smoothing", f"{watch.smoothing[:80]}: none or phase is needed"))
    if watch.model and not Path(watch.model).exists():
        faults.append(("watch.model", f"{watch.model}: no such file or folder"))
    if watch.state and Path(watch.state).exists() and not Path(watch.state).is_dir():
        faults.append(("watch.state", f"{watch.state}: it is not a folder"))
    return faults
