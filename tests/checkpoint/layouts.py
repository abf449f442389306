"""A small training that is saved in one layout and goes on in another, and what the two have in common.

`save_in_layouts` and `resume_in_layouts` start the ranks of a layout as processes of their own, forked with all imports
done: DeepSpeed keeps groups in its modules, by the expert-parallel size, so that engines of two sizes must not meet in
a process. Engines of one size follow one another there, each made anew, with groups of its own and any ZeRO stage.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from moe_train.distributed.bootstrap import local_rank_environments
from moe_train.launch.fork_server import ForkedRank, wait_for_all
from tests.train.runs import ROOT, fork_server

NUM_STEPS = 3  # before the save, and again after it
MOST_RANKS = 8  # of the layouts that run at the same time
MOST_ENGINES = 18  # that follow one another in a process: each leaves its groups, and their threads, behind
TIMEOUT_SECONDS = 400  # for the ranks that run at the same time
# Sums in another order: some hundred roundings of fp32 are 1e-5. One token sent to another expert is 1e-3 of a loss.
LOSS_TOLERANCE = 1e-5
_GLOBAL_BATCH = 4
_SEQUENCE_LENGTH = 8
_VOCAB_SIZE = 64

# Each part of the state in small: experts, GQA, norms, a router's noise weights, and a bias that is a buffer. A step
# is one micro-step in every layout, so that the CV^2 losses are the same too.
_MODEL = (
    f"--model.vocab_size={_VOCAB_SIZE}",
    "--model.hidden_size=16",
    "--model.num_layers=1",
    "--model.moe_every=1",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.moe.num_experts=4",
    "--model.moe.top_k=2",
    "--model.moe.intermediate_size=12",
    "--model.moe.router=noisy_topk",
    "--model.moe.importance_cv2_coef=0.1",
    "--model.moe.load_cv2_coef=0.1",
    "--model.moe.bias_update_rate=0.01",
    f"--train.sequence_length={_SEQUENCE_LENGTH}",
    f"--train.global_batch_size={_GLOBAL_BATCH}",
    "--train.sample_tokens=0",
    "--parallel.device=cpu",
)


@dataclass(frozen=True)
class Layout:
    """How a training is spread.

    Attributes:
        world_size: Ranks.
        expert_parallel_size: Ranks that share the experts of a layer.
        zero_stage: Of DeepSpeed.
        precision: fp32 or bf16.
        offload_optimizer: none or cpu.
    """

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    precision: str = "fp32"
    offload_optimizer: str = "none"

    @property
    def name(self) -> str:
        """For people and folders: "4x2z3" is 4 ranks, EP 2, ZeRO 3."""
        suffix = "" if self.precision == "fp32" else f"-{self.precision}"
        suffix += "" if self.offload_optimizer == "none" else "-offload"
        return f"{self.world_size}x{self.expert_parallel_size}z{self.zero_stage}{suffix}"

    def options(self) -> list[str]:
        """Of `moe-train train`."""
        return [
            f"--parallel.expert_parallel_size={self.expert_parallel_size}",
            f"--parallel.zero_stage={self.zero_stage}",
            f"--train.micro_batch_size={_GLOBAL_BATCH // self.world_size}",
            f"--train.precision={self.precision}",
            f"--parallel.offload_optimizer={self.offload_optimizer}",
        ]


LAYOUTS = tuple(
    Layout(world_size, size, stage)
    for world_size in (1, 2, 4)
    for size in (1, 2, 4)
    if size <= world_size
    for stage in (1, 2, 3)
)


def covering_pairs() -> list[tuple[Layout, Layout]]:
    """Pairs (saved by, loaded by) in which each layout saves once and loads once, and every change of the number of
    ranks, of the ZeRO stage and of the expert-parallel size is among them: all pairs are the square of that.
    """
    pairs = []
    for number, loaded_by in enumerate(LAYOUTS):
        place, stage = divmod(number, 3)  # one of six (ranks, EP), three stages each
        pairs.append((LAYOUTS[3 * ((place - stage + 1) % 6) + -(place + stage + 1) % 3], loaded_by))
    return pairs


@dataclass(frozen=True)
class Origin:
    """A training that was saved after some steps, and went on.

    Attributes:
        layout: Of it.
        checkpoint: Of its first steps.
        losses: Of all steps.
    """

    layout: Layout
    checkpoint: Path
    losses: list[float]


@dataclass(frozen=True)
class Resumption:
    """What became of a checkpoint in a layout.

    Attributes:
        saved_by: The layout that saved it.
        loaded_by: The layout that loaded it.
        differing: Names of what the checkpoint, saved again before any step, does not hold as it was: bit for bit.
        loss_difference: Largest relative difference of a loss afterwards from that of the run that never stopped.
    """

    saved_by: Layout
    loaded_by: Layout
    differing: list[str]
    loss_difference: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.saved_by.name} -> {self.loaded_by.name}"


def save_in_layouts(layouts: Sequence[Layout], folder: Path) -> dict[Layout, Origin]:
    """Train, save and go on, once in each layout."""
    tasks = {layout: [{"save_to": str(folder / layout.name)}] for layout in layouts}
    found = _run(tasks, folder)
    return {layout: Origin(layout, Path(done[0]["saved"]), done[0]["losses"]) for layout, done in found}


def resume_in_layouts(
    pairs: Iterable[tuple[Origin, Layout]], folder: Path, done: Callable[[Resumption], object] = lambda _: None
) -> list[Resumption]:
    """Load each checkpoint in a layout, save it again, and go on.

    Args:
        pairs: Which ones where.
        folder: For what is saved again.
        done: Told of each.
    """
    origins: dict[Layout, list[Origin]] = {}
    for origin, layout in pairs:
        origins.setdefault(layout, []).append(origin)
    tasks = {
        layout: [
            {"load": str(one.checkpoint), "save_to": str(folder / f"{one.layout.name}-{layout.name}")} for one in these
        ]
        for layout, these in origins.items()
    }
    results = []
    for layout, found in _run(tasks, folder):
        for origin, one in zip(origins[layout], found, strict=True):
            away = [abs(a - b) / abs(b) for a, b in zip(one["losses"], origin.losses[NUM_STEPS:], strict=True)]
            # max() would pass over a NaN.
            difference = max(away) if all(map(math.isfinite, away)) else math.inf
            results.append(
                Resumption(origin.layout, layout, differing(origin.checkpoint, Path(one["saved"])), difference)
            )
            done(results[-1])
    return results


def whole_state(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint holds of the training: whole tensors, put together here and not by what is tested."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    kept = ("step", "consumed_sequences", "optimizer_step", "loss_scale", "buffers", "tensors")
    state = {name: manifest[name] for name in kept}
    for name, shape in manifest["tensors"].items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            # A pattern that no value has, so that an element that is missing differs from one that is there.
            state[f"{kind}/{name}"] = np.full(math.prod(shape), 0xFFFFFFFF, dtype=np.uint32)
    for file, entry in manifest["files"].items():
        for full_name, values in load_file(checkpoint / file).items():
            start, numel = entry["ranges"][full_name.partition("/")[2]]
            state[full_name][start : start + numel] = values.view(np.uint32)
    return state


def differing(a: Path, b: Path) -> list[str]:
    """Names of what two checkpoints do not hold alike."""
    ours, theirs = whole_state(a), whole_state(b)
    names = sorted(ours.keys() | theirs.keys())
    return [name for name in names if not _is_same(ours.get(name), theirs.get(name))]


def _is_same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a == b)


def _run(tasks: Mapping[Layout, Sequence[Any]], folder: Path) -> Iterator[tuple[Layout, list[Any]]]:
    """Do the tasks of each layout; the results in the order of the tasks, when they are there."""
    waiting: list[list[Layout]] = []  # what shares its processes
    for layout in tasks:
        same = waiting[-1] if waiting else []
        num_engines = sum(len(tasks[each]) for each in [*same, layout])
        if same and replace(same[0], zero_stage=layout.zero_stage) == layout and num_engines <= MOST_ENGINES:
            same.append(layout)
        else:
            waiting.append([layout])
    groups: list[list[list[Layout]]] = []
    while waiting:  # at the same time, what has few ranks together
        groups.append([waiting.pop(0)])
        while waiting and sum(same[0].world_size for same in [*groups[-1], waiting[0]]) <= MOST_RANKS:
            groups[-1].append(waiting.pop(0))
    for group in groups:
        results = [folder / f"{same[0].name}.results" for same in group]
        ranks = [_start(same, tasks, file) for same, file in zip(group, results)]
        for result in wait_for_all([rank for world in ranks for rank in world], TIMEOUT_SECONDS):
            if result.returncode:
                raise RuntimeError(f"a rank ended with code {result.returncode}:\n{result.stderr[-3000:]}")
        for same, file in zip(group, results):
            done = iter(json.loads(file.read_text()))
            yield from ((layout, [next(done) for _ in tasks[layout]]) for layout in same)


def _start(same: Sequence[Layout], tasks: Mapping[Layout, Sequence[Any]], results: Path) -> list[ForkedRank]:
    """The ranks of layouts that differ in their ZeRO stage alone."""
    in_a_row = [{"zero_stage": layout.zero_stage, **task} for layout in same for task in tasks[layout]]
    arguments = [json.dumps(asdict(same[0])), json.dumps(in_a_row), str(results)]
    environments = local_rank_environments(same[0].world_size)
    return [fork_server().start(f"{__name__}:run_rank", arguments, each, ROOT) for each in environments]


def run_rank(arguments: Sequence[str]) -> int:
    """A rank: does the tasks; rank 0 writes the results."""
    from tests.checkpoint.layout_training import LayoutTraining

    layout, tasks, results = Layout(**json.loads(arguments[0])), json.loads(arguments[1]), Path(arguments[2])
    training = LayoutTraining([*_MODEL, *layout.options()], _VOCAB_SIZE)
    done = [training.perform(NUM_STEPS, **task) for task in tasks]
    if training.world.rank == 0:
        results.write_text(json.dumps(done))
    training.leave()
    return 0
