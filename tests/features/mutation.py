"""Small changes to the syntax tree of the arithmetic, loaded as modules of their own and run."""

from __future__ import annotations

import ast
import hashlib
import importlib
import random
import re
import resource
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phasewatch.bundle.model import Episode

ARITHMETIC = (
    "phasewatch.binning.align",
    "phasewatch.binning.clocks",
    "phasewatch.features.stats",
)
_LOADED = (*ARITHMETIC, "phasewatch.features.fingerprint")

_NUMBER = re.compile("[A-Z][A-Z_]*_(NS|BINS|S|FINITE)")  # the constants that count something
_COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_CALLED = {
    "minimum": "maximum",
    "maximum": "minimum",
    "floor": "ceil",
    "sqrt": "square",
    "any": "all",
    "all": "any",
    "float64": "float32",
    "isfinite": "isnan",
    "zeros": "ones",
    "min": "max",
    "max": "min",
}


def source_of(name: str) -> str:
    """Give the text of a module of the arithmetic."""
    return Path(str(importlib.import_module(name).__file__)).read_text()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change: in which module, what, and the module's text with it."""

    module: str
    words: str
    text: str


def every_mutant() -> list[Mutant]:
    """Make each change that the operators above know, wherever it can be made."""
    return [mutant for name in ARITHMETIC for mutant in _mutants_of(name, source_of(name))]


def _mutants_of(name: str, text: str) -> Iterator[Mutant]:
    sites = list(_sites(ast.parse(text)))
    for number in range(len(sites)):
        tree = ast.parse(text)  # a fresh tree: a mutant has one change
        node, words, change = list(_sites(tree))[number]
        change()
        where = f"{name.rpartition('.')[2]}:{getattr(node, 'lineno', 0)}"
        yield Mutant(module=name, words=f"{where} {words}", text=ast.unparse(tree))


