"""The training that runs on a virtual cluster: small, and its losses on one host to hold all others against."""

import functools
import itertools
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.cluster.hosts import Host, VirtualCluster
from tests.processes import ProcessResult
from tests.train.runs import ROOT, losses

BIN = Path(sys.executable).parent
STEPS = 6
TIMEOUT = 120  # seconds; the slowest launcher took 19 for all on two cores
CONFIG = {
    "model": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 64,
        "moe_every": 2,
        "moe": {"num_experts": 4, "importance_cv2_coef": 0.1, "load_cv2_coef": 0.1},
    },
    "optim": {"learning_rate": 6e-3, "schedule": "constant", "warmup_steps": 2},
    "train": {
        "steps": STEPS,
        "micro_batch_size": "auto",
        "global_batch_size": 8,
        "sequence_length": 32,
        "precision": "fp32",
        "sample_tokens": 0,
    },
    "parallel": {"expert_parallel_size": 4},  # auto would stay inside a host
    "telemetry": {"every": 1, "tensorboard": False},
}
# What a login shell on a host would set; Open MPI refuses root unless told.
ENVIRONMENT = {
    "PATH": os.pathsep.join([str(BIN), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


@dataclass
class Training:
    """A configuration in the cluster's folder.

    Attributes:
        cluster: Where it runs.
        config: Its file.
    """

    cluster: VirtualCluster
    config: Path
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def arguments(self, run_dir: Path, *more: str) -> list[str]:
        """The command line from the script on."""
        return ["launch/train.py", "--config", str(self.config), f"--train.run_dir={run_dir}", *more]

    def new_run(self) -> Path:
        """A run folder that is not there yet."""
        return self.cluster.folder / f"run{next(self.numbers)}"

    @functools.cached_property
    def expected(self) -> dict[int, float]:
        """train/loss by step, of four ranks on one host."""
        run_dir = self.new_run()
        result = run(self.cluster.hosts[0], "torchrun", "--nproc-per-node", "4", *self.arguments(run_dir))
        assert result.returncode == 0, result
        return losses(run_dir)

    def check(self, result: ProcessResult, run_dir: Path) -> None:
        """The run ended well, with the losses of one host, and nothing is left of it."""
        assert result.returncode == 0, result
        # To the last bit: on the same layout, with sums in the same order, it does not matter where the ranks are.
        assert losses(run_dir) == self.expected
        assert len(self.expected) == STEPS
        assert self.cluster.wait_until_idle(10) == {}


def prepare(cluster: VirtualCluster) -> Training:
    """Write the configuration, and a text to train on."""
    text = cluster.folder / "text"
    text.mkdir()
    for path in ("README.md", "LICENSE"):
        shutil.copy(ROOT / path, text / Path(path).with_suffix(".txt").name)
    data = {
        "source": "text",
        "paths": [str(text)],
        "validation_fraction": 0.3,
        "cache_dir": str(cluster.folder / "cache"),
    }
    config = cluster.folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"data": data}))
    return Training(cluster, config)


def run(host: Host, *args: str, timeout: float = TIMEOUT, **variables: str) -> ProcessResult:
    """A command on a host, in the repository."""
    return host.run(*args, timeout=timeout, env={**ENVIRONMENT, **variables}, cwd=ROOT)


def mpich(folder: Path) -> dict[str, str]:
    """The variables with which ranks run under MPICH, whose mpirun comes first on PATH; skips the test without it.

    Args:
        folder: An empty one, for the names under which mpi4py's wheel and the user look for MPICH.
    """
    mpirun = need("mpirun.mpich")
    library = next((path for path in Path("/usr/lib").glob("*/libmpich.so.12")), None)
    if library is None:
        pytest.skip("no libmpich.so.12")
    (folder / "libmpi.so.12").symlink_to(library)
    (folder / "mpirun").write_text(f'#!/bin/sh\nexec {mpirun} "$@"\n')  # by its path it finds what it starts
    (folder / "mpirun").chmod(0o755)
    variables = {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(folder), "UCX_TLS": "tcp,self"}
    return variables | {"PATH": os.pathsep.join([str(folder), ENVIRONMENT["PATH"]])}


def need(name: str) -> str:
    """The path of a command of this environment or the system; skips the test where there is none."""
    found = shutil.which(name, path=ENVIRONMENT["PATH"])
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
