"""A server of processes in which torch believes in a GPU, and runs of the trainer in them."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from moe_train.launch.fork_server import ForkServer
from tests.cuda_without_gpu.ceilings import Layout

HERE = "tests.cuda_without_gpu"
PRELOADED = [f"{HERE}.fake_cuda", f"{HERE}.steps", "moe_train.train.engine.build", "moe_train.infer.decode"]
SECONDS = 240  # for a run, on a busy machine


@dataclass(frozen=True)
class Work:
    """What a run did in its last step, by line or operation; see `counting.DeviceWork`."""

    launches: dict[str, int]
    lines: dict[str, int]
    waits: dict[str, int]
    wide_bytes: dict[str, int]
    wide_products: dict[str, int]


class StepFailed(Exception):
    """A run ended with an error: its output."""


Run = Callable[[Layout], Work]


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of guard.cpp, built once for all workers of pytest."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("g++ is not installed: it builds the device guard")
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    built, root = folder / "fake_cuda_guard.so", Path(torch.__file__).parent
    with FileLock(folder / "fake_cuda_guard.lock"):
        if not built.exists():
            libraries = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
            flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root}/include"]
            source = Path(__file__).with_name("guard.cpp")
            subprocess.run([compiler, *flags, source, "-o", built, *libraries], check=True, timeout=SECONDS)
    return built


@pytest.fixture(scope="module")
def run(guard: Path) -> Iterator[Run]:
    """Runs a layout in a process of its own."""
    environment = {**os.environ, "MOE_TRAIN_FAKE_CUDA_GUARD": str(guard), "DS_ACCELERATOR": "cuda"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": "/nonexistent"}
    with ForkServer(PRELOADED, environment) as server:

        def run(layout: Layout) -> Work:
            ranks = {"WORLD_SIZE": str(layout.world), "LOCAL_WORLD_SIZE": str(min(layout.node, layout.world))}
            process = server.start(f"{HERE}.steps:main", [json.dumps(asdict(layout))], environment | ranks)
            done = process.wait(SECONDS)
            if done.returncode:
                raise StepFailed(done.stdout[-2000:] + done.stderr[-8000:])
            return Work(**json.loads(done.stdout.splitlines()[-1]))

        yield run
