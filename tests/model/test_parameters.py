"""Logical tensors and initial values: the same on every layout, and no rank holds more than its own."""

import math
import sys
from pathlib import Path

import pytest
import torch

from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.parameters import ExpertParameter, logical_tensors, materialize
from moe_train.ops.keyed_random import fill_normal_, make_key
from tests.model.small import VOCAB, small_config
from tests.processes import run_process

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def materialized(config, placement=None, seed=0, dtype=torch.float32):
    model = build_model(config, VOCAB, seed=seed, placement=placement)
    materialize(model, seed=seed, dtype=dtype, device=CPU)
    return model


@pytest.mark.parametrize("size", [1, 2, 4])
def test_logical_tensors_of_every_layout(size):
    config = small_config(moe_every=1)
    whole = logical_tensors(build_model(config, VOCAB))
    for rank in range(size):
        model = build_model(config, VOCAB, placement=ExpertPlacement(rank, size))
        tensors = logical_tensors(model)
        assert list(tensors) == list(whole)
        for name, parameter in model.named_parameters():
            tensor = tensors[name]
            assert tensor.name == name
            assert tensor.shape == whole[name].shape
            assert tensor.numel == parameter.numel()
            assert tensor.is_expert == (".experts." in name)
            if tensor.is_expert:
                assert tensor.shape[0] == 4
                assert tensor.numel == tensor.global_numel // size
                assert tensor.start == rank * tensor.numel
            else:
                assert tensor.shape == tuple(parameter.shape)
                assert (tensor.start, tensor.numel) == (0, tensor.global_numel)
    gate_up = whole["blocks.0.feed_forward.experts.gate_up"]
    assert gate_up.shape == (4, 16, 24)
    assert gate_up.global_numel == 4 * 16 * 24


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_hold_one_processs_weights(size):
    config = small_config(moe_every=2, norm="layernorm")
    whole = dict(materialized(config).named_parameters())
    parts = [dict(materialized(config, ExpertPlacement(rank, size)).named_parameters()) for rank in range(size)]
    for name, parameter in whole.items():
        if isinstance(parameter, ExpertParameter):
            assert torch.equal(torch.cat([part[name] for part in parts]), parameter)
            assert [part[name].first_expert for part in parts] == [4 // size * rank for rank in range(size)]
            assert all(isinstance(part[name], ExpertParameter) for part in parts)
        else:
            assert all(torch.equal(part[name], parameter) for part in parts)


def test_values_are_those_of_the_name_and_seed():
    model = materialized(small_config(), seed=5)
    weight = model.blocks[1].feed_forward.experts.down
    expected = torch.empty_like(weight)
    fill_normal_(expected, make_key(5, "parameter", "blocks.1.feed_forward.experts.down"), 0, 0.4 / math.sqrt(8))
    assert torch.equal(weight, expected)


def test_names_and_seeds_differ():
    model, other = materialized(small_config()), materialized(small_config(), seed=1)
    blocks = model.blocks
    assert not torch.isclose(blocks[0].mixer.query.weight, blocks[1].mixer.query.weight).any()
    assert not torch.isclose(blocks[0].mixer.key.weight, blocks[0].mixer.value.weight).any()
    assert not torch.isclose(model.embedding.weight, model.head.weight).any()
    assert not torch.isclose(model.embedding.weight, other.embedding.weight).any()
    assert torch.equal(model.embedding.weight, materialized(small_config()).embedding.weight)


def test_dtypes_round_the_same_numbers():
    wide, narrow = (materialized(small_config(), dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    for one, other in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert other.dtype == torch.bfloat16
        assert torch.equal(one.to(torch.bfloat16), other)


def test_tied_embeddings_share_memory_and_are_listed_once():
    model = build_model(small_config(tie_embeddings=True), VOCAB)
    assert "head.weight" not in logical_tensors(model)
    materialize(model, seed=0, dtype=torch.float32, device=CPU)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert [name for name in logical_tensors(model) if name in ("embedding.weight", "head.weight")] == [
        "embedding.weight"
    ]
    free = materialized(small_config())
    assert torch.equal(model.embedding.weight, free.embedding.weight)
    assert "head.weight" in logical_tensors(free)
    assert free.head.weight.data_ptr() != free.embedding.weight.data_ptr()


@pytest.mark.parametrize("router", ["noisy_topk", "softmax_topk"])
def test_initial_statistics(router):
    moe = {"num_experts": 4, "top_k": 2, "router": router, "load_cv2_coef": 0.0}
    config = small_config(hidden_size=128, intermediate_size=128, init_std=0.03, norm="layernorm", moe=moe)
    model = build_model(config, 500)
    materialize(model, seed=3, dtype=torch.float64, device=CPU)
    scaled = 0.03 / math.sqrt(2 * config.num_layers)
    seen = set()
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if "norm" in name:
            assert (values == (0 if name.endswith("bias") else 1)).all(), name
            seen.add("norm")
            continue
        if ".router." in name and router == "noisy_topk":
            assert (values == 0).all(), name
            seen.add("router")
            continue
        is_output = name.endswith(("mixer.output.weight", "feed_forward.down.weight", "experts.down"))
        std = scaled if is_output else 0.03
        count = values.numel()
        # Standard errors of mean and deviation of n normal numbers; five of them.
        assert abs(values.mean().item()) < 5 * std / math.sqrt(count), name
        assert abs(values.std().item() - std) < 5 * std / math.sqrt(2 * count), name
        seen.add(is_output)
    assert seen == {"norm", True, False} | ({"router"} if router == "noisy_topk" else set())


MEASURE = """
import torch
from moe_train.config.model import ModelConfig
from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.parameters import materialize
from moe_train.ops import keyed_random

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

torch.set_num_threads(1)
keyed_random._CHUNK = 1 << 16  # the temporaries of the hash have a bound of their own
shape = dict(hidden_size=512, num_layers=2, num_heads=8, intermediate_size=4096, moe_every=1)
small = build_model(ModelConfig(hidden_size=64, num_heads=8, num_layers=2, moe_every=1), 257)
materialize(small, seed=0, dtype=torch.float32, device=torch.device("cpu"))  # code and allocator are warm now
model = build_model(ModelConfig(**shape), 257, placement=ExpertPlacement(rank=3, size=8))
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
materialize(model, seed=0, dtype=torch.float32, device=torch.device("cpu"))
peak = memory("VmHWM") - before
experts = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
dense = sum(p.nbytes for n, p in model.named_parameters() if ".experts." not in n)
print(peak, experts, dense)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux's /proc")
def test_a_rank_never_holds_more_than_its_own():
    """Of 400 MB of experts an EP=8 rank allocates its 50, also for a moment."""
    result = run_process([sys.executable, "-c", MEASURE], timeout=120, env={"OMP_NUM_THREADS": "1"}, cwd=ROOT)
    assert result.returncode == 0, str(result)
    peak, experts, dense = map(int, result.stdout.split())
    assert experts == 2 * 3 * 512 * 4096 * 4
    assert 8 * experts / (8 * experts + dense) > 0.95  # experts are most of the model
    assert peak > 0.9 * (experts + dense)  # the measurement sees what is allocated
    assert peak < 1.5 * experts + dense


def test_buffers_begin_at_their_value_in_their_own_dtype():
    moe = {"num_experts": 4, "top_k": 2, "router": "sigmoid_topk", "load_cv2_coef": 0, "bias_update_rate": 0.1}
    model = materialized(small_config(moe_every=1, moe=moe), dtype=torch.bfloat16)
    biases = dict(model.named_buffers())
    assert list(biases) == [f"blocks.{i}.feed_forward.router.selection_bias" for i in range(4)]
    for bias in biases.values():
        assert bias.dtype == torch.float32 and torch.equal(bias, torch.zeros(4))
    assert "selection_bias" not in "".join(logical_tensors(model))
