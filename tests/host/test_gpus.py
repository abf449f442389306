"""GPUs as Linux shows them, on a host made of folders."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_train.host.gpus import bind_near_gpu, gpu_nodes, near_cores


def test_only_nodes_of_gpus_count(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-modeset", "null"):
        (tmp_path / name).touch()
    assert [node.name for node in gpu_nodes(tmp_path)] == ["nvidia0", "nvidia12"]


@pytest.mark.parametrize(
    ("text", "cores"), [("0-2,8", {0, 1, 2, 8}), ("5", {5}), ("", set()), ("0-1,4-5", {0, 1, 4, 5})]
)
def test_cores_near_a_gpu(tmp_path: Path, text: str, cores: set[int]) -> None:
    folder = tmp_path / "0000:0a:00.0"
    folder.mkdir()
    (folder / "local_cpulist").write_text(text + "\n")
    assert near_cores(0, 10, 0, tmp_path) == cores
    assert near_cores(0, 11, 0, tmp_path) == set()


def test_a_rank_is_bound_near_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "0001:3b:00.0"
    folder.mkdir()
    (folder / "local_cpulist").write_text("0-1,4\n")
    allowed, bound = set(range(8)), []
    properties = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: allowed)
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: bound.append(cores))
    assert bind_near_gpu(torch.device("cuda", 0), tmp_path) == {0, 1, 4}
    assert bind_near_gpu(torch.device("cpu"), tmp_path) == set()
    properties.pci_bus_id = 0x3C  # of which the system tells nothing
    assert bind_near_gpu(torch.device("cuda", 0), tmp_path) == set()
    properties.pci_bus_id = 0x3B
    allowed.remove(7)  # somebody has chosen cores already
    assert bind_near_gpu(torch.device("cuda", 0), tmp_path) == set()
    assert bound == [{0, 1, 4}]
