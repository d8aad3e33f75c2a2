"""Parse a mapping file: which columns of which tables are which raw fields, in which unit, clock and episode."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from phasewatch import atomic
from phasewatch.channels import RAW_FIELDS, RawFieldSpec
from phasewatch.errors import DataError, UsageError, suggest_names
from phasewatch.importing.clocks import ClockRule, check_clock
from phasewatch.importing.patterns import PathPattern, parse_pattern
from phasewatch.importing.units import UnitFacts, compute_factor, parse_quantity
from phasewatch.toml_config import parse_toml
from phasewatch.types import HOST_ID_PATTERN, Phase, SampleKind, SourceKind

__all__ = [
    "AccessPlan",
    "FieldPlan",
    "FieldRule",
    "ImportMap",
    "LabelRule",
    "TablePlan",
    "TextRule",
    "list_shipped_maps",
    "parse_field_rules",
    "parse_map",
    "read_map",
]

MAP_FORMAT = "phasewatch-import/1"
MAX_MAP_BYTES = 256 << 10
MAX_TABLES, MAX_FIELDS = 32, 256

ValueKind = Literal["counter", "rate", "increment", "gauge", "tick"]
_NATURES = {"counter": "counter", "rate": "counter", "increment": "counter", "gauge": "gauge", "tick": "tick"}


class TextRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a text comes from: a constant, a part of the path, or a column.

    Attributes:
        text: The constant.
        path: Name of a part of the path.
        column: Name of a column; its first value in the episode counts, except for hosts, episodes and phases.
        values: Words of the source and what they become; others are kept.
        default: For words that `values` does not have; without it they are kept.
    """

    text: str = ""
    path: str = ""
    column: str = ""
    values: dict[str, str] = {}
    default: str | None = None

    def convert(self, word: str) -> str:
        """Return what a word of the source becomes."""
        return self.values.get(word, word if self.default is None else self.default)


class FieldRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A column that becomes a raw field.

    Attributes:
        column: Name in the source; dots lead into nested JSON.
        to: Name of the raw field.
        kind: ``counter`` (a total), ``rate`` (per second), ``increment`` (since the row before), ``gauge`` or ``tick``.
        unit: Unit of the column; never guessed.
        optional: Leave the rule out if the raw field is not declared (`--custom-channels`) or a file lacks the column.
    """

    column: str
    to: str
    kind: ValueKind
    unit: str = ""
    optional: bool = False


class SumRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A column of an access list whose sum is a counter."""

    column: str
    to: str
    unit: str = ""
    optional: bool = False


class AccessRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A list with one line for each access to a disk, which becomes counters twice a second.

    Attributes:
        address: Column of the first byte or sector.
        address_unit: ``B`` or ``sectors``.
        size: Column of the size.
        size_unit: ``B``, ``KiB`` or ``sectors``.
        merge_within: A piece that begins where the one before ended, at most this much later, continues its request.
        merge_up_to: Largest request that pieces are merged into.
        bytes_to, pieces_to, requests_to, sequential_to: Raw fields of the sums: bytes, lines, requests, and requests
            that begin where the one before ended.
        clusters_to, rewritten_to: Raw fields of the 64 KiB clusters, each once in half a second, and of those among
            them that were accessed before in the episode.
        sum: Columns that are summed up.
    """

    address: str
    address_unit: str
    size: str
    size_unit: str
    merge_within: str = ""
    merge_up_to: str = ""
    bytes_to: str = ""
    pieces_to: str = ""
    requests_to: str = ""
    sequential_to: str = ""
    clusters_to: str = ""
    rewritten_to: str = ""
    sum: tuple[SumRule, ...] = ()


class TableRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of file.

    Attributes:
        files: Pattern of their paths.
        format: ``csv`` or ``jsonl``.
        source: The source of telemetry that its rows belong to.
        clock: How a row is stamped.
        columns: Columns of a CSV file that has no header.
        delimiter: Of a CSV file.
        null: Cells that stand for no reading; an empty cell and a JSON null always do.
        skip_bad_lines: Number of malformed lines that are left out in each file.
        out_of_order_within: How much earlier than a row before it a row may be.
        field: The columns that become raw fields.
        accesses: Instead of fields: the rows are accesses to a disk.
    """

    files: str
    format: Literal["csv", "jsonl"]
    source: SourceKind
    clock: ClockRule
    columns: tuple[str, ...] = ()
    delimiter: str = ","
    null: tuple[str, ...] = ()
    skip_bad_lines: int = 0
    out_of_order_within: str = ""
    field: tuple[FieldRule, ...] = ()
    accesses: AccessRule | None = None


class EpisodeRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose rows they are; all rows of one host and key are one episode, cut into parts of half an hour."""

    host: TextRule
    key: TextRule | None = None
    profile: TextRule | None = None
    sample: TextRule | None = None
    kind: TextRule | None = None


class MachineRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Known facts of the machines; what is left out is unknown."""

    arch: str = "unknown"
    accel: str = "unknown"
    machine: str = "unknown"
    cpu: str = ""
    vcpus: int = 1
    mem_mib: int = 1
    disk: str = ""
    nic: str = ""
    hypervisor: str = ""
    guest_kernel: str = ""


class LabelRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The phases: of an episode or of each row (`phase`), or from a CSV file of time ranges (`file`).

    Attributes:
        phase: Phase of the episode, or a column with the phase of each row.
        file: CSV file below the source with the columns ``start``, ``end``, ``phase``, and ``host``, ``episode`` (empty
            for all). Its times are ISO 8601 with an offset, or whole Unix seconds.
        values: Words of the file and the phases that they become.
        evidence: How it is known that the phases hold; without it, `--labels proven` leaves them out.
    """

    phase: TextRule | None = None
    file: str = ""
    values: dict[str, str] = {}
    evidence: str = ""


class ImportMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping file (docs/how-to/import.md)."""

    format: str
    name: str
    table: tuple[TableRule, ...]
    episode: EpisodeRule
    about: str = ""
    ticks_per_second: int = 0
    page_bytes: int = 0
    sector_bytes: int = 0
    machine: MachineRule = MachineRule()
    labels: LabelRule | None = None

    @property
    def facts(self) -> UnitFacts:
        """The sizes that units depend on."""
        return UnitFacts(
            ticks_per_second=self.ticks_per_second, page_bytes=self.page_bytes, sector_bytes=self.sector_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldPlan:
    """A checked `FieldRule` with its raw field and the factor between the units."""

    column: str
    spec: RawFieldSpec
    kind: ValueKind
    factor: Fraction
    optional: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPlan:
    """A checked `AccessRule`.

    Attributes:
        address, size: Columns.
        address_factor, size_factor: Their units in bytes.
        merge_within_ns, merge_up_to_bytes: The rule of merging; −1 ns merges nothing.
        outputs: Raw field by output: ``bytes``, ``pieces``, ``requests``, ``sequential``, ``clusters``, ``rewritten``.
        sums: Columns that are summed up.
    """

    address: str
    size: str
    address_factor: Fraction
    size_factor: Fraction
    merge_within_ns: int
    merge_up_to_bytes: int
    outputs: dict[str, RawFieldSpec]
    sums: tuple[FieldPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlan:
    """A checked `TableRule`."""

    rule: TableRule
    pattern: PathPattern
    reorder_ns: int
    fields: tuple[FieldPlan, ...]
    accesses: AccessPlan | None

    @property
    def specs(self) -> tuple[RawFieldSpec, ...]:
        """The raw fields that the table fills, in a fixed order."""
        if self.accesses is None:
            return tuple(plan.spec for plan in self.fields)
        return (*self.accesses.outputs.values(), *(plan.spec for plan in self.accesses.sums))


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPlan:
    """A checked map.

    Attributes:
        rules: The map.
        tables: Its tables.
        left_out: Optional rules without a declared raw field, as ``source.field``.
        digest: The first 12 hex digits of the file's SHA-256.
    """

    rules: ImportMap
    tables: tuple[TablePlan, ...]
    left_out: tuple[str, ...]
    digest: str


def list_shipped_maps() -> tuple[str, ...]:
    """Return the names of the maps that come with the package."""
    folder = resources.files("phasewatch.importing") / "maps"
    names = sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
    return tuple(n for n in names if not n.endswith("-channels"))


def read_map(name: str) -> bytes:
    """Return the content of a mapping file, or of the shipped one of that name.

    Raises:
        UsageError: If there is no such file.
    """
    path = Path(name)
    if name in list_shipped_maps() and not path.exists():
        return (resources.files("phasewatch.importing") / "maps" / f"{name}.toml").read_bytes()
    try:
        text = atomic.read_regular(path, MAX_MAP_BYTES)
    except OSError as exc:
        shipped = ", ".join(list_shipped_maps())
        raise UsageError(f"--map {name}: {exc.strerror}; name a TOML file, or a shipped map: {shipped}") from None
    if len(text) > MAX_MAP_BYTES:
        raise UsageError(f"--map {name}: larger than {MAX_MAP_BYTES:,} bytes; that is no map")
    return text


def parse_map(text: bytes, *, where: str) -> MapPlan:
    """Parse and check a mapping file.

    Raises:
        DataError: If it is malformed; the message names the table and the key.
    """
    try:
        rules = parse_toml(text.decode("utf-8"), ImportMap, where=where)
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8") from None
    if rules.format != MAP_FORMAT:
        raise DataError(f"{where}: format = {rules.format[:40]!r}; this version reads {MAP_FORMAT!r}")
    if not HOST_ID_PATTERN.fullmatch(rules.name):
        raise DataError(f"{where}: name = {rules.name[:40]!r}; expected small letters, digits, '.', '_' and '-'")
    if not 1 <= len(rules.table) <= MAX_TABLES:
        raise DataError(f"{where}: {len(rules.table)} [[table]]; expected 1 to {MAX_TABLES}")
    left_out: list[str] = []
    tables = tuple(
        _plan_table(rule, rules.facts, f"{where}: table {n}", left_out) for n, rule in enumerate(rules.table, 1)
    )
    names = {frozenset(t.pattern.names) for t in tables}
    if len(names) > 1:
        raise DataError(f"{where}: the patterns of all tables need the same {{names}}, because these join the files")
    _check_texts(rules, next(iter(names)), where)
    return MapPlan(rules=rules, tables=tables, left_out=tuple(left_out), digest=sha256(text).hexdigest()[:12])


def _plan_table(rule: TableRule, facts: UnitFacts, where: str, left_out: list[str]) -> TablePlan:
    if bool(rule.field) == (rule.accesses is not None):
        raise DataError(f"{where}: expected either [[table.field]] or [table.accesses]")
    if rule.format == "jsonl" and rule.columns:
        raise DataError(f"{where}: columns are for CSV; JSON lines have keys")
    if len(set(rule.columns)) != len(rule.columns) or len(rule.field) > MAX_FIELDS:
        raise DataError(f"{where}: a column is listed twice, or more than {MAX_FIELDS} fields")
    if len(rule.delimiter) != 1 or rule.delimiter in '"\n\r' or not 0 <= rule.skip_bad_lines <= 1_000_000:
        raise DataError(f"{where}: expected a delimiter of one character, and skip_bad_lines of 0 to 1,000,000")
    check_clock(rule.clock, facts, where=where)
    fields = parse_field_rules(rule.field, rule.source, facts, where, left_out)
    accesses = _plan_accesses(rule.accesses, rule.source, facts, where, left_out) if rule.accesses else None
    plan = TablePlan(
        rule=rule,
        pattern=parse_pattern(rule.files, where=f"{where}: files"),
        reorder_ns=(
            parse_quantity(rule.out_of_order_within, "time", where=f"{where}: out_of_order_within")
            if rule.out_of_order_within
            else 0
        ),
        fields=fields,
        accesses=accesses,
    )
    targets = [spec.field for spec in plan.specs]
    if not targets:
        raise DataError(f"{where}: no column becomes a raw field")
    if len(set(targets)) != len(targets):
        raise DataError(f"{where}: {next(t for t in targets if targets.count(t) > 1)} is filled twice")
    return plan


def parse_field_rules(
    rules: tuple[FieldRule, ...], source: SourceKind, facts: UnitFacts, where: str, left_out: list[str]
) -> tuple[FieldPlan, ...]:
    """Check rules against the raw fields and units of a source.

    Args:
        rules: The rules.
        source: The source.
        facts: Sizes of ticks, pages and sectors.
        where: Name of the table, for messages.
        left_out: Receives optional rules whose raw field is not declared.

    Raises:
        DataError: If a field, kind or unit is wrong.
    """
    plans = []
    for rule in rules:
        place = f"{where}: column {rule.column!r}"
        spec = _find_spec(source, rule.to, place, left_out if rule.optional else None)
        if spec is None:
            continue
        if _NATURES[rule.kind] != spec.nature:
            kinds = [kind for kind, nature in _NATURES.items() if nature == spec.nature]
            raise DataError(
                f"{place}: a {rule.kind} cannot become {source}.{rule.to}, which is a {spec.nature}; "
                f"expected kind {' or '.join(kinds)}"
            )
        try:
            factor = compute_factor(rule.unit, spec.unit, facts=facts, is_rate=rule.kind == "rate")
        except DataError as exc:
            raise DataError(f"{place}: {exc}") from None
        plans.append(FieldPlan(column=rule.column, spec=spec, kind=rule.kind, factor=factor, optional=rule.optional))
    return tuple(plans)


def _find_spec(source: SourceKind, field: str, place: str, left_out: list[str] | None) -> RawFieldSpec | None:
    known = {spec.field: spec for spec in RAW_FIELDS if spec.source is source}
    if field in known:
        return known[field]
    if left_out is not None:
        left_out.append(f"{source}.{field}")
        return None
    remedy = "or declare it with --custom-channels"
    raise DataError(f"{place}: no raw field {source}.{field[:40]}; {suggest_names(field, known)} {remedy}")


def _plan_accesses(
    rule: AccessRule, source: SourceKind, facts: UnitFacts, where: str, left_out: list[str]
) -> AccessPlan:
    place = f"{where}: accesses"
    outputs: dict[str, RawFieldSpec] = {}
    for name in ("bytes", "pieces", "requests", "sequential", "clusters", "rewritten"):
        field = getattr(rule, f"{name}_to")
        spec = (
            _find_spec(source, field, f"{place}.{name}_to", left_out if name in _CUSTOM_OUTPUTS else None)
            if (field)
            else None
        )
        if spec is None:
            continue
        if spec.nature != "counter" or spec.unit != ("B" if name == "bytes" else "1"):
            raise DataError(
                f"{place}.{name}_to: {source}.{field} is a {spec.nature} in {spec.unit}; it must be a counter"
            )
        outputs[name] = spec
    sums = tuple(
        FieldRule(column=s.column, to=s.to, kind="increment", unit=s.unit, optional=s.optional) for s in rule.sum
    )
    try:
        address_factor = compute_factor(rule.address_unit, "B", facts=facts)
        size_factor = compute_factor(rule.size_unit, "B", facts=facts)
    except DataError as exc:
        raise DataError(f"{place}: {exc}") from None
    needs_rule = {"requests", "sequential"} & outputs.keys()
    if needs_rule and not rule.merge_within:
        raise DataError(f"{place}: {min(needs_rule)} need `merge_within`, such as '1 ms'")
    return AccessPlan(
        address=rule.address,
        size=rule.size,
        address_factor=address_factor,
        size_factor=size_factor,
        merge_within_ns=(
            parse_quantity(rule.merge_within, "time", where=f"{place}.merge_within") if rule.merge_within else -1
        ),
        merge_up_to_bytes=(
            parse_quantity(rule.merge_up_to, "bytes", where=f"{place}.merge_up_to") if rule.merge_up_to else 2**62
        ),
        outputs=outputs,
        sums=parse_field_rules(sums, source, facts, place, left_out),
    )


_CUSTOM_OUTPUTS = ("pieces", "sequential")  # no built-in raw field counts them


def _check_texts(rules: ImportMap, names: frozenset[str], where: str) -> None:
    texts: dict[str, TextRule | None] = {
        f"episode.{name}": getattr(rules.episode, name) for name in ("host", "key", "profile", "sample", "kind")
    }
    if rules.labels is not None:
        texts["labels.phase"] = rules.labels.phase
        if (rules.labels.phase is None) == (not rules.labels.file):
            raise DataError(f"{where}: labels need either `phase` or `file`")
        if rules.labels.file.startswith("/") or ".." in rules.labels.file.split("/"):
            raise DataError(f"{where}: labels.file = {rules.labels.file[:60]!r}; expected a path below the source")
        words = dict(rules.labels.values)
        if rules.labels.phase is not None:
            words |= rules.labels.phase.values | {"default": rules.labels.phase.default or Phase.UNKNOWN}
            if rules.labels.phase.text:
                words["text"] = rules.labels.phase.text
        for word in words.values():
            if word not in list(Phase):
                raise DataError(f"{where}: labels: {word[:40]!r} is no phase; {suggest_names(word, Phase)}")
    for key, rule in texts.items():
        if rule is None:
            continue
        if sum(map(bool, (rule.text, rule.path, rule.column))) != 1:
            raise DataError(f"{where}: {key} needs exactly one of text, path and column")
        if rule.path and rule.path not in names:
            raise DataError(f"{where}: {key}: no {{{rule.path}}} in the patterns; {suggest_names(rule.path, names)}")
    if (kind := rules.episode.kind) is not None:
        given: list[Any] = [*kind.values.values(), *([kind.text] if kind.text else [])]
        for word in given:
            if word not in list(SampleKind):
                raise DataError(f"{where}: episode.kind: {word[:40]!r}; expected {', '.join(SampleKind)}")
