"""A step of a small model on one long row, as the long_context benchmark measures it: on one rank, or its part of it.

python -m benchmarks.long_context.step FOLDER SEED ROUNDS LENGTH...     a rank of several; it writes FOLDER/RANK.json
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.long_context.documents import WINDOW, zipf_starts
from benchmarks.runner.peak import STEP, peak_bytes
from moe_train.config.model import ModelConfig
from moe_train.distributed.bootstrap import discover_world, init_process_group
from moe_train.distributed.collectives import barrier
from moe_train.distributed.context import ContextRanks
from moe_train.distributed.mesh import create_mesh
from moe_train.model.block import NO_RECOMPUTE, Recompute
from moe_train.model.build import build_model
from moe_train.model.parameters import materialize
from moe_train.model.transformer import LossOutput, Transformer
from moe_train.train.batches import make_tokens, own_targets

_END_OF_DOCUMENT = 256
_VOCAB_SIZE = 257
_TIMEOUT_SECONDS = 600
_CPU = torch.device("cpu")
# Of ranks that share a row the wider one, as the activations of a narrow one are small beside what attention and loss
# need for a moment.
NARROW, WIDE = (
    {
        "hidden_size": width,
        "num_layers": 2,
        "num_heads": heads,
        "num_kv_heads": heads // 2,
        "intermediate_size": width,
        "window_pattern": [WINDOW, None],
        "moe": {"num_experts": 4, "top_k": 2},
    }
    for width, heads in ((32, 2), (128, 4))
)


def make_step(
    model_fields: dict[str, Any],
    length: int,
    starts: Sequence[int],
    seed: int,
    context: ContextRanks | None = None,
    recompute: Recompute = NO_RECOMPUTE,
) -> Callable[[], None]:
    """Make a function that runs the model forward and backward.

    Args:
        model_fields: Section model of a configuration, such as NARROW.
        length: S, tokens of the row.
        starts: First columns of the row's documents, and S.
        seed: Seed of weights and tokens.
        context: Ranks that share the row; None: it is here as a whole.
        recompute: What the backward pass computes again.
    """
    model: Transformer = build_model(
        ModelConfig.model_validate(model_fields), _VOCAB_SIZE, recompute=recompute, measures=False
    )
    materialize(model, seed=seed, dtype=torch.float32, device=_CPU)
    ids_1S = np.random.default_rng(seed).integers(0, _END_OF_DOCUMENT, (1, length))
    ids_1S[0, list(starts[:-1])] = _END_OF_DOCUMENT
    tokens = make_tokens(ids_1S, np.zeros(1, dtype=np.int64), 0, _END_OF_DOCUMENT, _CPU, context)
    targets = own_targets(np.roll(ids_1S, -1, 1), context, _CPU)

    def run() -> None:
        model.zero_grad(set_to_none=False)
        output: LossOutput = model(tokens, targets_BS=targets)
        output.total.backward()

    return run


def measure(run: Callable[[], None], rounds: int = 1) -> tuple[int, float]:
    """Measure a function that runs forward and backward.

    Args:
        run: The function.
        rounds: Number of times that it is timed.

    Returns:
        Most bytes at one time, without inputs and weights; median of the CPU seconds of this process.
    """
    peak, seconds = peak_of(run), []
    for _ in range(rounds):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return peak, statistics.median(seconds)


def peak_of(run: Callable[[], None]) -> int:
    """Count the most bytes that exist at one time while something runs, beside those that existed before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        with torch.profiler.record_function(STEP):
            pass  # the first one does not count
        with torch.profiler.record_function(STEP):
            run()
    return peak_bytes(profile)


def main(arguments: Sequence[str]) -> int:
    """Measure the step at every length; all ranks together share the row. Collective: all ranks.

    Args:
        arguments: Folder, seed, rounds, lengths.
    """
    folder, (seed, rounds, *lengths) = Path(arguments[0]), map(int, arguments[1:])
    world = discover_world()
    torch.set_num_threads(1)
    init_process_group(world, _CPU, _TIMEOUT_SECONDS)
    context = None
    if world.world_size > 1:
        group = create_mesh(1, _TIMEOUT_SECONDS, context_size=world.world_size).context
        assert group is not None, "a mesh with a context size has this group"
        context = ContextRanks(group.group, group.rank, group.size)
    found = [
        measure(make_step(WIDE, length, zipf_starts(length, seed), seed, context, Recompute("block")), rounds)
        for length in lengths
    ]
    (folder / f"{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
