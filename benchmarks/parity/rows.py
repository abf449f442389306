"""The product of routers, balance terms and layouts, its runs, and their comparison with one process.

`train_all` starts the ranks of a layout as processes of their own, forked with all imports done. Engines of one number
of ranks and one expert-parallel size follow one another there (DeepSpeed keeps groups by the expert-parallel size).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner.processes import ROOT
from moe_train.cli.parity import TRAINING_MODULES
from moe_train.distributed.bootstrap import local_rank_environments
from moe_train.launch.fork_server import ForkServer, wait_for_all
from moe_train.train.parity import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE

NUM_STEPS = 20
GLOBAL_BATCH = 64  # sequences: 4 ranks with 16 micro-batches have one each
GRADIENT_TOLERANCE = 1e-3  # of a router's map, in relative norm: that of the gradient norm
MOST_ENGINES = 16  # that follow one another in a process: each leaves its groups, and their threads, behind
_MOST_RANKS = 4  # at the same time
_TIMEOUT_SECONDS = 1800  # for the ranks that run at the same time

_ROUTERS = {
    # The load's gradient grows with one over the noise's deviation, and jumps where two noisy logits change places.
    # With the usual 0.01 a rounding becomes 1e-2 of it within 20 steps, and no fault could be told from that.
    "noisy_topk": ("--model.moe.noise_epsilon=0.3",),
    "softmax_topk": (),
    "sigmoid_topk": ("--model.moe.num_groups=4", "--model.moe.top_k_groups=2"),
    "switch": ("--model.moe.top_k=1",),
}
# Weights that are felt beside the task. Every term is alone once, so that none hides another; "all" has them together.
_WEIGHTS = {
    "importance": {"importance_cv2_coef": 0.3},
    "load": {"load_cv2_coef": 0.3},
    "switch": {"switch_aux_coef": 0.1},
    "sequence": {"switch_aux_coef": 0.1, "switch_scope": "sequence"},
    "z_loss": {"z_loss_coef": 0.01},
    "bias": {"bias_update_rate": 0.001},
}
_OF_A_MICRO_STEP = {
    "importance of a micro-step": {"importance_cv2_coef": 0.3, "balance_scope": "micro_step"},
    "switch of a micro-step": {"switch_aux_coef": 0.1, "switch_scope": "global"},
}


@dataclass(frozen=True)
class Case:
    """A router and what balances it.

    Attributes:
        router: Name of the router.
        term: Name of the balance term, or "all".
    """

    router: str
    term: str

    @property
    def name(self) -> str:
        """Name for people."""
        return f"{self.router}, {self.term}"

    @property
    def needs_one_micro_step(self) -> bool:
        """Whether the term is over a micro-step, so that only layouts with the same micro-steps are alike."""
        return self.term in _OF_A_MICRO_STEP

    def options(self) -> list[str]:
        """Training options."""
        weights = {"importance_cv2_coef": 0.0, "load_cv2_coef": 0.0}
        if self.term == "all":
            for term, each in _WEIGHTS.items():
                if term != "sequence" and (term != "load" or self.router == "noisy_topk"):
                    weights |= each
        else:
            weights |= (_WEIGHTS | _OF_A_MICRO_STEP)[self.term]
        chosen = [f"--model.moe.{name}={value}" for name, value in weights.items()]
        return [f"--model.moe.router={self.router}", *_ROUTERS[self.router], *chosen]


@dataclass(frozen=True)
class Layout:
    """One way to spread a run.

    Attributes:
        world_size: Ranks.
        expert_parallel_size: Ranks that share the experts.
        zero_stage: Stage of DeepSpeed ZeRO.
        accumulation: Micro-steps of a step.
    """

    world_size: int = 1
    expert_parallel_size: int = 1
    zero_stage: int = 1
    accumulation: int = 1

    @property
    def name(self) -> str:
        """Name for people."""
        return (
            f"{self.world_size} ranks, EP {self.expert_parallel_size}, ZeRO {self.zero_stage}, "
            f"accumulation {self.accumulation}"
        )


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        case: Router and balance terms.
        layout: Layout.
        parts_factor: Factor by which balance terms get a wrong number of parts: 1, unless a test asks for the fault.
        tokens_factor: Factor by which they get a wrong number of tokens.
    """

    case: Case
    layout: Layout
    parts_factor: int = 1
    tokens_factor: int = 1

    @property
    def name(self) -> str:
        """Name for people."""
        return f"{self.case.name}: {self.layout.name}"


