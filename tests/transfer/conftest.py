"""The stores that the receiver is tested with."""

from __future__ import annotations

from tests.store.conftest import new_bucket, place, s3_endpoint, store

__all__ = ["new_bucket", "place", "s3_endpoint", "store"]
