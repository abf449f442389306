"""Cases of the truth benchmark: systems, the model that they train, layouts, and what a system does not offer."""

import json
import re
from dataclasses import asdict, dataclass

from benchmarks.runner.resolved import BYTES
from benchmarks.train.rows import AUTOEP, OURS
from moe_train.config.errors import UsageError
from moe_train.train.parity import GLOBAL_BATCH, NUM_STEPS, Layout

HF, DEEPSPEED_MOE = "hf_zero", "deepspeed_moe"
SYSTEMS = (OURS, AUTOEP, DEEPSPEED_MOE, HF)
TITLES = {
    OURS: "moe_train",
    AUTOEP: "DeepSpeed AutoEP",
    DEEPSPEED_MOE: "DeepSpeed MoE",
    HF: "Hugging Face under ZeRO",
}
# With `balance`, each system's own balance loss with one coefficient; with `plain`, the cross-entropy alone.
TERMS = {"plain": 0.0, "balance": 0.01}
STAGES, ACCUMULATIONS = (0, 1, 2, 3), (1, 2, 4)
_PLACES = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))  # ranks, and those of them that share the experts
SAVED_AFTER = NUM_STEPS // 2  # steps
_LEARNING_RATE = 1e-3
NUDGED = f"--optim.learning_rate={_LEARNING_RATE * (1 + 1e-6)}"  # of the control

OPTIONS = (
    "--model.hidden_size=64",
    "--model.num_layers=2",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    f"--model.vocab_size={BYTES}",
    "--model.init_std=0.1",  # large enough for routers whose loads differ
    "--model.moe_every=1",
    "--model.moe.num_experts=8",
    "--model.moe.top_k=2",
    "--model.moe.intermediate_size=64",
    # Mixtral's router, which all systems have
    "--model.moe.router=softmax_topk",
    "--model.moe.renormalize_gates=true",
    "--model.moe.importance_cv2_coef=0",
    "--data.source=synthetic",
    "--parallel.device=cpu",
    "--parallel.threads_per_rank=1",
    f"--optim.learning_rate={_LEARNING_RATE}",
    "--optim.weight_decay=0",  # systems differ in what they let decay
    "--optim.schedule=constant",
    "--optim.warmup_steps=0",
    "--optim.max_grad_norm=0.5",  # so that clipping acts, and with it the norm
    "--train.sequence_length=64",
    "--train.precision=fp32",
    "--train.sample_tokens=0",
    # With some seeds a token of one step is so near to two experts that rounding decides: the control tells.
    "--train.seed=2",
    "--telemetry.tensorboard=false",
    "--telemetry.every=1",
)
CONTROL = "control"  # code of the control
_ASKED_FOR = "https://github.com/deepspeedai/DeepSpeed/issues/5716"
_CODE = re.compile(r"([124])x([124])z([0-3])a(\d+)")


@dataclass(frozen=True)
class Case:
    """What a system is asked to do.

    Attributes:
        layout: Layout of the run, or of its second half.
        saved_by: Layout of the first half, whose checkpoint the second half loads; None: one run without a stop.
        is_control: Whether the learning rate is a millionth larger. What that changes is what rounding may change.
    """

    layout: Layout
    saved_by: Layout | None = None
    is_control: bool = False

    @property
    def code(self) -> str:
        """Short name: "4x2z3a2" is 4 ranks, EP 2, ZeRO 3, accumulation 2; "A-B" is saved by A, loaded by B."""
        if self.is_control:
            return CONTROL
        own = code_of(self.layout)
        return own if self.saved_by is None else f"{code_of(self.saved_by)}-{own}"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """All layouts of the case, in their order."""
        return (self.layout,) if self.saved_by is None else (self.saved_by, self.layout)


def code_of(layout: Layout) -> str:
    """Make the short name of a layout."""
    return f"{layout.world_size}x{layout.expert_parallel_size}z{layout.zero_stage}a{layout.accumulation}"


def read_case(code: str) -> Case:
    """Read the short name of a case.

    Raises:
        UsageError: If it is no name of a case.
    """
    if code == CONTROL:
        return Case(REFERENCE, is_control=True)
    found = [_CODE.fullmatch(part) for part in code.split("-")]
    if not 1 <= len(found) <= 2 or None in found:
        raise UsageError(
            f"--cases ({code!r}) must be RANKSxEPzSTAGEaACCUMULATION, as 4x2z3a2, two such names joined by '-' "
            f"(saved by the first, loaded by the second), or {CONTROL}"
        )
    layouts = [Layout(*map(int, each.groups())) for each in found if each is not None]
    for layout in layouts:
        if layout.world_size % layout.expert_parallel_size or GLOBAL_BATCH % (layout.world_size * layout.accumulation):
            raise UsageError(
                f"--cases ({code!r}): ranks ({layout.world_size}) must be divisible by EP "
                f"({layout.expert_parallel_size}), and {GLOBAL_BATCH} sequences by ranks x accumulation"
            )
    return Case(layouts[-1], layouts[0] if len(layouts) == 2 else None)


