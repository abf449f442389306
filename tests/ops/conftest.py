"""Processes in which Triton interprets its kernels, or compiles them for GPUs that are not there."""

import multiprocessing.pool
from collections.abc import Iterator

import pytest
import torch

from tests.ops.triton_process import TIMEOUT, triton_process


@pytest.fixture(scope="module")
def interpreter() -> Iterator[multiprocessing.pool.Pool]:
    with triton_process({"TRITON_INTERPRET": "1"}) as pool:
        yield pool


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[multiprocessing.pool.Pool]:
    folder = tmp_path_factory.mktemp("triton")
    with triton_process({"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}) as pool:
        yield pool


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
def run(request):
    """Calls a check with the device and its further arguments."""
    if request.param == "cuda":
        return lambda check, *args: check("cuda", *args)
    pool = request.getfixturevalue("interpreter")
    return lambda check, *args: pool.apply_async(check, ("cpu", *args)).get(TIMEOUT)
