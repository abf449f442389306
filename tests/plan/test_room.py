"""A model without room for its states is refused before data is read, with the commands that find a layout."""

from pathlib import Path

import pytest
import torch

from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.root import Config
from moe_train.distributed.world import World
from moe_train.host.memory import host_memory
from moe_train.plan.host import host_parts
from moe_train.plan.layout import layout_of
from moe_train.plan.room import check_room
from moe_train.plan.shapes import model_shape
from moe_train.plan.states import model_states
from tests.resolved import resolve_for
from tests.train.runs import train_alone

CPU = torch.device("cpu")


def world_of(size: int, per_host: int) -> World:
    return World(
        rank=0,
        local_rank=0,
        world_size=size,
        local_world_size=per_host,
        num_nodes=size // per_host,
        node_rank=0,
        master_addr="localhost",
        master_port=1,
        launcher="torchrun",
    )


def configuration(hidden_size: int, **parallel: object) -> Config:
    model = {"hidden_size": hidden_size, "num_heads": 8, "num_layers": 4, "vocab_size": 1000}
    return load_config([], program="test", defaults={"model": model, "parallel": parallel, "train": {"run_dir": "x"}})


@pytest.mark.parametrize(("ranks", "per_host", "zero_stage"), [(1, 1, 1), (4, 2, 1), (4, 4, 3)])
def test_the_bound_is_the_states_against_the_share_of_the_host(
    monkeypatch: pytest.MonkeyPatch, ranks: int, per_host: int, zero_stage: int
) -> None:
    config = resolve_for(configuration(64, zero_stage=zero_stage), ranks)
    shape = model_shape(config.model, config.model.vocab_size, config.train.sequence_length)
    states = model_states(shape, layout_of(config, per_host))
    needed = states.weights + states.optimizer_states
    assert needed > 12 * sum(tensor.global_numel for tensor in shape.tensors) / ranks  # three copies in fp32 at least
    monkeypatch.setattr("moe_train.plan.room.host_memory", lambda: (needed * per_host, 0))
    check_room(config, world_of(ranks, per_host), CPU)
    monkeypatch.setattr("moe_train.plan.room.host_memory", lambda: ((needed - 1) * per_host, 0))
    with pytest.raises(UsageError, match=r"(?s)per rank \(world size .*plan --config FILE --search --nodes"):
        check_room(config, world_of(ranks, per_host), CPU)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offload_takes_memory_of_the_host(monkeypatch: pytest.MonkeyPatch, zero_stage: int) -> None:
    config = resolve_for(configuration(64, zero_stage=zero_stage, offload_optimizer="cpu"), 4)
    shape = model_shape(config.model, config.model.vocab_size, config.train.sequence_length)
    layout = layout_of(config, 2)
    states, world = model_states(shape, layout), world_of(4, 2)
    # The memory of CPUs is that of their host, and has everything in it.
    everything = states.weights + sum(host_parts(states, layout, "cpu").values())
    assert everything > states.weights + states.optimizer_states
    monkeypatch.setattr("moe_train.plan.room.host_memory", lambda: (2 * everything, 0))
    check_room(config, world, CPU)
    monkeypatch.setattr("moe_train.plan.room.host_memory", lambda: (2 * everything - 2, 0))
    with pytest.raises(UsageError, match="does not fit"):
        check_room(config, world, CPU)
    # A GPU has the weights alone, its host the rest.
    in_host = sum(host_parts(states, layout, "cuda").values())
    monkeypatch.setattr("moe_train.plan.room._memory_of_rank", lambda world, device: states.weights)
    monkeypatch.setattr("moe_train.plan.room.host_memory", lambda: (2 * in_host, 0))
    check_room(config, world, torch.device("cuda"))
    monkeypatch.setattr("moe_train.plan.room.host_memory", lambda: (2 * in_host - 2, 0))
    with pytest.raises(
        UsageError, match=r"parallel\.offload_optimizer \(cpu\).* GiB in the memory of a host \(2 ranks"
    ):
        check_room(config, world, torch.device("cuda"))


def test_a_real_host_has_room_for_the_small_and_none_for_the_giant(tmp_path: Path) -> None:
    total, available = host_memory()
    assert 0 < available <= total
    check_room(resolve_for(configuration(64), 1), world_of(1, 1), CPU)
    with pytest.raises(UsageError, match="does not fit"):
        check_room(resolve_for(configuration(2**17), 1), world_of(1, 1), CPU)


def test_the_lines_that_are_offered_start_what_they_say() -> None:
    with pytest.raises(UsageError) as error:
        check_room(resolve_for(configuration(65536), 1), world_of(1, 1), CPU)
    plan, launch = (line.split() for line in str(error.value).splitlines()[-2:])
    assert plan[:2] == ["moe-train", "plan"] and launch[:2] == ["moe-train", "launch"]
    program = launch[launch.index("--") + 1 :]
    assert (Path(__file__).parents[2] / program[0]).is_file()
    assert program[1:] == ["--config", plan[plan.index("--output") + 1]]


def test_the_command_ends_before_it_reads_data(tmp_path: Path) -> None:
    options = [f"--model.hidden_size={2**17}", "--model.num_heads=1024", f"--data.cache_dir={tmp_path / 'cache'}"]
    result = train_alone(*options, f"--train.run_dir={tmp_path / 'run'}", "--train.steps=1")
    assert result.returncode == 2 and "moe-train plan --config FILE --search" in result.stderr, result
    assert "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []
