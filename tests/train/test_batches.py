"""A micro-step's sequences do not depend on how many ranks share it."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.train.batches import BatchPlan, make_tokens


@given(
    world_size=st.integers(1, 8), micro=st.integers(1, 4), accumulation=st.integers(1, 4), step=st.integers(0, 10**6)
)
def test_every_sequence_of_a_step_is_taken_once(world_size: int, micro: int, accumulation: int, step: int) -> None:
    batch = world_size * micro * accumulation
    plans = [BatchPlan(micro, batch, rank, world_size) for rank in range(world_size)]
    assert plans[0].num_micro_steps == accumulation
    found = np.concatenate([plan.indices(step * batch, m) for plan in plans for m in range(accumulation)])
    assert sorted(found) == list(range(step * batch, (step + 1) * batch))


def test_a_micro_step_is_the_same_for_any_number_of_ranks() -> None:
    def micro_step(world_size: int, m: int) -> list[int]:
        plans = [BatchPlan(8 // world_size, 16, rank, world_size) for rank in range(world_size)]
        return sorted(int(i) for plan in plans for i in plan.indices(48, m))

    for m in range(2):
        assert micro_step(1, m) == micro_step(2, m) == micro_step(4, m)


def test_documents_are_marked_only_when_isolated() -> None:
    ids = np.array([[9, 1, 2, 9, 3]], dtype=np.int64)
    tokens = make_tokens(ids, np.array([7]), 2, end_of_document=9, device=torch.device("cpu"))
    assert tokens.documents_BS is not None
    assert tokens.documents_BS.tolist() == [[1, 1, 1, 2, 2]]  # the mark belongs to the document that follows it
    assert tokens.sequences_B.tolist() == [7] and tokens.step == 2
    plain = make_tokens(ids, np.array([7]), 2, end_of_document=None, device=torch.device("cpu"))
    assert plain.documents_BS is None
