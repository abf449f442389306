"""Stands for torch.cuda in a process without a GPU. Import it before torch; GUARD in the environment names guard.so.

What is made up: events and streams, properties of the device (an H100), launches of Triton kernels, the kernel that
attention takes, and numbers that the host reads.
"""

import contextlib
import ctypes
import importlib
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

ctypes.CDLL(os.environ["MOE_TRAIN_FAKE_CUDA_GUARD"])

import torch  # noqa: E402  (after the guard)
import torch._dynamo  # noqa: E402  (it looks at functions that are replaced below)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402

from tests.cuda_without_gpu.ceilings import REGISTERS  # noqa: E402
from tests.cuda_without_gpu.counting import DeviceWork  # noqa: E402

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, gcnArchName=""
)
MEMORY_SIZES = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
KERNELS = {name: tuple(kernels) for name, kernels in REGISTERS.items()}


def note_launch(name: str, count: int = 1) -> None:
    if DeviceWork.active is not None:
        DeviceWork.active.note_launch(name, count)


def note_wait(kind: str) -> None:
    if DeviceWork.active is not None:
        DeviceWork.active.note_wait(kind)


class FakeEvent:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note_wait("event.synchronize()")

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 1.0


class FakeStream:
    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "FakeStream":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or FakeEvent()

    def synchronize(self) -> None:
        note_wait("stream.synchronize()")


class FakeKernel:
    """Stands for a Triton kernel: it counts its launches, and looks at the tensors that it gets."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            wrong = [tensor.device for tensor in tensors if tensor.device.type != "cuda"]
            assert not wrong, f"{self.name} got a tensor on {wrong[0]}"
            assert all(tensor.stride(-1) == 1 for tensor in tensors), f"{self.name}: rows are not contiguous"
            note_launch(f"triton {self.name}")

        return launch


def install() -> None:
    """Put everything in place of torch.cuda."""
    stands = {
        **{name: _returns(None) for name in ("_lazy_init", "empty_cache", "reset_peak_memory_stats", "set_device")},
        **{name: _returns(0) for name in MEMORY_SIZES},
        **{name: _returns(contextlib.nullcontext()) for name in ("device_of", "stream", "device")},
        "Event": FakeEvent,
        "Stream": FakeStream,
        "current_device": _returns(0),
        "current_stream": _returns(FakeStream()),
        "default_stream": _returns(FakeStream()),
        "device_count": _returns(1),
        "get_device_capability": _returns((PROPERTIES.major, PROPERTIES.minor)),
        "get_device_name": _returns(PROPERTIES.name),
        "get_device_properties": _returns(PROPERTIES),
        "is_available": _returns(True),
        "is_bf16_supported": _returns(True),
        "is_current_stream_capturing": _returns(False),
        "is_initialized": _returns(True),
        "memory_stats": _returns(Counter()),
        "synchronize": lambda *args: note_wait("cuda.synchronize()"),
    }
    for name, value in stands.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _returns(None), _returns(None)
    torch.Tensor.record_stream = _returns(None)
    torch.Tensor.pin_memory = lambda tensor, *args: tensor  # the fake form is not there
    torch.nn.Module._apply = lambda self, fn, recurse=True: self  # weights are where they belong
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # whatever torch.cuda says
    FakeTensor.tolist = _read_list
    torch.nn.functional.scaled_dot_product_attention = _attention
    torch.nn.functional.rms_norm = _rms_norm
    torch.nn.functional.grouped_mm = _grouped_mm(torch.nn.functional.grouped_mm)
    _stand_for_triton()


def _returns(value: Any) -> Any:
    """A function of its own for each name: dynamo refuses one function under two."""
    return lambda *args, **kwargs: value


def _read_list(tensor: FakeTensor) -> Any:
    """Made-up numbers of a tensor, as nested lists: a read on the device is one wait, whatever the size."""
    work = DeviceWork.active
    assert work is not None, "numbers are read only where work is counted"
    if tensor.device.type == "cuda":
        work.note_wait("tolist()")
    number: Any = work.value(tensor.dtype)
    for size in reversed(tensor.shape):
        number = [number] * size
    return number


class _FusedNorm(torch.autograd.Function):
    """The kernel that torch takes for RMSNorm on CUDA; its CPU build makes ten operations of it."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        assert x.dtype == weight.dtype, "with another dtype of the weight torch does not take its kernel"
        ctx.save_for_backward(x, weight)
        note_launch("_fused_rms_norm")
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, Any]:
        x, weight = ctx.saved_tensors
        note_launch("_fused_rms_norm_backward", 2)
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    return _FusedNorm.apply(x, weight)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """The kernel that CUDA would take: flash without a mask, else the memory-efficient one."""
    if options.get("enable_gqa") and query.shape[1] != key.shape[1]:  # a view: the kernel does not copy
        key, value = (
            each.unsqueeze(2).expand(-1, -1, query.shape[1] // each.shape[1], -1, -1).flatten(1, 2)
            for each in (key, value)
        )
    assert key.dtype == query.dtype == value.dtype, "attention takes one dtype"
    # cuDNN wins the choice where it is not off: with a mask it has NaN gradients at some lengths (pytorch#196678), in
    # decoding it can be wrong (pytorch#193893).
    assert is_causal or not torch.backends.cuda.cudnn_sdp_enabled(), "cuDNN must be off with a mask and in decoding"
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, 0.0, is_causal)[0]


def _grouped_mm(real: Any) -> Any:
    def grouped_mm(a: Any, b: Any, *, offs: Any = None, **options: Any) -> Any:
        assert offs is None or offs.dtype == torch.int32, "offsets are int32"
        # Without rows CUDA's kernel gets a null pointer (Megatron-LM#4851).
        assert 0 not in a.shape, "grouped_mm must not be called without rows"
        if a.dtype == torch.bfloat16:
            return real(a, b, offs=offs, **options)
        note_wait("grouped_mm, not in bf16: offsets to the host")  # one expert after the other (torch 2.13)
        narrow = torch.bfloat16  # the fake form takes nothing else
        return real(a.to(narrow), b.to(narrow), offs=offs, **options).to(a.dtype)

    return grouped_mm


def _stand_for_triton() -> None:
    from moe_train.ops import kernels

    for module, names in KERNELS.items():
        for name in names:
            setattr(importlib.import_module(f"moe_train.ops.{module}"), name, FakeKernel(name))
    kernels._has_triton.cache_clear()