@dataclass(frozen=True)
class Trace:
    """What a run leaves: a value for every step.

    Attributes:
        losses: train/loss.
        norms: Gradient norm.
        cv2: CV^2 of the importance over the step, mean over layers.
        gradients: Gradient of each map of the routers, [steps, elements], by its name.
    """

    losses: np.ndarray
    norms: np.ndarray
    cv2: np.ndarray
    gradients: dict[str, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """Largest relative differences of a run from that of one process, over all steps.

    Attributes:
        task: The run.
        loss: Difference of the loss.
        norm: Difference of the gradient norm.
        gradient: Difference of the gradient of a router's map, as a norm.
    """

    task: Task
    loss: float
    norm: float
    gradient: float

    @property
    def passed(self) -> bool:
        """Whether all are rounding."""
        return self.loss <= LOSS_TOLERANCE and self.norm <= GRAD_NORM_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


REFERENCE = Layout()
ACCUMULATIONS = (1, 2, 4, 16)
# Each number of ranks with an EP size and a ZeRO stage of its own; 4 ranks also with all experts shared.
PLACEMENTS = (Layout(), Layout(2, 2, 2), Layout(4, 2, 3), Layout(4, 4, 1))


def cases_of(routers: Sequence[str]) -> list[Case]:
    """List the cases of some routers: each term alone, and all of them."""
    cases = []
    for router in routers:
        terms = [*_WEIGHTS, "all", *(_OF_A_MICRO_STEP if router == "noisy_topk" else ())]
        cases += [Case(router, term) for term in terms if term != "load" or router == "noisy_topk"]
    return cases


def all_routers() -> tuple[str, ...]:
    """Return the names of the routers."""
    return tuple(_ROUTERS)


def product(routers: Sequence[str]) -> list[Task]:
    """List all runs: each case in every placement, and with all terms in every EP size and ZeRO stage."""
    tasks = []
    for case in cases_of(routers):
        placements = list(PLACEMENTS)
        if case.term == "all":
            placements = [Layout(n, ep, zero) for n in (1, 2, 4) for ep in (1, 2, 4) if ep <= n for zero in (1, 2, 3)]
        accumulations = ACCUMULATIONS[:1] if case.needs_one_micro_step else ACCUMULATIONS
        for place in placements:
            size = (place.world_size, place.expert_parallel_size, place.zero_stage)
            tasks += [Task(case, Layout(*size, accumulation)) for accumulation in accumulations]
    return tasks


def compare(task: Task, trace: Trace, reference: Trace) -> Comparison:
    """Compare a run with that of one process."""
    gradient = max(
        _worst(np.linalg.norm(found - reference.gradients[name], axis=1), _norms(reference.gradients[name]))
        for name, found in trace.gradients.items()
    )
    loss = _worst(trace.losses - reference.losses, reference.losses)
    return Comparison(task, loss, _worst(trace.norms - reference.norms, reference.norms), gradient)


def _norms(gradients: np.ndarray) -> np.ndarray:
    return np.linalg.norm(gradients, axis=1)


def _worst(differences: np.ndarray, expected: np.ndarray) -> float:
    worst = float((np.abs(differences) / np.abs(expected)).max())
    return worst if np.isfinite(worst) else float("inf")


def train_all(
    tasks: Sequence[Task], folder: Path, server: ForkServer, num_steps: int = NUM_STEPS
) -> Iterator[tuple[Task, Trace]]:
    """Train every task, those of one number of ranks and EP size after one another in the same processes.

    Args:
        tasks: The runs.
        folder: For the results.
        server: Fork server of the ranks, from `make_server`.
        num_steps: Steps of each run.

    Yields:
        Each task with what its run left, when it is there.

    Raises:
        RuntimeError: If a rank fails.
    """
    by_size: dict[tuple[int, int], list[Task]] = {}
    for task in tasks:
        by_size.setdefault((task.layout.world_size, task.layout.expert_parallel_size), []).append(task)
    batches = [same[i : i + MOST_ENGINES] for same in by_size.values() for i in range(0, len(same), MOST_ENGINES)]
    while batches:
        together = [batches.pop(0)]
        while batches and sum(_ranks(each) for each in (*together, batches[0])) <= _MOST_RANKS:
            together.append(batches.pop(0))
        folders = [folder / f"{len(batches)}_{number}" for number in range(len(together))]
        ranks = []
        for each, place in zip(together, folders, strict=True):
            place.mkdir(parents=True)
            arguments = [json.dumps([asdict(task) for task in each]), str(num_steps), str(place)]
            for environment in local_rank_environments(_ranks(each)):
                ranks.append(server.start("benchmarks.parity.rank:run_rank", arguments, environment, ROOT))
        for result in wait_for_all(ranks, _TIMEOUT_SECONDS):
            if result.returncode:
                raise RuntimeError(f"a rank ended with code {result.returncode}:\n{result.stderr[-3000:]}")
        for each, place in zip(together, folders, strict=True):
            yield from ((task, read_trace(place / f"{number}.npz")) for number, task in enumerate(each))


def compare_all(
    tasks: Sequence[Task],
    folder: Path,
    num_steps: int,
    done: Callable[[Comparison], object] = lambda _: None,
    *,
    server: ForkServer,
) -> list[Comparison]:
    """Train every task, and compare it with its case in one process and one micro-batch.

    Args:
        tasks: The runs; those that they are compared with are added.
        folder: For the results.
        num_steps: Steps of each run.
        done: Told of each comparison.
        server: Fork server of the ranks.
    """
    references = list(dict.fromkeys(Task(task.case, REFERENCE) for task in tasks))
    found = []
    known = {task.case: trace for task, trace in train_all(references, folder / "references", server, num_steps)}
    others = [task for task in tasks if task not in references]
    for task, trace in train_all(others, folder / "others", server, num_steps):
        found.append(compare(task, trace, known[task.case]))
        done(found[-1])
    return found


def make_server() -> ForkServer:
    """Start the fork server of the ranks."""
    return ForkServer(TRAINING_MODULES, local_rank_environments(1)[0])


def write_trace(file: Path, trace: Trace) -> None:
    """Write what a run left."""
    named: dict[str, Any] = {f"gradients/{name}": values for name, values in trace.gradients.items()}
    np.savez(file, losses=trace.losses, norms=trace.norms, cv2=trace.cv2, **named)


def read_trace(file: Path) -> Trace:
    """Read what a run left."""
    with np.load(file) as found:
        gradients = {
            name.removeprefix("gradients/"): found[name] for name in found.files if name.startswith("gradients/")
        }
        return Trace(found["losses"], found["norms"], found["cv2"], gradients)


def _ranks(tasks: Sequence[Task]) -> int:
    return tasks[0].layout.world_size
