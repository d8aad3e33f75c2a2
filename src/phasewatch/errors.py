"""Every error a user can meet, with its exit code.

PhasewatchError
├── UsageError            2  the command line asks for something that cannot be
├── DataError             3  bad or absent data
│   ├── BundleError          one episode bundle cannot be read, or breaks a rule of its format
│   ├── StoreError           a store is absent, empty or not a store
│   │   ├── TakenError           other bytes already stand under an id
│   │   └── LostStoreError       the store's folder is gone, or is another one than was opened
│   ├── RunError             a file of a run is absent, half made or not what its reader expects
│   ├── ModelError           a model that a user brings failed in its own code
│   ├── EventError           an event for the dashboard is malformed, too large or of an unknown type
│   └── PlanError            a recording plan is not valid, or leaks the phase through elapsed time
├── MismatchError         4  two things were made for different schemas, versions or masks
│   └── SplitError           a recipe cannot be built from these episodes
└── MachineError          5  the machine lacks something, or something on it failed
    ├── MissingTool          a program, package or permission is not there
    ├── BusyError            another process holds the run or the store
    └── VmError              a virtual machine did not start, hung, died or never answered
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

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
    """End a message about a name that nobody knows: with the names that it resembles, else with all that there are.

    >>> name_the_nearest("gtb", ["gbt", "cnn"])
    'did you mean gbt?'
    >>> name_the_nearest("forest", ["gbt", "cnn"])
    'it is one of cnn, gbt'
    """
    from difflib import get_close_matches

    names = sorted(known)
    near = get_close_matches(name, names, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"it is one of {', '.join(names)}"


def describe_os_error(error: OSError) -> str:
    """Return one line for what the operating system refused: the place, its reason, the remedy.

    >>> describe_os_error(OSError(errno.ENOSPC, "No space left on device", "runs/a/report.html"))
    'runs/a/report.html: No space left on device; make room on its disk and run the command again'
    """
    places = [str(name) for name in (error.filename, error.filename2) if name]
    place = f"{' -> '.join(places)}: " if places else ""
    remedy = _REMEDIES.get(error.errno or 0, "check the path, its permissions and the room on its disk")
    return f"{place}{error.strerror or error}; {remedy}"


def escape_unprintable(text: str) -> str:
    r"""Return the text with every character that is not printable spelled out, so that no terminal or file obeys it.

    >>> spell_controls("a\x1b[31mb")
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
    """One episode bundle cannot be read, or breaks a rule of its format.

    Attributes:
        code: The finding's code, such as ``member-sha256``; `phasewatch.validate.checks` lists them.
        place: File, member and line, as far as they are known.
        words: What was found, and what was expected.
    """

    def __init__(self, *, code: str, words: str, file: str = "", member: str = "", line: int = 0) -> None:
        # A stranger's file may hold anything in its keys: what they are quoted in goes to logs, indexes and answers.
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
    """Other bytes already stand under an id; bundles are written once."""


class StoreReplacedError(StoreError):
    """The store's folder is gone, or is another one than was opened: its disk may be unmounted."""


class RunError(DataError):
    """A file of a run is absent, half made or not what its reader expects."""


class ModelError(DataError):
    """A model that a user brings failed in its own code, or gave an answer that is none."""


class EventError(DataError):
    """An event for the dashboard is malformed, too large or of an unknown type."""


class PlanError(DataError):
    """A recording plan is not valid, or leaks the phase through elapsed time."""


class MismatchError(PhasewatchError):
    """Two things were made for different schemas, versions or masks."""

    exit_code = 4


class SplitError(MismatchError):
    """A recipe cannot be built from these episodes; the message says what is missing."""


class MachineError(PhasewatchError):
    """The machine lacks something, or something on it failed."""

    exit_code = 5


class MissingToolError(MachineError):
    """A program, package or permission is not there; the message says how to get it."""


class BusyError(MachineError):
    """Another process holds the run or the store."""


class VmError(MachineError):
    """A virtual machine did not start, hung, died or never answered."""
