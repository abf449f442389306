"""Processes for tests of Triton kernels: what Triton reads in the environment is settled when it is imported."""

import importlib.util
import multiprocessing
import multiprocessing.pool
import os
from types import ModuleType

import pytest
import torch

TIMEOUT = 120  # seconds for a call; the first one of a process imports torch and Triton, on a busy machine

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason='triton is not installed (pip install -e ".[test]" brings it on Linux x86_64, a CUDA build of torch too)',
)


def triton_process(environment: dict[str, str]) -> multiprocessing.pool.Pool:
    """One fresh interpreter with additions to the environment, in which nothing has imported Triton yet."""
    return multiprocessing.get_context("spawn").Pool(1, _set_up, (environment,))


def triton_kernels() -> ModuleType:
    """The kernels, which are compiled or interpreted as the process has it."""
    from moe_train.ops import triton_kernels  # not at the top: it imports Triton

    return triton_kernels


def _set_up(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
