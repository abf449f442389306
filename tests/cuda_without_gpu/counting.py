"""What a piece of work would do to a GPU: kernels launched, waits of the host, fp32 copies, products in fp32.

Each is noted with the line of this project that asked for it.
"""

import os
import sys
from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
OWN = (os.path.join(ROOT, "moe_train"), HERE)
STANDS = (os.path.abspath(__file__), os.path.join(HERE, "fake_cuda.py"))
# Operations that launch nothing: views, memory without values, questions about a tensor.
FREE = frozenset(
    (
        *(
            "alias",
            "as_strided",
            "chunk",
            "detach",
            "device",
            "diagonal",
            "empty",
            "empty_like",
            "empty_strided",
            "expand",
        ),
        *("is_pinned", "lift_fresh", "new_empty", "new_empty_strided", "permute", "record_stream", "resize_", "select"),
        *("set_", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze"),
        *("view", "view_as_real", "_has_compatible_shallow_copy_type", "_reshape_alias", "_unsafe_view"),
    )
)
# Operations that launch several kernels (torch 2.13, by reading; a sort: its radix passes). All others launch one.
LAUNCHES = {
    "argsort": 6,
    "bincount": 3,
    "cumsum": 2,
    "embedding_bag": 3,
    "index_put_": 2,
    "repeat_interleave": 3,
    "scatter": 2,
    "scatter_add": 2,
    "sort": 6,
    "topk": 2,
    "_foreach_norm": 2,
    "_grouped_mm": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
}
PRODUCTS = frozenset(("addmm", "baddbmm", "bmm", "mm", "_grouped_mm"))
SIZE_ON_HOST = frozenset(("masked_select", "nonzero", "unique_dim", "_unique2"))  # the host reads the output's size


def asking_line() -> str:
    """The line that asks for what is being done, as file:line.

    It is the innermost line of this project, with that of DeepSpeed behind it where DeepSpeed asks. Only autograd has
    neither: its nodes for torch's own operations run below no Python code.
    """
    frame, deepspeeds = sys._getframe(1), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/deepspeed/" in path and not deepspeeds:
            deepspeeds = f"deepspeed/{path.rpartition('/deepspeed/')[2]}:{frame.f_lineno}"
        elif path.startswith(OWN) and not path.startswith(STANDS):
            return f"{os.path.relpath(path, ROOT)}:{frame.f_lineno}" + (f" by {deepspeeds}" if deepspeeds else "")
        frame = frame.f_back
    return deepspeeds or "autograd"


class DeviceWork(TorchDispatchMode):
    """Counts the work on fake devices while it is active, and answers reads of numbers that do not exist.

    Attributes:
        launches: Estimated kernel launches, by operation.
        lines: The same by line.
        waits: Waits of the host for the device, by kind and line.
        wide_bytes: Bytes of fp32 copies that are made of 16-bit tensors with several dimensions, by line.
        wide_products: Matrix products with fp32 operands, by line.
        number: What a read integer is: for all-to-alls, rows for each rank.
    """

    active: "DeviceWork | None" = None

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number = number
        self.launches: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.wide_bytes: Counter[str] = Counter()
        self.wide_products: Counter[str] = Counter()

    def __enter__(self) -> "DeviceWork":
        DeviceWork.active = self
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        DeviceWork.active = None
        super().__exit__(*exception)

    def note_wait(self, kind: str) -> None:
        self.waits[f"{kind} at {asking_line()}"] += 1

    def note_launch(self, name: str, count: int = 1) -> None:
        self.launches[name] += count
        self.lines[asking_line()] += count

    def read(self, tensor: torch.Tensor) -> bool | int | float:
        """Answer for a number of a fake tensor; on the host it was there already."""
        if tensor.device.type == "cuda":
            self.note_wait("item()")
        return self.value(tensor.dtype)

    def value(self, dtype: torch.dtype) -> bool | int | float:
        """The made-up value of a number: counts are int64, flags (of overflow) are bool and uint8."""
        return 1.0 if dtype.is_floating_point else self.number if dtype == torch.int64 else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return self.read(args[0])
        if name == "equal":
            self.note_wait("equal()")
            return True
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not any(tensor.device.type == "cuda" for tensor in given + made) or space == "c10d":
            return out
        if name in SIZE_ON_HOST:
            self.note_wait(name)
        if name in ("_to_copy", "copy_"):
            self._note_copy(name, args, kwargs, given, made)
        if name in PRODUCTS and any(tensor.dtype == torch.float32 for tensor in given):
            self.wide_products[asking_line()] += 1
        if name not in FREE:
            self.note_launch(name, LAUNCHES.get(name, 1))
        return out

    def _note_copy(self, name: str, args: Any, kwargs: Any, given: list, made: list) -> None:
        source = args[1] if name == "copy_" else args[0]
        target = made[0]
        is_free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if source.device.type != target.device.type and not is_free:
            self.note_wait("copy to the host" if target.device.type == "cpu" else "copy from pageable memory")
        if source.dtype.itemsize == 2 and target.dtype == torch.float32 and source.dim() > 1:
            self.wide_bytes[asking_line()] += target.nbytes
