"""Fixtures of all tests: pools of ranks that live as long as the test session and start with their first run."""

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def pool2() -> Iterator[RankPool]:
    """Two ranks joined by gloo."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator[RankPool]:
    """Four ranks joined by gloo."""
    with RankPool(4) as pool:
        yield pool
