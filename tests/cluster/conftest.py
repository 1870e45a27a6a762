"""The Ray cluster of these tests, which ends with the last of them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

# Ray reads these when it is imported. A cluster of ours serves nobody else.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.fixture(scope="package")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """One small Ray cluster, joined; the port on which Serve listens."""
    from ray_cluster import started

    with started(tmp_path_factory.getbasetemp()) as port:
        yield port
