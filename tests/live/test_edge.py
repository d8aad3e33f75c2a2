"""An edge bundle comes from anywhere: it is believed only where its bytes, digests and graphs are what they must be."""

from __future__ import annotations

import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.factories.trained_runs import FOLD, RECIPE

from phasewatch.dataset import load
from phasewatch.errors import MismatchError, RunError
from phasewatch.inference.edge_bundle import (
    EdgeHeader,
    OnnxModel,
    add_edge_digest,
    pack_edge_bundle,
    parse_edge_bundle,
    read_edge_bundle,
)
from phasewatch.inference.export import ExportRequest, export_run
from phasewatch.models import registry
from phasewatch.models.base import ModelInputs


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("edge") / "x.zip"
    return export_run(run, out, ExportRequest(recipe=RECIPE, fold=FOLD)).path.read_bytes()


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: list[tuple[str, bytes]]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return made.getvalue()


def remade(data: bytes, **changes: object) -> bytes:
    """The bundle with keys of its header changed and its seal right again."""
    members = members_of(data)
    header = msgspec.json.decode(members.pop("edge.json"), type=EdgeHeader)
    text = msgspec.json.encode(add_edge_digest(msgspec.structs.replace(header, **changes)))
    return zipped([("edge.json", text), *members.items()])


def test_a_model_out_of_the_bundle_says_what_the_checkpoint_says(bundle: bytes, run: Path) -> None:
    edge = parse_edge_bundle(bundle, file="x.zip")
    for model in edge.header.models:
        live = OnnxModel(edge.onnx[model.member], edge.build_input_spec(model), file=model.member)
        trained = registry.load(run / "models" / RECIPE / FOLD / model.threat / "gbt" / "raw-s0")
        inputs = load(run, RECIPE, FOLD, model.threat).test.inputs

        assert np.abs(live.predict_proba(inputs) - trained.predict_proba(inputs)).max() <= 1e-5
    with pytest.raises(MismatchError, match="channel set"):
        live.predict_proba(load(run, RECIPE, FOLD, "oracle").test.inputs)
    assert live.predict_proba(ModelInputs(x=inputs.x[:0], spec=inputs.spec)).shape == (0, 5)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        pytest.param(lambda d: b"", RunError, "not a readable .zip", id="nothing"),
        pytest.param(lambda d: d[: len(d) // 2], RunError, "not a readable .zip", id="half of it"),
        pytest.param(lambda d: zipped([("a", b"")]), RunError, "not an edge bundle", id="another zip"),
        pytest.param(
            lambda d: zipped([*members_of(d).items(), ("../x", b"")]),
            RunError,
            "a member has the name '../x'",
            id="a path",
        ),
        pytest.param(
            lambda d: zipped([*members_of(d).items(), ("more.onnx", b"")]),
            MismatchError,
            "not in both",
            id="a member too many",
        ),
        pytest.param(
            lambda d: zipped(list(members_of(d).items())[:-1]), MismatchError, "not in both", id="a member too few"
        ),
        pytest.param(
            lambda d: zipped([(n, v + b" " if n == "card.md" else v) for n, v in members_of(d).items()]),
            MismatchError,
            "card.md: found sha256",
            id="a changed card",
        ),
        pytest.param(
            lambda d: zipped(
                [(n, v.replace(b'"gbt"', b'"cnn"') if n == "edge.json" else v) for n, v in members_of(d).items()]
            ),
            MismatchError,
            "it was edited",
            id="an edited header",
        ),
        pytest.param(
            lambda d: remade(d, format="phasewatch-edge/1"),
            MismatchError,
            "this version reads 'phasewatch-edge/2'",
            id="another format",
        ),
        pytest.param(
            lambda d: remade(d, schema_hash="0" * 64), MismatchError, "feature schema 0000", id="another schema"
        ),
        pytest.param(
            lambda d: remade(d, behaviour_fingerprint="0" * 64),
            MismatchError,
            "behaviour fingerprint 0000",
            id="another arithmetic",
        ),
        pytest.param(
            lambda d: remade(d, classes=("good", "bad")), MismatchError, "classes good, bad", id="other classes"
        ),
        pytest.param(lambda d: remade(d, models=()), RunError, "lists no model", id="no model"),
        pytest.param(
            lambda d: zipped([("edge.json", b"{}" * 3_000_000)]),
            RunError,
            "larger than",
            id="a header that is too large",
        ),
        pytest.param(
            lambda d: zipped([("edge.json", b'{"format":"phasewatch-edge/2"}')]),
            RunError,
            "missing required field",
            id="half a header",
        ),
    ],
)
def test_a_bundle_that_is_not_what_it_was_is_refused(bundle: bytes, spoil, error, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words) as caught:
        parse_edge_bundle(spoil(bundle), file="x.zip")

    assert str(caught.value).startswith("x.zip: ")


def test_a_graph_of_another_shape_than_its_header_says_is_refused(bundle: bytes) -> None:
    edge = parse_edge_bundle(bundle, file="x.zip")
    realistic, portable = edge.header.models

    with pytest.raises(RunError, match=r"the runtime cannot run it"):
        OnnxModel(edge.onnx[portable.member], edge.build_input_spec(realistic), file="x")


def test_a_graph_that_reaches_for_another_file_is_refused_before_a_runtime_sees_it(bundle: bytes) -> None:
    from tests.inference.test_graph import hostile

    members = members_of(bundle)
    header = msgspec.json.decode(members.pop("edge.json"), type=EdgeHeader)
    members["realistic.onnx"] = hostile(members["realistic.onnx"], "weights in another file")

    with pytest.raises(RunError, match=r"x.zip: realistic.onnx: .*its weights lie in another file"):
        parse_edge_bundle(pack_edge_bundle(header, members), file="x.zip")


def test_an_absent_bundle_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read: No such file"):
        read_edge_bundle(tmp_path / "none.zip")


@pytest.mark.parametrize("seed", range(4))
def test_no_change_of_a_byte_is_accepted_as_another_bundle(bundle: bytes, seed: int) -> None:
    rng = np.random.default_rng(seed)
    good = parse_edge_bundle(bundle, file="x")
    for _ in range(60):
        cut = bytearray(bundle)
        cut[int(rng.integers(0, len(cut)))] ^= 1 << int(rng.integers(0, 8))
        with suppress(RunError, MismatchError):
            assert parse_edge_bundle(bytes(cut), file="x") == good  # what a .zip says beside its members is nobody's


def test_the_header_reads_as_json(bundle: bytes) -> None:
    header = json.loads(members_of(bundle)["edge.json"])

    assert header["format"] == "phasewatch-edge/2"
    assert header["models"][0]["columns"][0] == "proc.cpu_user.mean"
