"""Checks over sections and over the world."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config.base import merge
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config, validate_config
from tests.resolved import resolve_for


def make(**sections):
    return validate_config({**sections, "train": {"run_dir": "r", **sections.get("train", {})}})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        pytest.param(
            {"model": {"moe": {"num_experts": 6}}, "parallel": {"expert_parallel_size": 4}},
            ["num_experts (6)", "expert_parallel_size (4)"],
            id="experts do not divide",
        ),
        pytest.param(
            {"model": {"moe_every": 0}, "parallel": {"expert_parallel_size": 2}},
            ["expert_parallel_size (2)", "no MoE layer"],
            id="no MoE layer to share",
        ),
        pytest.param(
            {"train": {"compile": True}, "parallel": {"zero_stage": 3}},
            ["train.compile (True)", "parallel.zero_stage (3)"],
            id="compiled under ZeRO-3",
        ),
        pytest.param(
            {"train": {"recompute": "block", "recompute_every": 5}},
            ["train.recompute_every (5)", "model.num_layers (4)"],
            id="the fifth of four blocks",
        ),
        pytest.param(
            {"model": {"moe_every": 0}, "parallel": {"dispatch": "unique"}},
            ["parallel.dispatch (unique)", "no MoE layer"],
            id="no MoE layer to dispatch to",
        ),
        pytest.param(
            {"model": {"moe_every": 0}, "parallel": {"chunks": 2}},
            ["parallel.chunks (2)", "no MoE layer"],
            id="no MoE layer to hide",
        ),
        pytest.param(
            {"train": {"precision": "bf16"}, "parallel": {"payload": "bf16"}},
            ["parallel.payload (bf16)", "train.precision (bf16)", "16 bits"],
            id="rows that are no shorter",
        ),
        pytest.param(
            {"train": {"compile": True}, "parallel": {"zero_stage": 3}},
            ["train.compile (True)", "zero_stage (3)"],
            id="compiled pieces",
        ),
    ],
)
def test_sections_that_contradict(sections, words):
    with pytest.raises(UsageError) as error:
        make(**sections)
    for word in words:
        assert word in str(error.value)


def test_sections_at_the_limit_are_right():
    make(model={"moe_every": 0}, parallel={"expert_parallel_size": 1})
    make(train={"steps": 50}, optim={"warmup_steps": 50})
    make(model={"moe": {"num_experts": 6}}, parallel={"expert_parallel_size": 3})
    make(train={"compile": True}, parallel={"zero_stage": 2})
    make(train={"precision": "bf16"}, parallel={"payload": "fp8"})
    make(train={"precision": "fp32"}, parallel={"payload": "bf16"})


@pytest.mark.parametrize(
    ("experts", "world", "local", "size"),
    [
        (8, 1, 1, 1),
        (8, 2, 2, 2),
        (8, 4, 4, 4),
        (8, 8, 8, 8),
        (8, 16, 8, 8),
        (8, 16, 16, 8),
        (8, 16, 4, 4),
        (8, 6, 6, 2),
        (8, 3, 3, 1),
        (6, 4, 4, 2),
        (6, 12, 6, 6),
        (6, 12, 4, 2),
        (64, 48, 8, 8),
        (7, 8, 8, 1),
        (7, 14, 7, 7),
    ],
)
def test_auto_takes_the_largest_size_that_stays_in_a_node(experts, world, local, size):
    config = make(model={"moe": {"num_experts": experts}})
    assert resolve_for(config, world, local).parallel.expert_parallel_size == size


@given(experts=st.integers(2, 64), nodes=st.integers(1, 4), local=st.integers(1, 8))
def test_auto_always_divides(experts, nodes, local):
    config = make(model={"moe": {"num_experts": experts, "load_cv2_coef": 0.0}})
    size = resolve_for(config, nodes * local, local).parallel.expert_parallel_size
    assert experts % size == 0
    assert local % size == 0
    assert not [s for s in range(size + 1, local + 1) if experts % s == 0 and local % s == 0]


@pytest.mark.parametrize(
    ("size", "world", "local", "given", "node_size"),
    [(4, 8, 4, "auto", None), (8, 8, 4, "auto", 4), (2, 8, 4, "auto", None), (8, 8, 8, 2, 2), (4, 8, 2, 4, None)],
)
def test_two_levels_are_there_where_experts_are_shared_by_several_nodes(size, world, local, given, node_size):
    parallel = {"expert_parallel_size": size, "dispatch": "two_level", "ranks_per_node": given}
    config = make(parallel=parallel)
    resolved = resolve_for(config, world, local)
    assert resolved.parallel.node_size == node_size
    assert resolve_for(validate_config(resolved.model_dump()), world, local) == resolved
    assert resolve_for(make(parallel={"expert_parallel_size": size}), world, local).parallel.node_size is None


@pytest.mark.parametrize(
    ("experts", "world", "local", "given", "size"),
    [(16, 8, 4, "auto", 8), (16, 4, 4, "auto", 4), (12, 8, 4, "auto", 4), (6, 8, 4, "auto", 2), (16, 8, 8, 2, 8)],
)
def test_auto_takes_whole_nodes_for_two_levels(experts, world, local, given, size):
    parallel = {"dispatch": "two_level", "ranks_per_node": given}
    config = make(parallel=parallel, model={"moe": {"num_experts": experts}})
    assert resolve_for(config, world, local).parallel.expert_parallel_size == size


def test_nodes_must_divide_the_ranks_that_share_experts():
    config = make(model={"moe": {"num_experts": 12}}, parallel={"expert_parallel_size": 6, "dispatch": "two_level"})
    with pytest.raises(UsageError, match=r"expert_parallel_size \(6\) must be a multiple .*ranks_per_node \(4\)"):
        resolve_for(config, 12, 4)


@pytest.mark.parametrize(
    ("size", "experts", "tokens", "given", "chunks"),
    [
        (1, 8, 2**20, "auto", 1),
        (4, 8, 128, "auto", 1),
        (4, 8, 2**20, "auto", 4),
        (4, 8, 128, 3, 3),
        (4, 8, 2**14, "auto", 2),
        (4, 512, 2**14, "auto", 1),
    ],
)
def test_chunks_where_rows_travel_and_are_many(size, experts, tokens, given, chunks):
    train = {"sequence_length": tokens // 8, "micro_batch_size": 8}
    model = {"moe": {"num_experts": experts, "top_k": 2}}
    config = make(parallel={"expert_parallel_size": size, "chunks": given}, train=train, model=model)
    assert resolve_for(config, 4, 4).parallel.chunks == chunks


@pytest.mark.parametrize(("tokens", "chunks"), [(2**13, 1), (2**14, 1), (2**15, 2), (2**20, 2)])
def test_chunks_on_a_gpu_are_few_and_large(tokens, chunks):
    """Each launches its own kernels: 32k rows a chunk, and at most two."""
    train = {"sequence_length": tokens // 8, "micro_batch_size": 8}
    config = make(parallel={"expert_parallel_size": 4}, train=train, model={"moe": {"num_experts": 8, "top_k": 2}})
    assert resolve_for(config, 4, 4, device="cuda").parallel.chunks == chunks


def test_nccl_ends_a_process_after_the_watchdog():
    """NCCL's own end is SIGABRT, which would hide the report and exit code 70."""
    for seconds, step, on_cpu, on_cuda in ((600, 600, 600, 720), (60, 600, 60, 720), (3600, 600, 3600, 3600)):
        config = make(parallel={"timeout_seconds": seconds}, train={"step_timeout_seconds": step})
        resolved = resolve_for(config, 1)
        assert resolved.collective_seconds("cpu") == on_cpu
        assert resolved.collective_seconds("cuda") == on_cuda


