"""All ranks take Triton's kernels or none does, on real ranks; the GPU is played by a function that fails on one."""

import threading
from unittest import mock

import pytest
import torch

from moe_train.distributed import kernel_agreement
from moe_train.distributed.kernel_agreement import agree_on_kernels
from moe_train.ops import kernels
from tests.ranks import RankPool

CUDA = torch.device("cuda", 0)


def agree(rank: int, world_size: int, failing: tuple[int, ...]) -> tuple[bool, bool, list[str]]:
    def compile_kernel(device: torch.device) -> None:
        if rank in failing:
            raise FileNotFoundError("Python.h")

    said: list[str] = []
    with (
        mock.patch.object(kernel_agreement, "try_kernel", compile_kernel),
        mock.patch.object(kernels, "_forbidden", threading.Event()),
    ):
        answer = agree_on_kernels(CUDA, said.append)
        return answer, kernels._forbidden.is_set(), said


def test_all_can(pool2: RankPool) -> None:
    assert pool2.run(agree, ()) == [(True, False, [])] * 2


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_if_one_cannot_none_does(pool2: RankPool, failing: tuple[int, ...]) -> None:
    for answer, is_forbidden, (warning,) in pool2.run(agree, failing):
        assert not answer and is_forbidden
        assert f"rank {failing[0]} (Python.h)" in warning and "python3-dev" in warning


def test_forbidden_kernels_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(torch.Tensor):
        device = CUDA

    monkeypatch.setattr(kernels, "_forbidden", threading.Event())
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rows = torch.zeros(1).as_subclass(OnCuda)
    assert kernels.can_run(rows)
    kernels.forbid_kernels()
    assert not kernels.can_run(rows)


def test_the_cpu_asks_nobody() -> None:
    assert agree_on_kernels(torch.device("cpu"), pytest.fail)