# Zero stage 1 of one process without accumulation is what the others are compared with.
REFERENCE = Layout(1, 1, 1, 1)
GRID = tuple(
    Case(Layout(*place, stage, accumulation)) for accumulation in ACCUMULATIONS for place in _PLACES for stage in STAGES
)
# A slice of the grid: each (ranks, EP) with several stages, each accumulation with each stage.
SLICE = (
    *("1x1z0a1", "1x1z3a1", "2x1z0a1", "2x1z1a1", "2x1z2a1", "2x1z3a1", "2x2z0a1", "2x2z1a1", "2x2z2a1", "2x2z3a1"),
    *("4x1z1a1", "4x2z0a1", "4x2z1a1", "4x2z2a1", "4x2z3a1", "4x4z1a1", "4x4z3a1"),
    *("2x2z0a2", "4x2z1a2", "4x4z2a2", "2x1z3a2", "4x1z0a4", "1x1z1a4", "2x2z2a4", "4x2z3a4"),
)
BALANCE_SLICE = ("1x1z0a1", "1x1z1a2", "1x1z1a4", "2x1z1a1", "2x2z2a1", "4x2z1a1", "4x2z3a2")
# As it was; fewer ranks; more; another accumulation; another ZeRO stage; another EP on as many ranks, and on others.
RESUMES = tuple(
    read_case(code)
    for code in (
        "2x1z1a1-2x1z1a1",
        "2x1z1a1-1x1z1a2",
        "2x1z1a1-4x1z1a1",
        "2x1z1a1-2x1z3a1",
        "2x1z3a1-4x1z3a1",
        "2x1z3a1-2x1z1a1",
        "2x2z1a1-2x2z1a1",
        "2x2z1a1-1x1z1a1",
        "2x2z1a1-2x1z1a1",
        "2x2z1a1-4x2z1a1",
        "2x2z1a1-4x4z2a1",
        "2x2z1a1-2x2z3a1",
        "4x2z3a1-2x2z3a1",
        "4x2z3a1-4x4z3a1",
        "4x2z3a1-2x1z2a1",
    )
)


def default_cases(terms: str, whole: bool) -> tuple[Case, ...]:
    """List the cases of a set of losses: layouts, and with the cross-entropy alone also what goes on elsewhere.

    Args:
        terms: Name of the losses.
        whole: Whether every layout of the grid is taken.
    """
    # Where the balance loss depends on the layout, a run that goes on in another one could not be told from one that
    # lost something.
    resumes = RESUMES if terms == "plain" else ()
    chosen = GRID if whole else tuple(map(read_case, SLICE if terms == "plain" else BALANCE_SLICE))
    return (read_case(CONTROL), *chosen, *resumes)


def not_offered(system: str, case: Case) -> str | None:
    """Say why a system does not offer a case; None: it does, by its documentation or its options.

    Args:
        system: Name of the system.
        case: What it would be asked to do.
    """
    for layout in case.layouts:
        if system == OURS and layout.zero_stage == 0:
            return "no ZeRO 0: its stages are 1, 2 and 3"
        if system == HF and layout.expert_parallel_size > 1:
            return "no expert parallelism without AutoEP"
        if system == DEEPSPEED_MOE and layout.zero_stage == 3:
            return "no ZeRO 3: DeepSpeed says so and names AutoEP"
    if system == OURS or case.saved_by is None or code_of(case.saved_by) == code_of(case.layout):
        return None
    if (case.saved_by.zero_stage == 3) != (case.layout.zero_stage == 3):
        return "no checkpoint from ZeRO 1 or 2 to 3 or back: its documentation has a change of ranks and of EP"
    if system == DEEPSPEED_MOE and max(layout.expert_parallel_size for layout in case.layouts) > 1:
        return f"no universal checkpoint of experts on several ranks; asked for in {_ASKED_FOR}"
    return None


@dataclass(frozen=True)
class Task:
    """Some steps of a peer's run, for its ranks.

    Attributes:
        system: Name of the system.
        layout: Layout of the run.
        first: First step, from 1.
        last: Last step.
        records: File for the records of the steps.
        weights: File for the weights after the last step.
        save: Folder for a checkpoint after the last step; empty: none.
        load: Folder of the checkpoint to begin with; empty: none.
        is_universal: Whether that checkpoint is in DeepSpeed's universal form.
    """

    system: str
    layout: Layout
    first: int
    last: int
    records: str
    weights: str
    save: str = ""
    load: str = ""
    is_universal: bool = False

    def as_json(self) -> str:
        """Write the task for a command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Task":
        """Read what `as_json` wrote."""
        values = json.loads(text)
        return Task(**values | {"layout": Layout(**values["layout"])})