def _sites(tree: ast.Module) -> Iterator[tuple[ast.AST, str, Callable[[], None]]]:
    """Give every place that can be changed, what the change is, and the hand that makes it."""
    for node in _bodies(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARED:
            yield node, "another comparison", _set_op(node.ops, 0, _COMPARED[type(node.ops[0])]())
        elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _COMPUTED:
            yield node, "another operator", _set(node, "op", _COMPUTED[type(node.op)]())
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield node, "another sign", _set(node, "op", ast.UAdd())
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, f"{node.value} + 1", _set(node, "value", node.value + 1)
        elif isinstance(node, ast.Constant) and node.value in ("left", "right"):
            yield node, "the other side", _set(node, "value", "left" if node.value == "right" else "right")
        elif isinstance(node, ast.Attribute) and node.attr in _CALLED:
            yield node, f"{node.attr} → {_CALLED[node.attr]}", _set(node, "attr", _CALLED[node.attr])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and _NUMBER.fullmatch(node.id):
            yield node, f"{node.id} off by one", _set(node, "id", f"({node.id} + 1)")


def _bodies(tree: ast.Module) -> Iterator[ast.AST]:
    """Walk what runs: no docstring, no annotation, no import."""
    for node in ast.walk(tree):
        for part in ("annotation", "returns"):
            if getattr(node, part, None) is not None:
                setattr(node, part, ast.Constant(value=None) if part == "annotation" else None)
    yield from ast.walk(tree)


def _set(node: ast.AST, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(node, name, value)


def _set_op(ops: list[ast.cmpop], place: int, op: ast.cmpop) -> Callable[[], None]:
    def change() -> None:
        ops[place] = op

    return change


def named_mutants() -> list[Mutant]:
    """Make the changes that people make in earnest: the ones to be feared most."""
    table = (
        ("stats", "np.sqrt(_sum_rows(x) / WINDOW_BINS", "np.sqrt(_sum_rows(x) / (WINDOW_BINS - 1)", "another ddof"),
        (
            "stats",
            "_sum_first_axis(deviation * deviation) / m",
            "_sum_first_axis(deviation * deviation) / (m - 1)",
            "another ddof in gaps",
        ),
        ("stats", "h = (np.maximum(m, 2) - 1) * q", "h = np.maximum(m, 2) * q - 0.5", "Hazen's percentile"),
        ("stats", "low + (h - rank) * (high - low)", "low", "the lower percentile"),
        ("stats", "(WINDOW_BINS - 1) * 0.95 - 18", "(WINDOW_BINS - 1) * 0.94 - 17", "p94 for p95"),
        ("stats", "BIN_S = 0.5", "BIN_S = 1.0", "slope per bin"),
        (
            "stats",
            "ticks = BIN_S * np.arange(WINDOW_BINS)",
            "ticks = -BIN_S * np.arange(WINDOW_BINS)",
            "sign of the slope",
        ),
        ("stats", "_percentile(ordered, m, 0.5)", "_percentile(ordered, m, 0.4)", "p40 for the median"),
        ("stats", "np.where(finite, x, np.inf)", "np.where(finite, x, 0.0)", "gaps filled with zero"),
        ("stats", "out[m < MIN_FINITE_BINS] = np.nan", "out[m < 1] = np.nan", "stats of almost nothing"),
        ("stats", "axis=0)[-1]\n    return total", "axis=0)[-1] * (1 + 2e-7)\n    return total", "a last bit"),
        (
            "align",
            'np.searchsorted(readings.t_wall_ns, edges, side="right") - 1',
            "np.searchsorted(readings.t_wall_ns, edges) - 1",
            "a reading on the edge",
        ),
        ("align", "> STALE_NS", "> 2 * STALE_NS", "stale twice as long"),
        (
            "align",
            "readings.t_mono_ns[last] - readings.t_mono_ns[start]",
            "readings.t_wall_ns[last] - readings.t_wall_ns[start]",
            "wall time for a rate",
        ),
        ("align", "np.lexsort((seq, wall))", "np.lexsort((wall, seq))", "another order"),
        (
            "align",
            "edges = episode.t0_ns + BIN_NS",
            "edges = episode.t0_ns + BIN_NS // 2 + BIN_NS",
            "bins half a bin later",
        ),
        (
            "align",
            "np.subtract(values.take(last, axis=1), values.take(first, axis=1)).astype(np.float64)",
            "(values.take(last, axis=1).astype(np.float64) - values.take(first, axis=1).astype(np.float64))",
            "floats before the difference",
        ),
        ("align", "change *= scales", "change *= 1000 * scales", "another unit"),
        ("align", "top[still] = 0.0", "top[still] = np.nan", "nothing over nothing"),
        ("align", "broken = (delta <= 0) | (delta > STALE_NS)", "broken = delta <= 0", "rates across gaps"),
        ("align", "stored += np.float32(0.0)", "pass", "a negative zero"),
        ("clocks", "(u1 - u0) // (c1 - c0)", "(u1 - u0 + 1) // (c1 - c0)", "another drift"),
    )
    made = []
    for stem, old, new, words in table:
        name = next(n for n in ARITHMETIC if n.endswith(f".{stem}"))
        if old in (text := source_of(name)):
            made.append(Mutant(module=name, words=words, text=text.replace(old, new, 1)))
        else:
            raise LookupError(f"{stem} has no {old!r}; write the mutant {words!r} anew")
    return made


def cosmetic_edits(*, count: int, seed: int) -> list[Mutant]:
    """Change how the code looks and not what it does: comments, names of locals, layout, docstrings."""
    rng = random.Random(seed)
    ways: Sequence[tuple[str, Callable[[str, random.Random], str]]] = (
        ("comments", _with_comments),
        ("names of locals", _with_other_names),
        ("layout", lambda t, r: ast.unparse(ast.parse(t))),
        ("docstrings", _without_docstrings),
        ("blank lines", lambda t, r: t.replace("\n\n\n", "\n\n\n\n\n")),
    )
    made = []
    for number in range(count):
        words, way = ways[number % len(ways)]
        name = ARITHMETIC[(number // len(ways)) % len(ARITHMETIC)]
        made.append(Mutant(module=name, words=f"{name}: {words}", text=way(source_of(name), rng)))
    return made


def _with_comments(text: str, rng: random.Random) -> str:
    lines = ast.unparse(ast.parse(text)).splitlines()
    return "\n".join(f"{line}  # {rng.random()}" if line.strip() and '"' not in line else line for line in lines)


def _without_docstrings(text: str, rng: random.Random) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node):
            node.body[0] = ast.Expr(value=ast.Constant(value=f"words {rng.random()}"))
    return ast.unparse(tree)


def _with_other_names(text: str, rng: random.Random) -> str:
    """Rename what a function assigns; its parameters stay, for callers may name them."""
    tree = ast.parse(text)
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        mine = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        mine -= {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in mine:
                node.id = f"{node.id}_renamed"
    return ast.unparse(tree)


@contextmanager
def loaded(changed: Mapping[str, str]) -> Iterator[dict[str, types.ModuleType]]:
    """Load the arithmetic anew, some modules with another text; afterwards the real ones stand where they stood."""
    before = {name: importlib.import_module(name) for name in _LOADED}
    try:
        fresh: dict[str, types.ModuleType] = {}
        for name in _LOADED:
            module = types.ModuleType(name)
            module.__file__ = before[name].__file__
            _put(name, module)
            fresh[name] = module
            exec(compile(changed.get(name, source_of(name)), f"<{name}>", "exec"), module.__dict__)
        yield fresh
    finally:
        for name, module in before.items():
            _put(name, module)


def _put(name: str, module: types.ModuleType) -> None:
    room, _, stem = name.rpartition(".")
    sys.modules[name] = module
    setattr(sys.modules[room], stem, module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What some build of the arithmetic does: its fingerprint, and what it makes of each of some episodes."""

    fingerprint: str
    values: tuple[str, ...]


class TooLong(Exception):
    """A mutant computes without end."""


@contextmanager
def bounded(cpu_s: float = 10.0, more_bytes: int = 1 << 30) -> Iterator[None]:
    """Stop a mutant that would run or swell for ever: that, too, is something it does."""

    def stop(*_: object) -> None:
        raise TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def behaviour(changed: Mapping[str, str], episodes: Sequence[Episode]) -> Behaviour:
    """Run a build; where it breaks, that is what it does."""
    with warnings.catch_warnings(), np.errstate(all="ignore"), bounded():
        warnings.simplefilter("ignore")
        try:
            with loaded(changed) as modules:
                fingerprint = _said(modules["phasewatch.features.fingerprint"].behaviour_fingerprint)
                return Behaviour(fingerprint=fingerprint, values=tuple(_said(_digest, modules, e) for e in episodes))
        except TooLong:
            return Behaviour(fingerprint="without end", values=("without end",) * len(episodes))
        except Exception as exc:  # a mutant that cannot even be loaded
            return Behaviour(fingerprint=repr(exc), values=(repr(exc),) * len(episodes))


def _said(function: Callable[..., Any], *arguments: object) -> str:
    try:
        return str(function(*arguments))
    except TooLong:
        raise
    except Exception as exc:
        return f"raised {type(exc).__name__}"


def _digest(modules: Mapping[str, types.ModuleType], episode: Episode) -> str:
    bins = modules["phasewatch.binning.align"].align(episode).bins
    stats = modules["phasewatch.features.stats"]
    digest = hashlib.sha256()
    for values in (bins, stats.window_stats(bins), stats.episode_stats(bins)):
        digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    return digest.hexdigest()
