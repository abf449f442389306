"""Rows of the plan_check benchmark: what is planned and run, and how far the plan is from it."""

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.runner.processes import ROOT, rank_places, run_ranks
from moe_train.config.load import load_config
from moe_train.config.machine import Machine, read_machine
from moe_train.plan.layout import Cluster
from moe_train.plan.planner import Plan, Question, make_plan

MOST_OFF = {"states": 0.03, "peak": 0.15, "seconds": 0.25}
VOCABULARY = 2048
STEPS_PER_RECORD = 4  # a record has their mean time
MEMORY_STEPS = 3
WARM_UP_STEPS = STEPS_PER_RECORD  # of a training run; they are not timed
EXPECTED_GIGABYTES = 0.5  # per second between nodes: more than any line of the settings, less than no line
_TIMEOUT_SECONDS = 900  # of one group of ranks
# DeepSpeed's own bucket is 2 GB, which would be most of the peak of models as small as these.
_BUCKET_ELEMENTS = 1_000_000
_COMMON = {
    "model.vocab_size": VOCABULARY,
    "data.source": "python_stdlib",
    "data.tokenizer": "bytes",
    "data.validation_fraction": 0.0,
    "parallel.device": "cpu",
    "parallel.threads_per_rank": 1,
    "optim.warmup_steps": 0,
    "optim.schedule": "constant",
    "train.precision": "fp32",
    "train.sample_tokens": 0,
    "telemetry.every": STEPS_PER_RECORD,
    "telemetry.tensorboard": False,
}
_QUICKSTART = {
    "model.hidden_size": 128,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.intermediate_size": 384,
    "train.sequence_length": 128,
}
_LARGER = {
    "model.hidden_size": 256,
    "model.num_heads": 4,
    "model.moe_every": 1,
    "model.moe.intermediate_size": 512,
    "train.sequence_length": 256,
    "train.micro_batch_size": 4,
}
_LARGEST = _LARGER | {
    "model.hidden_size": 512,
    "model.num_heads": 8,
    "model.num_layers": 3,
    "model.moe.intermediate_size": 768,
}


@dataclass(frozen=True)
class Place:
    """Where ranks run.

    Attributes:
        ranks: Number of processes.
        nodes: Network namespaces among which they are divided; 1: there is no network between them.
        link_mbit: Megabits per second of each node's line.
    """

    ranks: int
    nodes: int
    link_mbit: float

    def __str__(self) -> str:
        return str(self.ranks) + (f", {self.nodes} nodes, {self.link_mbit:g} Mbit/s" if self.nodes > 1 else "")


@dataclass(frozen=True)
class Setting:
    """Something to plan and to run.

    Attributes:
        name: Name of its row.
        ranks: Processes of this machine.
        fields: Fields of the configuration, beside what all have in common.
        nodes: Network namespaces among which the ranks are divided; 1: there is no network between them.
        link_mbit: Megabits per second of each node's line.
    """

    name: str
    ranks: int
    fields: dict[str, Any] = field(hash=False)
    nodes: int = 1
    link_mbit: float = 0.0

    @property
    def place(self) -> Place:
        """Where it runs: the doctor examines each place, for all settings that have it in common."""
        return Place(self.ranks, self.nodes, self.link_mbit)

    def options(self, run_dir: Path, steps: int) -> list[str]:
        """Options of `moe-train train`."""
        values = _COMMON | self.fields | {"train.run_dir": str(run_dir), "train.steps": steps}
        zero = json.dumps({"zero_optimization": {"reduce_bucket_size": _BUCKET_ELEMENTS}})
        return [*(f"--{name}={value}" for name, value in values.items()), f"--deepspeed={zero}"]


def _setting(
    name: str, ranks: int, base: dict[str, Any], nodes: int = 1, link_mbit: float = 0.0, **fields: Any
) -> Setting:
    given = {f"{section}.{key}": value for section, values in fields.items() for key, value in values.items()}
    return Setting(name, ranks, base | given, nodes, link_mbit)


