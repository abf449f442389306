"""Room check: refuse a model whose states cannot fit on the ranks that were started, and say how to find a layout."""

import math

import torch

from moe_train.config.errors import UsageError
from moe_train.config.resolve import ResolvedConfig
from moe_train.distributed.world import World
from moe_train.host.memory import host_memory
from moe_train.plan.host import host_parts
from moe_train.plan.layout import layout_of
from moe_train.plan.shapes import model_shape
from moe_train.plan.states import model_states, state_elements

_GIB = 2**30
_STATES_SHARE = 0.5  # of a device's memory, in the layout that is offered; the rest is for activations and gradients
_RANKS_PER_NODE = 8


def check_room(config: ResolvedConfig, world: World, device: torch.device) -> None:
    """Check that weights and optimizer states fit into the device of a rank and into its host, before any data is read.

    It is a lower bound: gradients and activations come on top, and an unknown vocabulary counts one row.

    Args:
        config: Resolved configuration.
        world: Place of this process among the ranks.
        device: Device of this rank. Ranks on CPUs share their host's memory evenly.

    Raises:
        UsageError: If the states do not fit. It offers the commands that find and start a layout that fits.
    """
    if "offload_param" in config.deepspeed.get("zero_optimization", {}):
        return  # where the states are then is DeepSpeed's choice
    memory = _memory_of_rank(world, device)
    shape = model_shape(config.model, config.model.vocab_size, config.train.sequence_length)
    layout = layout_of(config, world.local_world_size)
    states = model_states(shape, layout)
    in_host = sum(host_parts(states, layout, device.type).values()) if layout.offloads else 0.0
    if device.type == "cuda":
        _check_host(in_host, world)
        needed: float = states.weights + (0 if layout.offloads else states.optimizer_states)
    else:  # the same memory
        needed = states.weights + (in_host if layout.offloads else states.optimizer_states)
    if needed <= memory:
        return
    parameters = sum(tensor.global_numel for tensor in shape.tensors)
    everything = parameters * layout.dtype_bytes + 4 * state_elements(shape, layout)
    ranks = max(world.world_size + 1, math.ceil(everything / (_STATES_SHARE * memory)))
    nodes = 2 ** math.ceil(math.log2(max(1, ranks / _RANKS_PER_NODE)))  # batches and experts are powers of two, mostly
    raise UsageError(
        f"the model ({parameters:,} parameters) does not fit: its weights and optimizer states take "
        f"{needed / _GIB:,.1f} GiB per rank (world size {world.world_size}, parallel.expert_parallel_size "
        f"{layout.ep_size}, parallel.zero_stage {layout.zero_stage}), and a rank has {memory / _GIB:,.1f} GiB of "
        f"memory here. {nodes * _RANKS_PER_NODE:,} such ranks have room. Find a layout and start it:\n"
        f"  moe-train plan --config FILE --search --nodes {nodes} --gpus-per-node {_RANKS_PER_NODE} --device DEVICE "
        "--output fitting.yaml\n"
        "  moe-train launch --hostfile HOSTS -- launch/train.py --config fitting.yaml"
    )


def _check_host(in_host: float, world: World) -> None:
    needed, memory = in_host * world.local_world_size, host_memory()[0]
    if needed > memory:
        raise UsageError(
            "parallel.offload_optimizer (cpu): master weights, optimizer states, gradients and the copy for a "
            f"checkpoint take {needed / _GIB:,.1f} GiB in the memory of a host ({world.local_world_size} ranks), which "
            f"has {memory / _GIB:,.1f} GiB: take more hosts, or a model that is smaller"
        )


def _memory_of_rank(world: World, device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()[0] / world.local_world_size
