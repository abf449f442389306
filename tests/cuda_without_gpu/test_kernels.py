"""Triton's kernels compiled for GPUs that are not here: NVIDIA's assembler counts registers, and none may spill."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from moe_train.ops.row_map import RowMap
from tests.cuda_without_gpu.ceilings import REGISTERS
from tests.ops.conftest import compiler as compiler  # the fixture
from tests.ops.test_triton_compiler import Launches, check_order, compiled
from tests.ops.triton_process import TIMEOUT, needs_triton

pytestmark = needs_triton
CAPABILITIES = (80, 90, 100)
WIDTH, INNER, VOCABULARY, EXPERTS = 2048, 768, 4096, 128  # Qwen3-30B-A3B, and a block of its vocabulary


def launch_rows(kernels: ModuleType) -> None:
    row_map = RowMap.of(torch.tensor([2, 0, 2]), 4)
    rows, hidden = torch.zeros(3, WIDTH, dtype=torch.bfloat16), torch.zeros(3, 2 * INNER, dtype=torch.bfloat16)
    kernels.gather_rows(rows, row_map.source_R)
    kernels.sum_rows(rows, row_map.places_R, row_map.offsets_N)
    kernels.gated_swiglu(hidden, torch.zeros(3))
    kernels.gated_swiglu_gradients(hidden, hidden[:, :INNER], torch.zeros(3))


def launch_tokens(kernels: ModuleType) -> None:
    angles, logits = torch.zeros(1, 1, 4, 64), torch.zeros(3, VOCABULARY, dtype=torch.bfloat16)
    kernels.rotate(torch.zeros(1, 4, 32, 128, dtype=torch.bfloat16).transpose(1, 2), angles, angles, 1.0)
    kernels.cross_entropy(logits, torch.zeros(3, dtype=torch.int64), -100, logits)
    kernels.choose(torch.zeros(3, EXPERTS), torch.zeros(3, dtype=torch.int64), 1, 8)


def assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that are spilled to memory."""
    from triton import knobs

    program = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
        command = [program.path, "-v", f"-arch={target}", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT).stderr
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return int(re.search(r"Used (\d+) registers", said)[1]), spilled


def measure(module: str, names: tuple[str, ...], launch: Callable, capability: int) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of the kernels of a module."""
    import importlib

    kernels = importlib.import_module(f"moe_train.ops.{module}")
    launches = {name: Launches() for name in names}
    with mock.patch.multiple(kernels, **launches):
        launch(kernels)
    found = {}
    for name in names:
        ((args, kwargs),) = launches[name].noted
        ptx = compiled(getattr(kernels, name), args, kwargs, capability).asm["ptx"]
        check_order(ptx, name)
        found[name] = assemble(ptx, capability)
    return found


def cases() -> list:
    return [
        pytest.param(module, launch, capability, id=f"{module} sm_{capability}")
        for module, launch in (("triton_kernels", launch_rows), ("triton_tokens", launch_tokens))
        for capability in CAPABILITIES
    ]


@pytest.mark.parametrize(("module", "launch", "capability"), cases())
def test_registers_are_few_and_none_spills(compiler, module, launch, capability):
    ceilings = REGISTERS[module]
    found = compiler.apply_async(measure, (module, tuple(ceilings), launch, capability)).get(TIMEOUT)
    assert {name: spilled for name, (_, spilled) in found.items() if spilled} == {}
    too_many = {name: used for name, (used, _) in found.items() if used > ceilings[name].most}
    assert not too_many, f"registers {too_many}, at most {ceilings} are allowed"