SETTINGS = (
    _setting("quickstart_1", 1, _QUICKSTART, parallel={"zero_stage": 1}),
    _setting("quickstart_2", 2, _QUICKSTART, parallel={"zero_stage": 1, "expert_parallel_size": 2}),
    _setting("quickstart_4", 4, _QUICKSTART, parallel={"zero_stage": 2, "expert_parallel_size": 4}),
    _setting("larger_1", 1, _LARGER, parallel={"zero_stage": 2}),
    _setting("larger_1_accumulates", 1, _LARGER, parallel={"zero_stage": 1}, train={"global_batch_size": 8}),
    *(
        _setting(f"larger_1_recomputes_{part}", 1, _LARGER, train={"recompute": part, "micro_batch_size": 8})
        for part in ("attention", "experts", "block")
    ),
    _setting("larger_2_flat", 2, _LARGER, parallel={"zero_stage": 1, "expert_parallel_size": 2}),
    _setting("larger_2_dense", 2, _LARGER, parallel={"zero_stage": 2, "expert_parallel_size": 1}),
    _setting(
        "larger_2_unique",
        2,
        _LARGER,
        parallel={"zero_stage": 2, "expert_parallel_size": 2, "dispatch": "unique"},
        model={"moe.num_experts": 16, "moe.top_k": 4, "moe.intermediate_size": 256},
    ),
    _setting("larger_2_zero3", 2, _LARGER, parallel={"zero_stage": 3, "expert_parallel_size": 2}),
    _setting("larger_4_zero3", 4, _LARGER, parallel={"zero_stage": 3, "expert_parallel_size": 2}),
    _setting("largest_1", 1, _LARGEST, parallel={"zero_stage": 1}),
    _setting("largest_2_recomputes", 2, _LARGEST, parallel={"zero_stage": 1}, train={"recompute": "block"}),
    _setting(
        "largest_4", 4, _LARGEST, parallel={"expert_parallel_size": 4, "chunks": 2}, train={"micro_batch_size": 2}
    ),
    _setting("link_2_flat", 2, _LARGER, nodes=2, link_mbit=200.0, parallel={"expert_parallel_size": 2}),
    _setting("link_2_dense", 2, _LARGER, nodes=2, link_mbit=200.0, parallel={"expert_parallel_size": 1}),
    _setting("link_4_flat", 4, _LARGER, nodes=2, link_mbit=300.0, parallel={"expert_parallel_size": 4}),
    _setting(
        "link_4_two_level",
        4,
        _LARGER,
        nodes=2,
        link_mbit=300.0,
        parallel={"expert_parallel_size": 4, "dispatch": "two_level", "chunks": 2},
        model={"moe.num_experts": 16, "moe.top_k": 4, "moe.intermediate_size": 256},
    ),
)


@dataclass(frozen=True)
class Measured:
    """What a setting took; bytes and times of the rank with most.

    Attributes:
        states: Bytes of weights, master weights and moments.
        peak: Most bytes of tensors at one time.
        all_to_all: Bytes to other ranks in all-to-alls of a step, mean over ranks.
        seconds: Median time of a step.
    """

    states: int
    peak: int
    all_to_all: float
    seconds: float


@dataclass(frozen=True)
class RowResult:
    """A row of the table.

    Attributes:
        name: Name of the setting.
        ranks: Number of processes, and the nodes and lines between them, in words.
        layout: Planned layout, by the names of the configuration.
        planned: Planned figures, by the names of `Measured`.
        measured: Measured figures, by the same names.
        off: Planned over measured, minus 1, by the same names.
        largest_term: Largest term of the planned step.
    """

    name: str
    ranks: str
    layout: dict[str, Any]
    planned: dict[str, float]
    measured: dict[str, float]
    off: dict[str, float]
    largest_term: str


