"""What cannot be with ranks that share sequences is refused by name, before training."""

import pytest

from moe_train.config.errors import UsageError
from moe_train.config.load import validate_config
from tests.resolved import resolve_for


def make(world=4, size=2, **sections):
    parallel = {"context_parallel_size": size, **sections.pop("parallel", {})}
    train = {"run_dir": "r", "sequence_length": 64, "micro_batch_size": 2, **sections.pop("train", {})}
    return resolve_for(validate_config({**sections, "parallel": parallel, "train": train}), world)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"world": 3}, ["world size (3)", "parallel.context_parallel_size (2)"]),
        ({"train": {"sequence_length": 66}}, ["train.sequence_length (66)", "context_parallel_size", "2 x 2 = 4"]),
        (
            {"model": {"moe": {"capacity_factor": 1.0}}},
            ["model.moe.capacity_factor (1.0)", "context_parallel_size (2)"],
        ),
        (
            {"model": {"moe": {"eval_capacity_factor": 2.0}}},
            ["eval_capacity_factor (2.0)", "context_parallel_size (2)"],
        ),
        ({"model": {"moe": {"balance_scope": "rank"}}}, ["balance_scope ('rank')", "context_parallel_size (2)"]),
        (
            {"model": {"moe": {"switch_aux_coef": 0.1, "switch_scope": "micro_batch"}}},
            ["switch_scope ('micro_batch')", "context_parallel_size (2)"],
        ),
        ({"model": {"mixer": "ttt_linear"}}, ["mixers ('ttt_linear')", "context_parallel_size (2)"]),
        ({"model": {"mixer": "ttt_mlp"}}, ["mixers ('ttt_mlp')", "context_parallel_size (2)"]),
        ({"model": {"mixer": "rwkv7"}}, ["mixers ('rwkv7')", "context_parallel_size (2)"]),
        (
            {"model": {"mixer": "infini", "infini": {"segment_length": 8, "memory": "delta"}}},
            ["mixers ('infini')", "context_parallel_size (2)", "memory ('delta')"],
        ),
        ({"model": {"hidden_copies": {"copies": 2}}}, ["hidden_copies.copies (2)", "context_parallel_size (2)"]),
        ({"train": {"compile": True}}, ["train.compile (True)", "context_parallel_size (2)"]),
        (
            {"train": {"global_batch_size": 6}},
            ["train.global_batch_size (6)", "2 x 2 = 4", "parallel.context_parallel_size (2) ranks share"],
        ),
        ({"size": 1, "parallel": {"context_exchange": "ring"}}, ["context_exchange ('ring')", "no effect"]),
    ],
)
def test_what_cannot_be_is_refused(sections, words):
    with pytest.raises(UsageError) as error:
        make(**sections)
    for word in words:
        assert word in str(error.value)


def test_sizes_count_a_shared_sequence_once():
    config = make(world=4, size=2, train={"global_batch_size": 16})
    assert config.accumulation == 4 and config.train.global_batch_size == 16
    assert make(world=4, size=4).train.global_batch_size == 2  # of one group
    automatic = make(world=4, size=4, train={"micro_batch_size": "auto", "global_batch_size": 8})
    assert automatic.train.micro_batch_size == 8 and automatic.accumulation == 1


def test_whole_sequences_refuse_nothing():
    make(size=1, model={"moe": {"capacity_factor": 1.0, "balance_scope": "rank"}}, train={"sequence_length": 33})
