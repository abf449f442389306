"""A run that is killed and started again, in real processes: `benchmarks.kills` with few kills."""

from pathlib import Path

import pytest

from benchmarks.kills.run import compare
from tests.train.runs import fork_server


@pytest.mark.slow
def test_losses_are_those_of_a_run_that_was_never_killed(tmp_path: Path) -> None:
    found = compare(fork_server(), tmp_path, num_ranks=2, num_kills=3, seed=1, steps=30)
    assert found["passed"], found
    assert found["kills"] == 3, found
    assert found["slowest_end_seconds"] < 30, found
    ends = [life.codes for life in found["lives"] if len(life.killed) == 1]
    for codes in ends:  # the rank that was killed, and the one that noticed
        assert sorted(codes) == [-9, 70], found
