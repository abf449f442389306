"""Rows of the train benchmark: sizes, runs of each system, what was measured of them, and what that shows.

Each run is a fresh group of ranks on the CPUs of this machine, joined by gloo. moe_train is launch/train.py with its
telemetry, TensorBoard, watchdog and checkpoint, as anyone starts it. The ranks of the peers are peers.py.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner.processes import ROOT, RunFailed, rank_places, run_ranks
from benchmarks.runner.rounds import quartiles, round_ratios

OURS, ZERO1, AUTOEP = "moe_train", "hf_zero1", "hf_autoep"
PEERS = (ZERO1, AUTOEP)
# Forms of the experts: transformers' experts_implementation, without batched_mm, which copies an expert's weights for
# every token; and AutoEP's gate_up_impl.
FORMS = {ZERO1: ("grouped_mm", "eager"), AUTOEP: ("fused", "separate")}
LEAST_GAIN = 1.5  # over each peer
GAIN_FROM_RANKS = 2
WARM_UP_STEPS = 10  # of every run; they are not timed
STEPS_PER_RECORD = 5  # of our trainer; its default is 10, so it writes twice as much as usual
_TIMEOUT_SECONDS = 1800  # of one run
_TRIAL_WARM_UP, _TRIAL_STEPS = 2, 3


@dataclass(frozen=True)
class Setting:
    """What all systems have in common.

    Attributes:
        hidden: hidden_size.
        layers: Blocks, each with an MoE layer.
        heads: Query heads.
        kv_heads: Key and value heads.
        experts: Experts of one layer, over all ranks.
        top_k: Experts of a token.
        inner: intermediate_size of an expert.
        vocabulary: Entries of the tokenizer and rows of the embedding.
        sequence: Tokens of a sequence.
        micro_batch: Sequences of a rank in a step.
        ranks: Number of processes.
        threads: Threads of a rank.
        dtype: bf16 or fp32.
        steps: Timed steps of a run.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    inner: int
    vocabulary: int
    sequence: int
    micro_batch: int
    ranks: int
    threads: int
    dtype: str
    steps: int

    @property
    def global_batch(self) -> int:
        """Sequences of a step, over all ranks."""
        return self.micro_batch * self.ranks

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.global_batch * self.sequence


@dataclass(frozen=True)
class Outcome:
    """What one run of a system gave.

    Attributes:
        seconds: Wall time of the timed steps.
        parameters: Number of parameters of the whole model.
        cross_entropy: Cross-entropy of the last step, nats per token, over all ranks, without the router's loss.
    """

    seconds: float
    parameters: int
    cross_entropy: float


@dataclass(frozen=True)
class RowResult:
    """A row of the table.

    Attributes:
        system: Name of the system.
        tokens_per_second: Speed of all ranks together, median over rounds.
        quartiles: Lower and upper quartile of the speed.
        ratio: Median over rounds of moe_train's tokens/s divided by its own; None: moe_train was not measured.
        ratio_quartiles: Lower and upper quartile of that ratio.
        parameters: Number of parameters of the whole model.
        cross_entropy: Cross-entropy of the last step, nats per token; the same in every round.
        detail: What it runs with that the others do not.
    """

    system: str
    tokens_per_second: float
    quartiles: tuple[float, float]
    ratio: float | None
    ratio_quartiles: tuple[float, float] | None
    parameters: int
    cross_entropy: float
    detail: str


@dataclass(frozen=True)
class Peer:
    """One of the peers with its settings.

    Attributes:
        system: Name of the system.
        form: Form of its experts, as in FORMS.
        keeps_memory: Whether its C library keeps freed memory, as the trainer's does.
    """

    system: str
    form: str
    keeps_memory: bool


