"""Read the files of a run and write `report.html`: one self-contained file that makes no network requests."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from phasewatch.artifacts import (
    ACCOUNTING_FILE,
    AUDIT_FILE,
    FEATURE_SCHEMA_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    VALIDATION_FILE,
    list_split_names,
    list_split_paths,
)
from phasewatch.atomic import write_atomic
from phasewatch.audit.run import read_audit
from phasewatch.dataset import SplitIndex, read_split_index
from phasewatch.dataset.split_files import read_fold_file
from phasewatch.errors import MissingToolError, RunError, UsageError
from phasewatch.evaluation.headline import read_headline
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, parse_metrics
from phasewatch.parquet import convert_parquet_errors, open_parquet
from phasewatch.report import data as report_data
from phasewatch.report.layout import ReportPage
from phasewatch.report.markdown import render_json, render_markdown
from phasewatch.report.summary import build_page
from phasewatch.training.predictions import NO_FILTER

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = [
    "MAX_REPORT_BYTES",
    "read_report_data",
    "render_html",
    "write_report",
]

MAX_REPORT_BYTES = 2 * 1000 * 1000  # opens at once on a phone and fits a mail attachment
_INTERVAL_PATTERN = re.compile(r"\[[+-]?\d[^\[\]]{0,28}\]")
_T = TypeVar("_T")


def write_report(run: Path, form: str = "html", out: Path | None = None) -> Path:
    """Write the report of a run and return its path; identical input files give identical bytes.

    Args:
        run: Folder of the run.
        form: ``html``, or ``md`` or ``json`` (the same content without figures).
        out: Output file; the default is ``report.FORM`` in the folder of the run.

    Raises:
        RunError: If the folder is missing, or none of its files can be read.
        MissingToolError: If Jinja is not installed.
        UsageError: If the format is unknown.
    """
    if form not in _REPORT_FORMATS:
        raise UsageError(f"unknown report format {form!r}; expected one of {', '.join(_REPORT_FORMATS)}")
    target = run / f"report.{form}" if out is None else out
    write_atomic(target, _REPORT_FORMATS[form](build_page(read_report_data(run))).encode())
    return target


def read_report_data(run: Path) -> report_data.ReportData:
    """Read the files of a run; missing and unreadable files become notes, and the others are still read.

    Raises:
        RunError: If the folder is missing, or none of its files can be read.
    """
    if not run.is_dir():
        raise RunError(f"{run}: there is no such folder; `phasewatch run STORE --out {run}` creates a run")
    notes: list[str] = []

    def attempt(name: str, parse: Callable[[Path], _T]) -> _T | None:
        path = run / name
        if not path.is_file():
            notes.append(f"{name} is missing: `phasewatch {report_data.COMMAND_BY_FILE[name]} RUN` writes it.")
            return None
        try:
            return parse(path)
        except (RunError, OSError) as exc:
            notes.append(f"{name} could not be read: {exc}")
            return None

    metrics = attempt(METRICS_FILE, lambda p: parse_metrics(p.read_bytes(), file=METRICS_FILE))
    predictions = attempt(PREDICTIONS_FILE, lambda p: report_data.parse_predictions(_read_predictions(p)))
    bundles = attempt(
        VALIDATION_FILE,
        lambda p: report_data.parse_validation(
            _read_table(p, (*report_data.VALIDATION_COLUMNS, *report_data.ROW_COUNT_COLUMNS))
        ),
    )
    stages = attempt(ACCOUNTING_FILE, lambda p: report_data.parse_accounting(p.read_bytes()))
    schema = attempt(FEATURE_SCHEMA_FILE, lambda p: report_data.parse_schema(p.read_bytes()))
    folds = []
    for path in list_split_paths(run):
        try:
            folds.append(read_fold_file(path))
        except (RunError, OSError) as exc:
            notes.append(str(exc))
    if not (metrics or predictions or bundles or stages or schema or folds):
        raise RunError(f"{run}: holds no readable file of a run; `phasewatch run STORE --out {run}` creates a run")
    splits = SplitIndex()
    try:
        splits = read_split_index(run)
    except (RunError, OSError) as exc:
        notes.append(str(exc))
    digests = _compute_input_digests(run)
    if metrics is not None:
        notes += report_data.find_stale_inputs(metrics, digests | _compute_digests(run, list_split_names(run)))
    audit = None
    try:
        audit = read_audit(run)
    except (RunError, OSError) as exc:
        notes.append(f"{AUDIT_FILE} could not be read: {exc}")
    return report_data.ReportData(
        metrics=metrics,
        predictions=predictions,
        bundles=bundles,
        stages=stages or (),
        folds=tuple(folds),
        schema=schema,
        digests=digests,
        notes=tuple(notes),
        audit=audit,
        corpus=_read_corpus(run),
        splits=splits,
    )


def _read_corpus(run: Path) -> str | None:
    """Return the name of the store, or None if `headline.json` is missing or unreadable."""
    try:
        return read_headline(run).corpus
    except (RunError, OSError):
        return None


def render_html(page: ReportPage) -> str:
    """Render the report as HTML with SVG figures; strings from data are escaped in both.

    Raises:
        MissingToolError: If Jinja is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as exc:
        raise MissingToolError("Jinja is not installed: pip install 'phasewatch[train]'") from exc
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("phasewatch.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _render_code
    environment.filters["unbroken"] = _keep_intervals_on_one_line
    script = Markup(_read_resource("tables.js"))
    return environment.get_template("report.html.j2").render(
        page=page,
        figures={key: (Markup(f.wide), Markup(f.narrow)) for key, f in page.figures().items()},
        style=Markup(_read_resource("style.css")),
        script=script,
        script_hash=f"'sha256-{_compute_script_hash(script)}'",
    )


# Format name, which is the file suffix too → renderer.
_REPORT_FORMATS: dict[str, Callable[[ReportPage], str]] = {
    "html": render_html,
    "md": render_markdown,
    "json": render_json,
}


def _read_resource(name: str) -> str:
    return (resources.files("phasewatch.report") / "templates" / name).read_text(encoding="utf-8")


def _compute_script_hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _render_code(text: str) -> Markup:
    """Render text between backticks as code, and escape everything else."""
    from markupsafe import Markup, escape

    parts = _keep_intervals_on_one_line(text).split("`")
    if len(parts) % 2 == 0:  # a stray backtick comes from data
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )


def _keep_intervals_on_one_line(text: str) -> str:
    """Replace the space in an interval by a no-break space, so that no line ends with `[0.41,`."""
    return _INTERVAL_PATTERN.sub(lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def _read_table(path: Path, columns: tuple[str, ...], filters: Any = None) -> Any:
    import pyarrow.parquet as pq

    hint = f"phasewatch {report_data.COMMAND_BY_FILE[path.name]} RUN"
    with open_parquet(path, hint=hint) as file:
        present = set(file.schema_arrow.names)
    with convert_parquet_errors(path, hint=hint):
        return pq.read_table(path, columns=[c for c in columns if c in present], filters=filters)


def _read_predictions(path: Path) -> Any:
    """Read only the test windows of the headline's split; the file of a full run holds millions of others."""
    wanted = [
        ("recipe", "==", DEFAULT_HEADLINE.recipe),
        ("threat", "==", DEFAULT_HEADLINE.channel_set),
        ("table", "==", DEFAULT_HEADLINE.input),
        ("filter", "==", NO_FILTER),
        ("part", "==", "test"),
    ]
    return _read_table(path, report_data.PREDICTION_COLUMNS, wanted)


def _compute_input_digests(run: Path) -> dict[str, str]:
    """Return the digests of the files that the report quotes; run.json is excluded because it holds times."""
    return _compute_digests(
        run, (METRICS_FILE, PREDICTIONS_FILE, ACCOUNTING_FILE, VALIDATION_FILE, FEATURE_SCHEMA_FILE)
    )


def _compute_digests(run: Path, names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        if (run / name).is_file():
            with (run / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
