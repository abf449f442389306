"""Runs of the systems of benchmarks/train.py: each a fresh group of ranks on the CPUs of this machine, joined by gloo.

moe_train is launch/train.py with its telemetry, TensorBoard, watchdog and checkpoint, as anyone starts it. The peers
are benchmarks/train_peers.py.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.train_rows import STEPS_A_RECORD, WARM_UP_STEPS, Outcome, Setting
from moe_train.distributed.bootstrap import local_rank_environments

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 1800  # of one run
_POLL_SECONDS = 0.2
_TRIAL_WARM_UP, _TRIAL_STEPS = 2, 3
_SHOWN_LINES = 15  # of the output of a run that failed


class RunFailed(RuntimeError):
    """A run whose ranks did not all end well; the message has the end of what one of them wrote.

    Attributes:
        reason: The last line that it wrote.
    """

    def __init__(self, name: str, what: str, output: Path) -> None:
        written = output.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in written if line.strip()][-_SHOWN_LINES:]
        self.reason = lines[-1].strip() if lines else what
        super().__init__(f"{name}: {what}; the end of its output:" + "".join(f"\n  | {line}" for line in lines))


@dataclass(frozen=True)
class Peer:
    """One of the peers with its settings.

    Attributes:
        system: Its name.
        form: Of its experts, as in FORMS.
        keeps_memory: Whether its C library keeps freed memory, as the trainer's does.
    """

    system: str
    form: str
    keeps_memory: bool


def trainer_options(setting: Setting) -> list[str]:
    """Options of the trainer, without the run folder; the peers take their sizes, data and optimizer from them too."""
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
        "telemetry.every": STEPS_A_RECORD,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def run_trainer(name: str, setting: Setting, further: Sequence[str], folder: Path) -> Outcome:
    """A run of this project's trainer.

    Args:
        name: For messages.
        setting: The sizes.
        further: Options behind those of the setting.
        folder: Its run folder; removed after the run.

    Raises:
        RunFailed: If a rank did not end well.
    """
    options = [*trainer_options(setting), *further, f"--train.run_dir={folder}"]
    _run_ranks(name, [str(ROOT / "launch" / "train.py"), *options], setting, folder)
    ends = record_times(folder / "tensorboard")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    seconds = ends[WARM_UP_STEPS + setting.steps] - ends[WARM_UP_STEPS]
    return Outcome(seconds, summary["parameters"]["total"], summary["train/cross_entropy"])


def record_times(board: Path) -> dict[int, float]:
    """When the trainer wrote the record of each step, in seconds of the clock.

    TensorBoard's events tell, so that what lies between two steps, the writing of records itself among it, counts too.

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
    """A run of a peer.

    Args:
        peer: Which.
        setting: The sizes.
        folder: For its outcome; removed after the run.
        warm_up: Steps that are not timed.
        steps: Timed ones; None: the setting's.

    Raises:
        RunFailed: If a rank did not end well.
    """
    folder.mkdir(parents=True)
    result = folder / "outcome.json"
    steps = setting.steps if steps is None else steps
    own = [str(result), peer.system, peer.form, str(int(peer.keeps_memory)), str(warm_up)]
    options = [*trainer_options(setting), f"--train.run_dir={folder}", f"--train.steps={warm_up + steps}"]
    _run_ranks(peer.system, [str(ROOT / "benchmarks" / "train_peers.py"), *own, *options], setting, folder)
    outcome = Outcome(**json.loads(result.read_text(encoding="utf-8")))
    shutil.rmtree(folder)
    return outcome


def _run_ranks(name: str, arguments: Sequence[str], setting: Setting, folder: Path) -> None:
    """Run a program as every rank, and wait; its output goes to files beside the folder."""
    outputs = [folder.with_name(f"{folder.name}.{rank}.log") for rank in range(setting.ranks)]
    ranks = []
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        for output, environment in zip(outputs, local_rank_environments(setting.ranks), strict=True):
            with output.open("wb") as stream:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "ignore::FutureWarning", *arguments],
                        cwd=ROOT,
                        env=environment | {"OMP_NUM_THREADS": str(setting.threads)},
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            if time.monotonic() > deadline:
                raise RunFailed(name, f"not done after {TIMEOUT_SECONDS} s", outputs[0])
            time.sleep(_POLL_SECONDS)
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            raise RunFailed(name, f"rank {failed} ended with code {codes[failed]}", outputs[failed])
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()


def choose_form(setting: Setting, candidates: Sequence[Peer], folder: Path) -> tuple[Peer | None, str]:
    """The fastest of several forms of a peer, by a few steps of each.

    Args:
        setting: The sizes.
        candidates: The forms.
        folder: For their runs.

    Returns:
        The fastest, or None where none works; and why the last that did not work did not, or nothing.
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
