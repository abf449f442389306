"""Triton's compiler takes the kernels, for GPUs that need not be there: the interpreter is laxer than it is."""

import re
import sys
from typing import Any
from unittest import mock

import pytest
import torch

from moe_train.ops.row_map import RowMap
from tests.ops.test_routed_mlp import call, inputs
from tests.ops.triton_process import TIMEOUT, needs_triton, triton_kernels, triton_process

pytestmark = needs_triton
KERNELS = ("_gather_kernel", "_sum_kernel", "_swiglu_kernel", "_swiglu_gradients_kernel")
TTT_KERNELS = ("_forward_kernel", "_output_gradients_kernel", "_learning_gradients_kernel")
LEAST_SHARED_MEMORY = 99 * 1024  # bytes that a program may have on compute capability 8.6, less than on 8.0 and 9.0
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Launches:
    """Stands for a kernel and notes what it is launched with."""

    def __init__(self) -> None:
        self.noted: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.noted.append((args, kwargs))


def compiled(kernel, args: tuple, kwargs: dict, capability: int) -> Any:
    """What Triton compiles when a kernel is launched with the arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    constexprs = {name: value for name, value in kwargs.items() if name != "num_warps"}
    for index, (name, value) in enumerate([*zip(kernel.arg_names, args), *constexprs.items()]):
        is_tensor = isinstance(value, torch.Tensor)
        if name in constexprs or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32"
            if (value.data_ptr() if is_tensor else value) % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": kwargs["num_warps"]})


def check_order(ptx: str, name: str) -> None:
    assert not re.search(r"\b(atom|red)\.", ptx), f"{name} adds in an order that is not its own"


def check_compiles(capability: int, dtype: torch.dtype, width: int) -> None:
    kernels = triton_kernels()
    launches = {name: Launches() for name in KERNELS}
    row_map = RowMap.of(torch.tensor([2, 0, 2]), 4)
    rows, gates = torch.zeros(3, width, dtype=dtype), torch.zeros(3)
    with mock.patch.multiple(kernels, **launches):
        kernels.gather_rows(rows, row_map.source_R)
        kernels.sum_rows(rows, row_map.places_R, row_map.offsets_N)
        kernels.gated_swiglu(rows.repeat(1, 2), gates)
        kernels.gated_swiglu_gradients(rows.repeat(1, 2), rows, gates)
    for name in KERNELS:
        assert launches[name].noted
        for args, kwargs in launches[name].noted:
            ptx = compiled(getattr(kernels, name), args, kwargs, capability).asm["ptx"]
            check_order(ptx, name)
            if width % 16 == 0:  # 16 bytes at once
                assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, f"{name} is slow"


@pytest.mark.parametrize(
    ("capability", "dtype", "width"),
    [
        (80, torch.float16, 1000),
        (80, torch.bfloat16, 512),
        (90, torch.bfloat16, 2048),
        (90, torch.float32, 768),
        (100, torch.bfloat16, 4096),
    ],
    ids=str,
)
def test_every_launch_compiles(compiler, capability, dtype, width):
    compiler.apply_async(check_compiles, (capability, dtype, width)).get(TIMEOUT)


def check_ttt_compiles(capability: int, size: int, width: int) -> None:
    from moe_train.ops import triton_ttt  # not at the top: it imports Triton

    launches = {name: Launches() for name in TTT_KERNELS}
    q, rates = torch.zeros(2, 3, 2, size, width, requires_grad=True), torch.zeros(2, 3, 2, size)
    norm_Hf, marks_Bn = torch.zeros(2, width), torch.zeros(2, 3, dtype=torch.bool)
    start, last_row = torch.zeros(2, width + 1, width), torch.zeros(())
    with mock.patch.multiple(triton_ttt, **launches):
        inputs = (q, q, q, rates, rates[:, :, 0], start, norm_Hf, norm_Hf, last_row, marks_Bn, marks_Bn, 1e-6)
        triton_ttt.LinearScan.apply(*inputs).sum().backward()
    for name in TTT_KERNELS:
        assert launches[name].noted
        for args, kwargs in launches[name].noted:
            found = compiled(getattr(triton_ttt, name), args, kwargs, capability)
            check_order(found.asm["ptx"], name)
            assert found.metadata.shared <= LEAST_SHARED_MEMORY, f"{name} cannot be launched"


# The largest last: its products fill the registers, and take the compiler half a minute on a busy machine.
LARGEST = (16, 64)


@pytest.mark.parametrize(
    ("capability", "size", "width"),
    [
        (80, 16, 16),
        (90, 5, 12),
        *(pytest.param(capability, *LARGEST, marks=pytest.mark.slow) for capability in (80, 90, 100)),
    ],
)
def test_every_launch_of_ttt_compiles(compiler, capability, size, width):
    compiler.apply_async(check_ttt_compiles, (capability, size, width)).get(2 * TIMEOUT)


def imported_by_the_cpu() -> list[str]:
    tensors, source = inputs([2, 0, 3], torch.float32)
    call(tensors, source, [2, 0, 3]).sum().backward()
    return sorted(sys.modules)


def test_the_cpu_does_not_import_triton():
    with triton_process({}) as fresh:
        imported = fresh.apply_async(imported_by_the_cpu).get(TIMEOUT)
    assert "moe_train.ops.kernels" in imported
    assert not {"triton", "moe_train.ops.triton_kernels", "moe_train.ops.triton_ttt"} & set(imported)
