"""The errors that a user can meet, each with its exit code.

PhasewatchError
├── UsageError            2  an option or argument is invalid
├── DataError             3  data is absent or invalid
│   ├── BundleError          one episode bundle cannot be read, or breaks a rule of its format
│   ├── StoreError           a store is absent, empty or not a store
│   │   ├── IdConflictError      the store holds other bytes under the same id
│   │   └── StoreReplacedError   the store's folder is gone, or is not the one that was opened
│   ├── RunError             a file of a run is absent, incomplete or malformed
│   ├── ModelError           a user's model failed in its own code or returned an invalid result
│   ├── EventError           an event for the dashboard is malformed, too large or of an unknown type
│   ├── AlarmStoreError      the history of alarms is damaged, or is not one
│   └── PlanError            a recording plan is not valid, or leaks the phase through elapsed time
├── MismatchError         4  two files were made for different schemas, versions or channel sets
│   └── SplitError           a split recipe cannot be built from these episodes
└── MachineError          5  the machine lacks something, or something on it failed
    ├── MissingToolError     a program, package or permission is not there
    ├── CgroupError          a CPU quota cannot be set or read
    ├── BusyError            another process holds the run or the store
    └── VmError              a virtual machine did not start, hung, died or did not answer
        ├── BootError            it did not boot in any attempt
        └── WorkloadError        a workload in it failed, so that its label would have no act
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

__all__ = [
    "AlarmStoreError",
    "BootError",
    "BundleError",
    "BusyError",
    "CgroupError",
    "DataError",
    "EventError",
    "IdConflictError",
    "MachineError",
    "MismatchError",
    "MissingToolError",
    "ModelError",
    "PhasewatchError",
    "PlanError",
    "RunError",
    "SplitError",
    "StoreError",
    "StoreReplacedError",
    "UsageError",
    "VmError",
    "WorkloadError",
    "describe_os_error",
    "escape_unprintable",
    "suggest_names",
]

_REMEDIES = {
    errno.ENOSPC: "make room on its disk and run the command again",
    errno.EDQUOT: "make room within the disk quota and run the command again",
    errno.EROFS: "name a place that can be written, for example with --out",
    errno.EACCES: "check who owns it and who may read or write it",
    errno.EPERM: "check who owns it and who may read or write it",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk; the kernel's log (dmesg) may say more",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs: the whole machine has too many files open",
    errno.ENOMEM: "free some memory and run the command again",
}


def suggest_names(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: similar known names, or else all known names.

    >>> suggest_names("gtb", ["gbt", "cnn"])
    'did you mean gbt?'
    >>> suggest_names("forest", ["gbt", "cnn"])
    'it is one of cnn, gbt'
    """
    from difflib import get_close_matches

    names = sorted(known)
    near = get_close_matches(name, names, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"it is one of {', '.join(names)}"


def describe_os_error(error: OSError) -> str:
    """Return one line about an operating-system error: the path, the reason and a remedy.

    >>> describe_os_error(OSError(errno.ENOSPC, "No space left on device", "runs/a/report.html"))
    'runs/a/report.html: No space left on device; make room on its disk and run the command again'
    """
    places = [str(name) for name in (error.filename, error.filename2) if name]
    place = f"{' -> '.join(places)}: " if places else ""
    remedy = _REMEDIES.get(error.errno or 0, "check the path, its permissions and the room on its disk")
    return f"{place}{error.strerror or error}; {remedy}"


def escape_unprintable(text: str) -> str:
    r"""Return a text with unprintable characters escaped, so that no terminal interprets them.

    >>> escape_unprintable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class PhasewatchError(Exception):
    """Something a user can understand and mend went wrong."""

    exit_code = 1


class UsageError(PhasewatchError):
    """The command line asks for something that cannot be."""

    exit_code = 2


class DataError(PhasewatchError):
    """Data is absent or bad."""

    exit_code = 3


class BundleError(DataError):
    """An episode bundle cannot be read or breaks a rule of its format.

    Attributes:
        code: The code of the finding, such as ``member-sha256``; `phasewatch.validate.checks` lists them.
        place: File, member and line, as far as known.
        words: What was found and what was expected.
    """

    def __init__(self, *, code: str, words: str, file: str = "", member: str = "", line: int = 0) -> None:
        # Keys of an untrusted file are quoted in messages, which go to logs, indexes and HTTP responses.
        self.code, self.words, self.file, self.member, self.line = code, escape_unprintable(words), file, member, line
        self.place = escape_unprintable(":".join(part for part in (file, member, str(line) if line else "") if part))
        super().__init__(f"{self.place}: {code}: {self.words}" if self.place else f"{code}: {self.words}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_bundle_error, (self.code, self.words, self.file, self.member, self.line)


def _rebuild_bundle_error(code: str, words: str, file: str, member: str, line: int) -> BundleError:
    return BundleError(code=code, words=words, file=file, member=member, line=line)


class StoreError(DataError):
    """A store is absent, empty or not a store."""


class IdConflictError(StoreError):
    """The store holds other bytes under the same id; bundles are never replaced."""


class StoreReplacedError(StoreError):
    """The store's folder is gone or is not the one that was opened; its disk may be unmounted."""


class RunError(DataError):
    """A file of a run is absent, incomplete or malformed."""


class ModelError(DataError):
    """A user's model failed in its own code or returned an invalid result."""


class EventError(DataError):
    """An event for the dashboard is malformed, too large or of an unknown type."""


class AlarmStoreError(DataError):
    """The history of alarms is damaged, or the file is not one."""


class PlanError(DataError):
    """A recording plan is not valid, or leaks the phase through elapsed time."""


class MismatchError(PhasewatchError):
    """Two files were made for different schemas, versions or channel sets."""

    exit_code = 4


class SplitError(MismatchError):
    """A split recipe cannot be built from these episodes; the message names what is missing."""


class MachineError(PhasewatchError):
    """The machine lacks a program, a permission or a resource, or something on it failed."""

    exit_code = 5


class MissingToolError(MachineError):
    """A program, package or permission is missing; the message says how to get it."""


class CgroupError(MachineError):
    """A CPU quota cannot be set or read; the message says what is missing."""


class BusyError(MachineError):
    """Another process holds the run or the store."""


class VmError(MachineError):
    """A virtual machine did not start, hung, died or did not answer."""


class BootError(VmError):
    """A virtual machine did not boot in any attempt."""


class WorkloadError(VmError):
    """A workload in a virtual machine failed, so that its label would have no act; its episode is recorded again."""