def trainer_options(setting: Setting) -> list[str]:
    """Options of the trainer, without the run folder; the peers read sizes, data and optimizer from them too."""
    options = {
        "model.hidden_size": setting.hidden,
        "model.num_layers": setting.layers,
        "model.num_heads": setting.heads,
        "model.num_kv_heads": setting.kv_heads,
        "model.vocab_size": setting.vocabulary,
        "model.moe_every": 1,
        "model.moe.num_experts": setting.experts,
        "model.moe.top_k": setting.top_k,
        "model.moe.intermediate_size": setting.inner,
        # Mixtral's router, and its balance loss of each rank's own tokens.
        "model.moe.router": "softmax_topk",
        "model.moe.renormalize_gates": True,
        "model.moe.switch_aux_coef": 1e-3,
        "model.moe.switch_scope": "micro_batch",
        "data.source": "python_stdlib",
        "data.tokenizer": "bpe",
        "data.bpe_vocab_size": setting.vocabulary,
        "data.validation_fraction": 0.0,
        "parallel.device": "cpu",
        "parallel.threads_per_rank": setting.threads,
        "parallel.zero_stage": 1,
        "optim.learning_rate": 1e-3,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.max_grad_norm": 1.0,
        "train.steps": WARM_UP_STEPS + setting.steps,
        "train.micro_batch_size": setting.micro_batch,
        "train.global_batch_size": setting.global_batch,
        "train.sequence_length": setting.sequence,
        "train.precision": setting.dtype,
        "train.sample_tokens": 0,
        "telemetry.every": STEPS_PER_RECORD,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def run_trainer(name: str, setting: Setting, further: Sequence[str], folder: Path) -> Outcome:
    """Run this project's trainer.

    Args:
        name: Name of the run in messages.
        setting: Sizes.
        further: Options that follow those of the setting.
        folder: Run folder; it is removed after the run.

    Raises:
        RunFailed: If a rank did not end well.
    """
    options = [*trainer_options(setting), *further, f"--train.run_dir={folder}"]
    _run(name, [str(ROOT / "launch" / "train.py"), *options], setting, folder)
    ends = record_times(folder / "tensorboard")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    seconds = ends[WARM_UP_STEPS + setting.steps] - ends[WARM_UP_STEPS]
    return Outcome(seconds, summary["parameters"]["total"], summary["train/cross_entropy"])


def record_times(board: Path) -> dict[int, float]:
    """Time at which the trainer wrote the record of each step, in seconds of the clock.

    It is read from TensorBoard's events. So whatever happens between two steps counts, the writing of records included.

    Args:
        board: Folder of a run's events.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    times = {}
    for file in sorted(board.glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            if any(value.tag == "perf/step_ms" for value in event.summary.value):
                times[event.step] = event.wall_time
    return times


def run_peer(
    peer: Peer, setting: Setting, folder: Path, warm_up: int = WARM_UP_STEPS, steps: int | None = None
) -> Outcome:
    """Run a peer.

    Args:
        peer: System to run.
        setting: Sizes.
        folder: For its outcome; it is removed after the run.
        warm_up: Steps that are not timed.
        steps: Timed steps; None: as the setting says.

    Raises:
        RunFailed: If a rank did not end well.
    """
    folder.mkdir(parents=True)
    result = folder / "outcome.json"
    steps = setting.steps if steps is None else steps
    own = [str(result), peer.system, peer.form, str(int(peer.keeps_memory)), str(warm_up)]
    options = [*trainer_options(setting), f"--train.run_dir={folder}", f"--train.steps={warm_up + steps}"]
    _run(peer.system, ["-m", "benchmarks.train.peers", *own, *options], setting, folder)
    outcome = Outcome(**json.loads(result.read_text(encoding="utf-8")))
    shutil.rmtree(folder)
    return outcome


def _run(name: str, program: Sequence[str], setting: Setting, folder: Path) -> None:
    """Run a program as every rank, and wait; its output goes to a folder beside the given one."""
    with rank_places(setting.ranks, threads=setting.threads) as places:
        run_ranks(name, program, places, folder.with_name(f"{folder.name}_logs"), _TIMEOUT_SECONDS)


def choose_form(setting: Setting, candidates: Sequence[Peer], folder: Path) -> tuple[Peer | None, str]:
    """Find the fastest of several forms of a peer, by a few steps of each.

    Args:
        setting: Sizes.
        candidates: Forms to try.
        folder: For their runs.

    Returns:
        The fastest, or None where none works; and the reason why the last one that failed did, or nothing.
    """
    best, least, reason = None, math.inf, ""
    for number, peer in enumerate(candidates):
        try:
            trial = folder / f"trial_{peer.system}_{number}"
            seconds = run_peer(peer, setting, trial, _TRIAL_WARM_UP, _TRIAL_STEPS).seconds
        except RunFailed as error:
            reason = error.reason
            continue
        if seconds < least:
            best, least = peer, seconds
    return best, reason


def rows_of(setting: Setting, outcomes: dict[str, Sequence[Outcome]], details: dict[str, str]) -> list[RowResult]:
    """Rows of the table, in the order of `outcomes`.

    Args:
        setting: Sizes.
        outcomes: Outcomes of every round, by system.
        details: What a system runs with that the others do not, by system.
    """
    tokens = setting.tokens_per_step * setting.steps
    rates = {name: [tokens / outcome.seconds for outcome in own] for name, own in outcomes.items()}
    rows = []
    for name, own in rates.items():
        lower, median, upper = quartiles(own)
        ratio = quartiles(round_ratios(rates[OURS], own)) if OURS in rates else None
        last = outcomes[name][-1]
        rows.append(
            RowResult(
                system=name,
                tokens_per_second=median,
                quartiles=(lower, upper),
                ratio=ratio[1] if ratio else None,
                ratio_quartiles=(ratio[0], ratio[2]) if ratio else None,
                parameters=last.parameters,
                cross_entropy=last.cross_entropy,
                detail=details.get(name, ""),
            )
        )
    return rows


def claims_of(setting: Setting, rows: Sequence[RowResult]) -> list[dict[str, Any]]:
    """What the measurement is to show, and whether this run of it does; nothing of what was not measured.

    Returns:
        For each: claim, in words with its figures; holds.
    """
    claims = []
    for row in rows:
        if row.system in PEERS and row.ratio is not None and setting.ranks >= GAIN_FROM_RANKS:
            assert row.ratio_quartiles is not None, "it comes with the ratio"
            lower, upper = row.ratio_quartiles
            words = f"On {setting.ranks} ranks {OURS} trains at least {LEAST_GAIN:g} times as fast as {row.system}: "
            words += f"{row.ratio:.2f} times (quartiles {lower:.2f} to {upper:.2f})."
            claims.append({"claim": words, "holds": row.ratio >= LEAST_GAIN})
    if len(rows) > 1:
        counts = {row.parameters for row in rows}
        words = "All systems train a model of the same number of parameters: "
        words += ", ".join(f"{count:,}" for count in sorted(counts)) + "."
        claims.append({"claim": words, "holds": len(counts) == 1})
    return claims
