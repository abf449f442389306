"""Fixtures of all tests: pools of ranks that start with their first run and are forked, in tenths of a second.

A pool lives as long as a module of tests: every process group that a test makes leaves threads behind, and those of a
whole session took half a core.
"""

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool1() -> Iterator[RankPool]:
    """One rank, with a process group of its own."""
    with RankPool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def pool2() -> Iterator[RankPool]:
    """Two ranks joined by gloo."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def pool4() -> Iterator[RankPool]:
    """Four ranks joined by gloo."""
    with RankPool(4) as pool:
        yield pool
