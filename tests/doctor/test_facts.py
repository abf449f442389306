"""What a rank finds out about itself and its host."""

import os
from pathlib import Path

import pytest
import torch

from moe_train.doctor.facts import chosen_variables, package_digest, read_versions
from moe_train.host.memory import host_memory
from moe_train.host.versions import versions

GIB = 2**30


def test_variables_that_matter() -> None:
    environ = {
        "NCCL_DEBUG": "INFO",
        "HOME": "/",
        "CUDA_VISIBLE_DEVICES": "1",
        "OMP_NUM_THREADS": "2",
        "SECRET_KEY": "x",
    }
    assert chosen_variables(environ) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize(
    "name",
    [
        "DS_ENV_FILE",  # deepspeed's launcher reads it on the host where it is started, and hands it to nobody
        "NCCL_HOSTID",
        "NCCL_TOPO_DUMP_FILE",
        "CUDA_MPS_PIPE_DIRECTORY",
        "GOMP_CPU_AFFINITY",
        "TRITON_CACHE_DIR",
        "PYTORCH_NVML_BASED_CUDA_CHECK",  # `import deepspeed` in a launcher sets it for the ranks beside it
    ],
)
def test_variables_that_each_host_or_rank_has_for_itself(name: str) -> None:
    assert chosen_variables({name: "x", "DS_ACCELERATOR": "cpu"}) == {"DS_ACCELERATOR": "cpu"}


def test_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    first = package_digest(tmp_path)
    (tmp_path / "a.py").write_text("2")
    second = package_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, package_digest(tmp_path)}) == 3


def test_versions_are_those_that_training_compares() -> None:
    found = read_versions(torch.device("cpu"))
    assert {
        f"the version of {name}": found[name] for name in ("moe_train", "python", "torch", "deepspeed")
    } == versions()


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    file = tmp_path / "meminfo"
    file.write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {60 * GIB // 1024} kB\n")
    return file


def grant(folder: Path, granted: str, taken: int, files: tuple[str, str] = ("memory.max", "memory.current")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files[0]).write_text(f"{granted}\n")
    (folder / files[1]).write_text(f"{taken}\n")


def test_memory_obeys_the_limits_of_all_control_groups(tmp_path: Path, meminfo: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/slurm/job/step\n")
    root = tmp_path / "root"
    assert host_memory(meminfo, root, membership) == (64 * GIB, 60 * GIB)
    grant(root / "slurm" / "job" / "step", "max", GIB)
    grant(root / "slurm" / "job", str(8 * GIB), 3 * GIB)
    grant(root / "slurm", str(32 * GIB), 30 * GIB)
    assert host_memory(meminfo, root, membership) == (8 * GIB, 2 * GIB)


def test_memory_obeys_control_groups_of_version_1(tmp_path: Path, meminfo: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/job\n3:cpu,cpuacct:/other\n")
    files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    grant(tmp_path / "memory" / "job", str(4 * GIB), GIB, files)
    grant(tmp_path / "memory" / "other", str(GIB), GIB, files)
    grant(tmp_path / "memory", str(2**63 - 4096), GIB, files)
    assert host_memory(meminfo, tmp_path, membership) == (4 * GIB, 3 * GIB)


def test_memory_of_this_host() -> None:
    total, available = host_memory()
    assert 0 < available <= total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