def test_auto_is_one_without_moe_layers():
    assert resolve_for(make(model={"moe_every": 0}), 8, 8).parallel.expert_parallel_size == 1


@pytest.mark.parametrize(("name", "value"), [("experts", False), ("dead_after_steps", 7), ("entropy_alarm", 0.5)])
def test_telemetry_of_experts_needs_experts(name, value):
    with pytest.raises(UsageError, match=rf"telemetry\.{name} \({value}\)"):
        make(model={"moe_every": 0}, telemetry={name: value})
    assert getattr(make(telemetry={name: value}).telemetry, name) == value


def test_an_alarm_that_cannot_sound_is_refused():
    with pytest.raises(UsageError, match=r"max_violation_alarm \(3.0\).*at most.*\(3\)"):
        make(telemetry={"max_violation_alarm": 3.0})
    make(telemetry={"max_violation_alarm": 2.9})


def test_expert_parallel_size_must_divide_the_world():
    config = make(parallel={"expert_parallel_size": 4})
    with pytest.raises(UsageError, match=r"world size \(6\).*expert_parallel_size \(4\)"):
        resolve_for(config, 6, 6)
    assert resolve_for(config, 8, 2).parallel.expert_parallel_size == 4  # over nodes, where it was asked for


def test_global_batch_must_divide():
    config = make(train={"micro_batch_size": 2, "global_batch_size": 12})
    with pytest.raises(UsageError, match=r"global_batch_size \(12\).*micro_batch_size.*\(2 x 4 = 8\)"):
        resolve_for(config, 4, 4)
    assert resolve_for(config, 3, 3).train.global_batch_size == 12
    with pytest.raises(UsageError, match=r"global_batch_size \(12\)"):
        resolve_for(config, 12, 12)


