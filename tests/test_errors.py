"""Every error that a user can meet: drawn in the tree, worded in a test, one line with its exit code on the command
line."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from phasewatch import errors
from phasewatch.cli.common import handle_errors
from phasewatch.errors import PhasewatchError

TESTS = Path(__file__).parent
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PhasewatchError)]

# Classes whose words no test asks for by `pytest.raises(Kind, match=...)`, each with where they are met instead.
ELSEWHERE = {
    "PhasewatchError": "the root; nothing raises it",
}


def asked_for_with_words() -> Iterator[str]:
    """Return the name of each class that some test expects with `pytest.raises(Kind, match=...)`."""
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).endswith("raises")
                and any(keyword.arg == "match" for keyword in node.keywords)
            ):
                yield ast.unparse(node.args[0])


def made(kind: type[PhasewatchError]) -> PhasewatchError:
    """Build one, as it is made where it is raised."""
    if kind is errors.BundleError:
        return errors.BundleError(code="row-json", words="not an object", file="a.tar.zst", member="proc.jsonl", line=3)
    return kind("here: found this, expected that; do so")


each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def test_the_words_of_every_error_are_held_by_a_test() -> None:
    silent = {kind.__name__ for kind in KINDS} - set(asked_for_with_words()) - set(ELSEWHERE)

    assert not silent, f"no test asks for the words of {', '.join(sorted(silent))}"


def test_the_list_of_exceptions_holds_no_class_that_is_gone_or_tested() -> None:
    assert set(ELSEWHERE) <= {kind.__name__ for kind in KINDS} - set(asked_for_with_words())


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    drawn = re.findall(r"^([│ ├└─]*)(\w+)(?: +(\d))?(?:  +(\S.*))?$", errors.__doc__ or "", re.MULTILINE)
    rows = [(len(lead) // 4, name) for lead, name, *_ in drawn if name in vars(errors)]
    parents: list[str] = []
    for depth, name in rows:
        parents[depth:] = [name]
        if depth:
            assert vars(errors)[name].__bases__[0].__name__ == parents[depth - 1]
    assert sorted(name for _, name in rows) == sorted(kind.__name__ for kind in KINDS)
    for _, name, code, _ in drawn:
        if code:
            assert vars(errors)[name].exit_code == int(code)


@each_kind
def test_an_error_is_one_line_on_stderr_and_leaves_with_its_code(kind: type[PhasewatchError]) -> None:
    app = typer.Typer()

    @app.command()
    @handle_errors
    def fail() -> None:
        raise made(kind)

    done = CliRunner().invoke(app, [])

    assert done.exit_code == kind.exit_code
    assert done.stderr == f"error: {made(kind)}\n"
    assert done.stdout == ""


@each_kind
def test_an_error_keeps_its_words_on_the_way_out_of_a_worker(kind: type[PhasewatchError]) -> None:
    error = made(kind)

    again = pickle.loads(pickle.dumps(error))  # noqa: S301  our own, as the process pool does it

    assert type(again) is kind
    assert str(again) == str(error)


@each_kind
def test_an_error_is_one_sentence(kind: type[PhasewatchError]) -> None:
    first = (kind.__doc__ or "").splitlines()[0]

    assert first.endswith(".")
    assert kind.exit_code in {1, 2, 3, 4, 5}


def test_a_package_that_was_left_out_is_named_with_the_line_that_installs_it() -> None:
    app = typer.Typer()

    @app.command()
    @handle_errors
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'sklearn.linear_model'", name="sklearn.linear_model")

    done = CliRunner().invoke(app, [])

    assert done.exit_code == 5
    assert done.stderr == "error: sklearn.linear_model is not installed: pip install 'phasewatch[train]'\n"


def test_a_module_that_nobody_offers_is_broken_code_and_shows_itself() -> None:
    app = typer.Typer()

    @app.command()
    @handle_errors
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'phasewatch.oops'", name="phasewatch.oops")

    assert isinstance(CliRunner().invoke(app, []).exception, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("gtb", "did you mean gbt?", id="one that resembles some is answered with those"),
        pytest.param("forest", "it is one of cnn, gbt, gru", id="one that resembles none with all that there are"),
    ],
)
def test_a_name_that_nobody_knows_is_answered_with_names_that_somebody_does(name: str, said: str) -> None:
    assert errors.suggest_names(name, ["gru", "gbt", "cnn"]) == said


def test_no_error_asks_whether_a_name_was_meant_that_the_given_one_does_not_resemble() -> None:
    from phasewatch.simulate.faults import find_faults

    with pytest.raises(errors.UsageError, match="no fault 'zzz'; it is one of bit-flip, bomb, "):
        find_faults(["zzz"])
