"""launch/slurm.sbatch and srun on two nodes of a real Slurm: what ends a job early, and that no number differs.

A rank that is stopped (SIGSTOP) holds up the training for as long as Slurm takes to act, so that no test depends on how
fast steps are. All jobs are of 2 nodes x 2 tasks and share one Slurm.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Job, Slurm, running_slurm, skip_where_slurm_cannot_run
from tests.distributed.test_launchers import SCRIPT
from tests.distributed.test_launchers import records as printed
from tests.processes import ProcessResult
from tests.train.runs import CPU, losses, records, train_forked

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 40
LIFE_SECONDS = 240  # of one start, the steps and the end; 4 ranks on two cores take 15, with six other jobs 40
TASKS = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60")
RUN = (
    "--config=configs/quickstart.yaml",
    "--model.hidden_size=32",
    "--model.num_layers=2",
    "--model.intermediate_size=64",
    "--model.moe.num_experts=4",
    "--data.tokenizer=bytes",
    "--data.validation_max_bytes=20000",
    "--parallel.expert_parallel_size=2",  # else auto, and other layouts sum in another order
    "--parallel.peer_timeout_seconds=300",  # longer than a rank is held
    "--train.sequence_length=32",
    "--train.global_batch_size=8",
    "--train.precision=fp32",
    "--train.sample_tokens=4",
    "--train.log_every=1",
    "--telemetry.every=1",
    f"--train.steps={STEPS}",
    "--checkpoint.every=3",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    skip_where_slurm_cannot_run()
    with running_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses by step of four ranks on one host, without Slurm, that nothing happens to."""
    folder = tmp_path_factory.mktemp("one_host") / "run"
    result = train_forked(4, *RUN, f"--train.run_dir={folder}")
    assert result.returncode == 0, result
    found = losses(folder)
    assert list(found) == list(range(1, STEPS + 1))
    return found


