"""What keeps NCCL from InfiniBand, on hosts made of folders."""

from pathlib import Path

import pytest

from moe_train.host.infiniband import infiniband_obstacles


@pytest.fixture
def host(tmp_path: Path) -> tuple[Path, Path]:
    adapters, nodes = tmp_path / "adapters", tmp_path / "nodes"
    (adapters / "mlx5_0").mkdir(parents=True)
    nodes.mkdir()
    (nodes / "uverbs0").touch()
    return adapters, nodes


def test_nothing_is_missed_where_there_is_none(tmp_path: Path) -> None:
    assert infiniband_obstacles(tmp_path / "none", tmp_path, lambda name: None, 0) == []
    assert infiniband_obstacles(tmp_path, tmp_path, lambda name: None, 0) == []


@pytest.mark.parametrize("locked", [-1, 2**40])
def test_a_whole_host(host: tuple[Path, Path], locked: int) -> None:
    assert infiniband_obstacles(*host, lambda name: f"lib{name}.so.1", locked) == []


def test_an_image_without_libraries_devices_and_locked_memory(host: tuple[Path, Path]) -> None:
    adapters, nodes = host
    (nodes / "uverbs0").unlink()
    found = infiniband_obstacles(adapters, nodes, lambda name: None, 65536)
    assert found == [
        "no libibverbs.so",
        "no librdmacm.so",
        f"no {nodes}/uverbs*",
        "only 65536 bytes may be locked in memory (ulimit -l)",
    ]
