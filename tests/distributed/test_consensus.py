"""What one rank finds wrong ends all ranks alike."""

import pytest

from moe_train.config.errors import UsageError
from moe_train.distributed.consensus import run_on_all_ranks
from tests.ranks import RankPool


def outcome(action, describe=None) -> str:
    try:
        return f"value {run_on_all_ranks(action, describe)}"
    except (UsageError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def on_rank(rank: int, world_size: int, case: str) -> str:
    def action() -> int:
        if rank == 1 and case == "usage":
            raise UsageError("file x is empty")
        if rank == 1 and case == "disk":
            raise OSError(28, "No space left on device")
        return rank * 10

    parts = {"differs": {"seed": str(rank)}, "same": {"seed": "0"}}.get(case)
    return outcome(action, (lambda _: parts) if parts is not None else None)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("usage", ["UsageError: file x is empty"] * 2),
        ("disk", ["RuntimeError: rank 1: [Errno 28] No space left on device"] * 2),
        ("differs", ["UsageError: seed differs between ranks: 0 on rank 0, 1 on rank 1"] * 2),
        ("same", ["value 0", "value 10"]),
        ("fine", ["value 0", "value 10"]),
    ],
)
def test_all_ranks_end_alike(pool2: RankPool, case: str, expected: list[str]) -> None:
    assert pool2.run(on_rank, case) == expected
