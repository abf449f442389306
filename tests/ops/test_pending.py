"""Numbers on their way to the host."""

import pytest
import torch

from moe_train.ops.pending import start_host_copy


def read(device: str) -> list:
    tensors = [torch.arange(6, device=device).view(2, 3), torch.zeros(0, 4, dtype=torch.int64, device=device)]
    copy = start_host_copy([*tensors, torch.tensor(7, device=device)])
    tensors[0].zero_()  # queued behind the copy
    return copy.wait()


def test_every_tensor_in_its_shape():
    assert read("cpu") == [[[0, 1, 2], [3, 4, 5]], [], 7]


@pytest.mark.gpu
def test_on_a_device():
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU here")
    assert read("cuda") == [[[0, 1, 2], [3, 4, 5]], [], 7]
