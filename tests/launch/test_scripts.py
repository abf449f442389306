"""The launch scripts for single launchers: what is missing is one message, and a launcher gets what it needs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.test_restarts import RUN, STEPS, keep_running, launched
from tests.processes import run_process
from tests.train.runs import ROOT, free_port, records

NOTHING = dict.fromkeys(("HOSTS", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "NNODES", "RANKS", "MPIRUN"))


@pytest.mark.parametrize(
    ("command", "variables", "said"),
    [
        ("mpirun.sh", {}, "RANKS () must be a whole number"),
        ("mpirun.sh 0", {"HOSTS": "a:1"}, "RANKS (0) must be a whole number"),
        ("mpirun.sh 2", {}, "HOSTS is not set"),
        ("mpirun.sh 2", {"HOSTS": "a:1", "MPIRUN": "no-mpirun"}, "no-mpirun cannot be run"),
        ("torchrun.sh", {}, "'' is none of c10d, static"),
        ("torchrun.sh c10d", {}, "MASTER_ADDR is not set"),
        ("torchrun.sh static", {"MASTER_ADDR": "a"}, "NODE_RANK ()"),
        ("deepspeed.sh ssh x", {}, "'ssh' is none of pdsh"),
        ("deepspeed.sh pdsh /no/file", {}, "HOSTFILE (/no/file) cannot be read"),
        ("deepspeed.sh no-ssh launch/hostfile.example", {"MASTER_ADDR": "a"}, "NODE_RANK ()"),
        ("deepspeed.sh no-ssh launch/hostfile.example", {"NODE_RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_what_is_missing_is_one_message(command: str, variables: dict[str, str], said: str) -> None:
    result = run_process(f"launch/{command}".split(), 20, env={**NOTHING, **variables}, cwd=ROOT)
    assert result.returncode == 2, result
    assert len(result.stderr.splitlines()) == 1 and said in result.stderr, result


def script(folder: Path, name: str, text: str) -> dict[str, str]:
    """A command of that name comes first on PATH."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    return {"PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}


def test_mpirun_hands_on_what_open_mpi_does_not(tmp_path: Path) -> None:
    # Its version is long: a reader that ends at the first line must not be taken for a missing mpirun.
    text = 'if [[ $1 == --version ]]; then echo "mpirun (Open MPI) 5.0"; seq 100000; else echo "$@"; fi'
    variables = {
        "NCCL_P2P_DISABLE": "1",
        "MASTER_ADDR": "10.0.0.1",
        "HOSTS": "a:1,b:1",
        **script(tmp_path, "mpirun", text),
    }
    result = run_process(["launch/mpirun.sh", "2", "--config", "c"], 20, env={**NOTHING, **variables}, cwd=ROOT)
    assert result.returncode == 0, result
    for part in ("--host a:1,b:1 -n 2", "-x NCCL_P2P_DISABLE", "-x MASTER_ADDR", "launch/train.py --config c"):
        assert part in result.stdout, result
    assert "-x HOME" not in result.stdout


def test_deepspeed_gets_its_variables_and_signals(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=1\n")
    # Twice, as deepspeed does.
    text = 'cat "$DS_ENV_FILE" "$DS_ENV_FILE"; trap "echo stopped; exit 3" TERM; echo ready; sleep 20 & wait'
    variables = {"NCCL_IB_HCA": "^mlx5_0", "TMPDIR": str(tmp_path), **script(tmp_path, "deepspeed", text)}
    environment = {name: value for name, value in {**os.environ, **variables}.items() if name != "MASTER_ADDR"}
    command = ["launch/deepspeed.sh", "pdsh", str(hostfile)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        while not lines or lines[-1] != "ready\n":
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        assert lines.count("NCCL_IB_HCA=^mlx5_0\n") == 2, lines
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 3
        assert time.monotonic() - started < 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deepspeed", "hosts"]


@pytest.mark.slow
def test_keep_running_knows_the_scripts(tmp_path: Path) -> None:
    """A rank that gets the signal itself would be started again by the agent."""
    run_dir = tmp_path / "run"
    variables = ["NNODES=1", "RANKS=2", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    words = ["env", *variables, "launch/torchrun.sh", "c10d", *RUN, f"--train.run_dir={run_dir}"]
    with launched(tmp_path, *keep_running(), *words) as command:
        command.wait_for_step(run_dir, 5)
        command.process.terminate()
        result = command.end()
        assert result.returncode == 1, result  # torchrun's, whatever ranks return
        assert "restart 1" not in result.stdout and "SIGTERM: no restart any more" in result.stdout, result
    last = records(run_dir)[-1]["step"]
    assert 5 <= last < STEPS
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"