def measure_machine(place: Place, folder: Path) -> tuple[Machine, bool]:
    """Measure this machine as the ranks of a place see it, by `moe-train doctor`.

    Returns:
        What it measured, and whether it names a line between nodes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "machine.json"
    doctor = ["-m", "moe_train", "doctor", "--output", str(output), "--shared-dir", str(folder), "--timeout", "60"]
    doctor += [f"--expect-bandwidth={EXPECTED_GIGABYTES}"] if place.nodes > 1 else []
    # Exit code 1: it names a slow rank or line, and has measured.
    _run("moe-train doctor", doctor, place, folder / "logs", allowed=(0, 1))
    problems = json.loads(output.read_text(encoding="utf-8"))["problems"]
    return read_machine(output), any(problem["kind"] == "link" for problem in problems)


def measure(setting: Setting, steps: int, folder: Path) -> Measured:
    """Measure memory, bytes and step time of a setting.

    Args:
        setting: What to run.
        steps: Timed steps of a training run, a multiple of STEPS_PER_RECORD.
        folder: For its files.
    """
    memory, run = (folder / f"{setting.name}_{what}" for what in ("memory", "run"))
    counting = ["-m", "benchmarks.plan_check.memory", str(memory), str(MEMORY_STEPS)]
    counting += setting.options(folder / "unused", MEMORY_STEPS)
    _run(f"{setting.name}, memory", counting, setting.place, memory)
    files = [memory / f"{rank}.json" for rank in range(setting.ranks)]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    training = [str(ROOT / "launch" / "train.py"), *setting.options(run, WARM_UP_STEPS + steps)]
    _run(setting.name, training, setting.place, folder / f"{setting.name}_logs")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [record["perf/step_ms"] / 1e3 for record in records if record["step"] > WARM_UP_STEPS]
    shutil.rmtree(run)
    return Measured(
        states=max(each["states"] for each in found),
        peak=max(each["peak"] for each in found),
        all_to_all=statistics.mean(each["all_to_all"] for each in found),
        seconds=statistics.median(seconds),
    )


def _run(name: str, program: Sequence[str], place: Place, logs: Path, allowed: Sequence[int] = (0,)) -> None:
    with rank_places(place.ranks, place.nodes, place.link_mbit) as places:
        run_ranks(name, program, places, logs, _TIMEOUT_SECONDS, allowed)


def plan_setting(setting: Setting, machine: Machine) -> Plan:
    """Plan a setting on this machine."""
    config = load_config(setting.options(Path("unused"), 1), program="benchmarks.plan_check")
    return make_plan(config, VOCABULARY, Question(Cluster(setting.nodes, setting.ranks // setting.nodes, machine)))


def result_row(setting: Setting, plans: Sequence[Plan], measured: Measured) -> RowResult:
    """Row of the table for a setting.

    Args:
        setting: Setting that was run.
        plans: Plans for the machine as it was measured at several times. They differ in the time of a step, whose mean
            counts.
        measured: Figures of the run.
    """
    plan = plans[0]
    parts = plan.traffic.parts
    states = plan.memory.states
    planned = {
        "states": float(states.weights + states.optimizer_states),
        "peak": plan.memory.total,
        "all_to_all": parts["all_to_all_forward"].total + parts["all_to_all_backward"].total,
        "seconds": statistics.mean(each.step.seconds for each in plans),
    }
    found = asdict(measured)
    off = {name: value / found[name] - 1 if found[name] else 0.0 for name, value in planned.items()}
    return RowResult(
        setting.name, str(setting.place), plan.layout_fields(), planned, found, off, plan.step.largest_term
    )


def claims_of(rows: Sequence[RowResult], slow_lines: dict[str, bool] | None = None) -> list[dict[str, Any]]:
    """What the benchmark is to show, and whether this run of it does.

    Args:
        rows: Rows of the table.
        slow_lines: Whether the doctor named the line of each place that has one.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    words = {"states": "Model states", "peak": "Peak memory", "seconds": "Step time"}
    claims = []
    for name, most in MOST_OFF.items():
        worst = max(rows, key=lambda row: abs(row.off[name]))
        text = f"{words[name]} planned within {most:.0%} in all {len(rows)} settings: at most {worst.off[name]:+.1%}"
        claims.append({"claim": f"{text} ({worst.name}).", "holds": abs(worst.off[name]) <= most})
    for place, named in (slow_lines or {}).items():
        claims.append({"claim": f"The doctor names the slow line of ranks: {place}.", "holds": named})
    return claims