class Training:
    """A job of launch/slurm.sbatch, and its run folder."""

    def __init__(self, slurm: Slurm, folder: Path, *options: str, run: tuple[str, ...] = RUN) -> None:
        self.slurm, self.run_dir, self.output = slurm, folder / "run", folder / "job.log"
        script = ["launch/slurm.sbatch", *run, f"--train.run_dir={self.run_dir}"]
        self.job: Job = slurm.submit(*TASKS, *options, f"--output={self.output}", *script, **CPU)

    def log(self) -> str:
        """What all lives have printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for_log(self, pattern: str, seconds: float = LIFE_SECONDS) -> None:
        self.slurm.wait_until(lambda: re.search(pattern, self.log()), seconds, lambda: f"{pattern}\n{self.log()}")

    def wait_for_step(self, step: int) -> None:
        """Until the step is recorded and a checkpoint is there."""
        written, latest = self.run_dir / "metrics.jsonl", self.run_dir / "checkpoints" / "latest"

        def is_there() -> bool:
            return latest.exists() and written.exists() and records(self.run_dir)[-1]["step"] >= step

        self.slurm.wait_until(is_there, LIFE_SECONDS, self.log)

    @contextlib.contextmanager
    def held(self, rank: int) -> Iterator[None]:
        """The rank is stopped, and the others wait for it in their step."""
        pid = self.job.ranks()[rank]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def wait_for_next_life(self, restarts: int) -> None:
        """Until the job is back in the queue, and lets it start."""
        fields = self.job.wait_for("PENDING", LIFE_SECONDS, self.log)
        assert fields["Restarts"] == str(restarts), fields
        # Instead of in the two minutes that a requeued job waits. Not at once: a start that has its credential in the
        # second in which the life before was ended is refused by slurmd as one of that ("already killed").
        self.job.update("TimeLimit=60", "StartTime=now+3seconds")

    def wait_for_end(self) -> dict[str, str]:
        return self.job.wait_for("COMPLETED", LIFE_SECONDS, self.log)


def test_the_losses_are_those_of_one_host(slurm: Slurm, tmp_path: Path, expected: dict[int, float]) -> None:
    training = Training(slurm, tmp_path)
    assert training.wait_for_end()["Restarts"] == "0"
    assert "moe_train: 4 x cpu (srun), fp32" in training.log()
    assert re.search(r"life 0 of job \d+: exit code 0\n", training.log()), training.log()
    assert losses(training.run_dir) == expected  # to the last bit: the same layout


def test_time_limit(slurm: Slurm, tmp_path: Path, expected: dict[int, float]) -> None:
    training = Training(slurm, tmp_path)
    training.wait_for_step(5)
    with training.held(rank=3):
        # The limit is moved near: one minute at the least, and the script asks for its signal two minutes before.
        # Slurm looks at limits every 30 s.
        elapsed = training.job.fields()["RunTime"]
        minutes = int(elapsed.split(":")[-3].split("-")[-1]) * 60 + int(elapsed.split(":")[-2])
        training.job.update(f"TimeLimit={minutes + 2}")
        training.wait_for_log(r"rank 0: SIGUSR1: this step is finished and saved", 60)
    training.wait_for_next_life(restarts=1)
    assert re.search(r"life 0 of job \d+: exit code 75, saved", training.log()), training.log()
    stopped = records(training.run_dir)[-1]["step"]
    assert 5 <= stopped < STEPS
    assert (training.run_dir / "checkpoints" / "latest").read_text() == f"step_{stopped:08d}\n"
    training.wait_for_end()
    assert losses(training.run_dir) == expected


def test_preemption(slurm: Slurm, tmp_path: Path, expected: dict[int, float]) -> None:
    training = Training(slurm, tmp_path, "--partition=low")
    training.wait_for_step(5)
    with training.held(rank=2):
        command = ["--wrap=sleep 1", f"--output={tmp_path}/urgent.log"]
        urgent = slurm.submit("--partition=high", "--nodes=2", "--exclusive", *command)
        training.wait_for_log(r"rank 0: SIGTERM: this step is finished and saved")
    preempting = urgent.wait_for("COMPLETED", LIFE_SECONDS, training.log)
    training.wait_for_next_life(restarts=1)
    assert re.search(r"life 0 of job \d+: exit code 75, saved", training.log()), training.log()
    assert training.wait_for_end()["StartTime"] >= preempting["EndTime"]
    assert losses(training.run_dir) == expected


def test_a_killed_rank_and_scancel(slurm: Slurm, tmp_path: Path, expected: dict[int, float]) -> None:
    training = Training(slurm, tmp_path)
    training.wait_for_step(5)
    pid = training.job.ranks()[1]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    training.wait_for_log(rf"rank 1 \(pid {pid} on \S+\) .*signal 9 \(SIGKILL.*last checkpoint: step \d+")
    training.wait_for_log(r"life 0 of job \d+: exit code 137, a fault")
    assert time.monotonic() - killed < 20  # the other ranks have noticed; srun would wait 30 s for them
    resumed = int((training.run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    training.wait_for_next_life(restarts=1)
    training.wait_for_log(rf"(?s)life 0 .*step +{resumed + 5}/{STEPS}")
    with training.held(rank=3):
        slurm.answer("scancel", str(training.job.number))
        training.wait_for_log(r"rank 0: SIGTERM: this step is finished and saved")
    fields = training.job.wait_for("CANCELLED", LIFE_SECONDS, training.log)
    assert fields["Restarts"] == "1", fields
    assert re.search(r"life 1 of job \d+: exit code 75, saved\ncancelled: not started again", training.log())
    found = losses(training.run_dir)
    last = max(found)
    assert resumed + 5 <= last < STEPS
    assert (training.run_dir / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"
    assert found == {step: loss for step, loss in expected.items() if step <= last}


def test_a_usage_error_is_not_started_again(slurm: Slurm, tmp_path: Path) -> None:
    training = Training(slurm, tmp_path, run=(*RUN, "--model.moe.top_k=9"))
    fields = training.job.wait_for("FAILED", LIFE_SECONDS, training.log)
    assert (fields["ExitCode"], fields["Restarts"]) == ("2:0", "0"), fields
    assert training.log().count("top_k (9) must not exceed num_experts (4)") == 1, training.log()


def check_two_nodes(result: ProcessResult) -> None:
    ranks = printed(result)
    places = [
        (each["world"]["node_rank"], each["world"]["local_rank"], each["world"]["local_world_size"]) for each in ranks
    ]
    assert places == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    assert {(each["world"]["world_size"], each["world"]["launcher"], each["sum"]) for each in ranks} == {
        (4, "srun", 10)
    }
    assert len({(each["world"]["master_addr"], each["world"]["master_port"]) for each in ranks}) == 1


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(("srun", *TASKS), id="srun"),
        pytest.param(("srun", *TASKS, "--mpi=pmix"), id="srun --mpi=pmix"),
        pytest.param(("salloc", *TASKS, "srun"), id="salloc and srun"),
    ],
)
def test_ranks_find_each_other(slurm: Slurm, command: tuple[str, ...]) -> None:
    if "--mpi=pmix" in command:
        reason = slurm.run("srun", "--mpi=pmix", "--nodes=1", "true").stderr
        if "can not load PMIx library" in reason or "cannot find mpi plugin" in reason:
            pytest.skip("this Slurm has no pmix plugin, or no libpmix (Debian: libpmix-dev)")
    # The names of these nodes, n1 and n2, are known to Slurm only.
    check_two_nodes(slurm.run(*command, sys.executable, SCRIPT, MASTER_ADDR="127.0.0.1"))


def test_doctor_under_srun(slurm: Slurm, tmp_path: Path) -> None:
    doctor = ["-m", "moe_train", "doctor", "--quick", "--sizes=1K,64K", f"--shared-dir={tmp_path}"]
    output = tmp_path / "machine.json"
    variables = {**CPU, "MASTER_ADDR": "127.0.0.1"}  # as above: nobody but Slurm knows the nodes' names
    result = slurm.run("srun", *TASKS, sys.executable, *doctor, f"--output={output}", timeout=LIFE_SECONDS, **variables)
    assert result.returncode == 0, result
    report = json.loads(output.read_text())
    assert report["passed"] and len(report["ranks"]) == 4
    assert {each["scope"] for each in report["collectives"]} == {"within", "across", "all"}


def test_trainings_of_one_rank_each_are_refused(slurm: Slurm, tmp_path: Path) -> None:
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=1", "launch/train.py"]
    run: Any = (*RUN, f"--train.run_dir={tmp_path}")
    result = slurm.run("srun", "--nodes=1", "--ntasks=2", *deepspeed, *run, timeout=LIFE_SECONDS, **CPU)
    assert result.returncode == 2, result
    assert "must form one world" in result.stderr, result
    assert not list(tmp_path.iterdir())