def test_global_batch_defaults_to_one_micro_batch_of_every_rank():
    config = make(train={"micro_batch_size": 3})
    checked = resolve_for(config, 4, 4)
    assert checked.train.global_batch_size == 12
    assert config.train.global_batch_size is None  # the configuration itself is not changed
    assert checked.train.micro_batch_size == 3
    assert checked.optim.model_dump(exclude={"router_lr_factor"}) == config.optim.model_dump(
        exclude={"router_lr_factor"}
    )


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_the_quickstart_fits_any_number_of_devices(world_size: int, micro: int) -> None:
    config = load_config(["--config", "configs/quickstart.yaml"], program="x")
    resolved = resolve_for(config, world_size, world_size)
    assert resolved.train.micro_batch_size == micro
    assert resolved.train.global_batch_size == 16


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": {"ranks_per_node": 4}}, ["ranks_per_node (4)", "dispatch 'flat'", "two_level"]),
        ({"model": {"moe": {"router": "softmax_topk", "load_cv2_coef": 0.1}}}, ["load_cv2_coef (0.1)", "softmax_topk"]),
        ({"optim": {"attention": {"x": 1}}}, ["optim.attention", "unknown key"]),
    ],
)
def test_what_parts_refuse(sections, words):
    with pytest.raises(UsageError) as error:
        resolve_for(make(**sections), 4)
    for word in words:
        assert word in str(error.value)


def test_unknown_keys_of_sections_with_parts_are_named_with_all_other_faults():
    values = {
        "model": {"hidden_sise": 3, "nun_heads": 2, "num_layers": -1, "moe": {"num_expert": 4, "top_k": "x"}},
        "optim": {"lerning_rate": 1, "beta1": 7},
        "telemetry": {"evry": 1},
    }
    with pytest.raises(UsageError) as error:
        make(**values)
    for word in (
        "hidden_sise",
        "nun_heads",
        "num_layers (-1)",
        "num_expert ",
        "top_k ('x')",
        "lerning_rate",
        "beta1 (7)",
    ):
        assert word in str(error.value), word
    assert "did you mean hidden_size" in str(error.value) and "did you mean every" in str(error.value)


def test_mixer_above_replaces_mixers_below():
    below = {"train": {"run_dir": "r"}, "model": {"mixers": ["attention"], "num_layers": 2}}
    assert merge(below, {"model": {"mixer": "attention"}})["model"] == {"mixer": "attention", "num_layers": 2}
    both = {"model": {"mixers": ["attention"], "mixer": "attention"}}
    assert merge({}, both) == both
    with pytest.raises(UsageError, match="give one of them"):
        make(**both)
    with pytest.raises(UsageError, match=r"mixer \('attn'\).*attention"):
        make(model={"mixer": "attn"})
