"""An object store on a free port of this machine, and a fresh bucket or folder for each test."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from phasewatch.store.base import BundleStore, open_store

NAMES = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def new_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Return the URIs of fresh, empty places in a bucket; the variables that lead there are set."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")

    def make() -> str:
        bucket = f"bucket-{next(NAMES)}"
        httpx.put(f"{s3_endpoint}/{bucket}", trust_env=False, timeout=60).raise_for_status()
        return f"s3://{bucket}/stores/one"

    return make


@pytest.fixture(params=["a folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Name a fresh, empty store of each kind."""
    if request.param == "s3":
        return str(request.getfixturevalue("new_bucket")())
    (tmp_path / "store").mkdir()
    return str(tmp_path / "store")


@pytest.fixture
def store(place: str) -> BundleStore:
    return open_store(place)
