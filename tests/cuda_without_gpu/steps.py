"""Runs of the trainer on fake devices: whole steps of the engine, and decoding. Each runs in a forked process.

The engine, DeepSpeed included, is the real one. `main` prints what it counted in the last step as one line of JSON.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.cuda_without_gpu import fake_cuda  # before torch

import numpy as np  # isort: skip
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_train.config.load import validate_config
from moe_train.config.parts import load_kinds
from moe_train.config.resolve import Device, Ranks, ResolvedConfig, resolve
from moe_train.model.step_size import StepSize
from tests.cuda_without_gpu.ceilings import Layout
from tests.cuda_without_gpu.counting import DeviceWork

SEQUENCE, MICRO_BATCH, VOCABULARY, DOCUMENT = 512, 2, 4096, 128
STEPS = {
    1: 2,
    2: 2,
    3: 3,
}  # by ZeRO stage: the first makes the optimizer's state, in the second 3 follows the parameters
DEVICE = torch.device("cuda", 0)


def resolved(layout: Layout) -> ResolvedConfig:
    """The configuration of a small model with the options of a large one."""
    moe = {"num_experts": 16, "top_k": 2, "intermediate_size": 256, "router": layout.router}
    model = {"hidden_size": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 512}
    model |= {"moe_every": 2, "qk_norm": "head", "isolate_documents": layout.documents, "vocab_size": VOCABULARY}
    train = {"run_dir": "unused", "precision": layout.precision, "micro_batch_size": MICRO_BATCH}
    train |= {"global_batch_size": MICRO_BATCH * layout.world * layout.accumulation, "sequence_length": SEQUENCE}
    parallel = {"expert_parallel_size": layout.experts, "zero_stage": layout.stage or 1, "dispatch": layout.dispatch}
    sections = {"model": model | {"moe": moe}, "parallel": parallel}
    config = validate_config(sections | {"train": train | {"recompute": "block" if layout.recompute else "none"}})
    ranks = Ranks(layout.world, min(layout.node, layout.world))
    return resolve(config, ranks, Device("cuda", has_bf16=True), VOCABULARY, load_kinds(config))


def take_steps(layout: Layout) -> DeviceWork:
    """Take the STEPS of the engine; what the last one did."""
    from moe_train.distributed.traffic import TrafficMeter
    from moe_train.train import batches as batch_module
    from moe_train.train.batches import make_tokens, own_targets
    from moe_train.train.engine.build import make_engine

    config = resolved(layout)
    tokens = MICRO_BATCH * SEQUENCE
    groups = layout.node if layout.dispatch == "two_level" else layout.experts  # ranks of the last stage of a row's way
    rows = tokens * config.model.moe.top_k // (groups * config.parallel.chunks)
    _take_ints_as_equal()
    # Read on the host from the batch, which here has no numbers.
    batch_module.starts_of_documents = lambda documents_BS: tuple(range(0, documents_BS.numel() + 1, DOCUMENT))
    with DeviceWork():
        engine = make_engine(config, DEVICE, TrafficMeter(DEVICE))
    mark = 7 if layout.documents else None

    def batches() -> Iterator[tuple[Any, torch.Tensor]]:
        for _ in range(layout.accumulation):
            ids_BS = np.arange(tokens).reshape(MICRO_BATCH, SEQUENCE) % 100
            yield (
                make_tokens(ids_BS, np.arange(MICRO_BATCH), 0, mark, DEVICE),
                own_targets(ids_BS, None, DEVICE),
            )

    size = StepSize(layout.accumulation * layout.world, tokens * layout.accumulation * layout.world, tokens)
    plant(layout.plant)
    for _ in range(STEPS[layout.stage]):
        work = DeviceWork(rows)
        with work:
            result = engine.train_step(batches(), size, 1e-3, lambda gradients: False)
        assert result.loss.device.type == "cuda" and result.loss.dtype == torch.float32
    return work


def decode(layout: Layout) -> DeviceWork:
    """Decode four tokens of two prompts of different lengths; what the last token took."""
    from moe_train.infer.decode import DecodePlan, Decoder
    from moe_train.train.engine.build import make_engine

    config = resolved(layout)
    _take_ints_as_equal()
    with DeviceWork():
        model = make_engine(config, DEVICE).model
        decoder = iter(Decoder(model, [[1, 2, 3], [4]], DecodePlan(4, VOCABULARY)))
    plant(layout.plant)
    for _ in range(4):
        # As few rows as there are tokens: some ranks get none.
        work = DeviceWork(0)
        with work:
            chosen_B = next(decoder)
        assert chosen_B.shape == (2,) and chosen_B.device.type == "cuda"
    return work


def _item(x_BSD: torch.Tensor) -> None:
    float(x_BSD.sum())


def _cpu_tensor(x_BSD: torch.Tensor) -> None:
    x_BSD + torch.ones(x_BSD.shape[-1], dtype=x_BSD.dtype)


def _fp32_copy(x_BSD: torch.Tensor) -> None:
    x_BSD.float()


def _upload(x_BSD: torch.Tensor) -> None:
    torch.arange(x_BSD.shape[1]).to(x_BSD.device)


PLANTS: dict[str, Callable[[torch.Tensor], None]] = {
    "item": _item,
    "cpu_tensor": _cpu_tensor,
    "fp32_copy": _fp32_copy,
    "upload": _upload,
}


def plant(name: str) -> None:
    """Make a mistake in every MoE layer from now on; no mistake if the name is empty."""
    from moe_train.model.moe.layer import MoELayer

    if not name:
        return
    forward = MoELayer.forward

    def with_mistake(layer: Any, x_BSD: torch.Tensor, *rest: Any) -> Any:
        PLANTS[name](x_BSD)
        return forward(layer, x_BSD, *rest)

    MoELayer.forward = with_mistake


def _take_ints_as_equal() -> None:
    # ZeRO-3 compares numbers with rank 0, which is made up.
    from deepspeed.runtime.zero import partitioned_param_coordinator, stage3

    for module in (partitioned_param_coordinator, stage3):
        module.assert_ints_same_as_other_ranks = lambda *args, **kwargs: None


def main(arguments: Sequence[str]) -> int:
    """Run a layout, given as JSON, and print what was counted."""
    layout = Layout(**json.loads(arguments[0]))
    fake_cuda.install()
    dist.init_process_group("fake", rank=0, world_size=layout.world, store=FakeStore())
    with FakeTensorMode(allow_non_fake_inputs=True):
        work = take_steps(layout) if layout.stage else decode(layout)
    found = {name: dict(Counter.most_common(getattr(work, name))) for name in _COUNTED}
    print(json.dumps(found), flush=True)
    return 0


_COUNTED = ("launches", "lines", "waits", "wide_bytes", "wide_products")
