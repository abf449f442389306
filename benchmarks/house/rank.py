"""A rank that trains a small model, and writes what one MoE layer's forward pass executes: run by rows.py.

    PYTHONPATH=TREE python benchmarks/house/rank.py OUTPUT OPTIONS...

It runs `moe-train train OPTIONS` of the package in TREE, with `MoELayer.forward` wrapped: in its third call, which no
longer makes what is made once, every call of a function is looked at by `sys.setprofile`. It imports nothing of the
benchmarks, for the tree may be of a commit that has none of them.
"""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = "moe_train"
TRACED_CALL = 3


class PathTrace:
    """Collects the package's files and classes whose code runs.

    A class counts if a method of its own runs, also one that a subclass inherits, or if an object of it is made or
    gets a call. Methods that dataclass writes count for the class. Classes of torch and others do not count, nor do
    functions outside classes, whose file counts.

    Attributes:
        files: Paths in the tree, with "/".
        classes: Names as "module:Class".
    """

    def __init__(self, root: Path) -> None:
        """Prepare to trace.

        Args:
            root: Folder that holds the package.
        """
        self.files: set[str] = set()
        self.classes: set[str] = set()
        self._root = root

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Look at an event of the interpreter, as `sys.setprofile` wants it."""
        module = frame.f_globals.get("__name__", "")
        if event != "call" or not self._is_ours(module):
            return
        self.files.add(self._file(module))
        code = frame.f_code
        owner, _, _ = code.co_qualname.rpartition(".")
        if owner and "<" not in owner:
            self._add(functools.reduce(getattr, owner.split("."), sys.modules[module]))
        first = code.co_varnames[:1]
        if first and first[0] in ("self", "cls"):
            subject = frame.f_locals.get(first[0])
            self._add(subject if inspect.isclass(subject) else type(subject))

    def _add(self, owner: Any) -> None:
        if inspect.isclass(owner) and self._is_ours(owner.__module__):
            self.classes.add(f"{owner.__module__}:{owner.__qualname__}")
            self.files.add(self._file(owner.__module__))

    def _is_ours(self, module: str) -> bool:
        return module == PACKAGE or module.startswith(f"{PACKAGE}.")

    def _file(self, module: str) -> str:
        return Path(sys.modules[module].__file__ or "").resolve().relative_to(self._root).as_posix()


def trace_layer(layer: type, root: Path, output: Path) -> None:
    """Wrap a layer's forward so that one call is traced and what it executes is written.

    Args:
        layer: Class of the MoE layer.
        root: Folder that holds the package.
        output: JSON file to write.
    """
    forward: Callable[..., Any] = layer.forward  # type: ignore[attr-defined]
    num_calls = 0

    @functools.wraps(forward)
    def traced(*arguments: Any, **named: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls != TRACED_CALL:
            return forward(*arguments, **named)
        trace = PathTrace(root)
        sys.setprofile(trace)
        try:
            result = forward(*arguments, **named)
        finally:
            sys.setprofile(None)
        output.write_text(json.dumps({"files": sorted(trace.files), "classes": sorted(trace.classes)}))
        return result

    layer.forward = traced  # type: ignore[attr-defined]


def main(output: str, *options: str) -> int:
    """Train with the layer traced.

    Args:
        output: JSON file to write; the rank is added to its name.
        options: Options of `moe-train train`.

    Returns:
        Exit code of the training.
    """
    import moe_train
    from moe_train.cli.main import main as run_command
    from moe_train.model.moe.layer import MoELayer

    root = Path(moe_train.__file__).resolve().parents[1]
    trace_layer(MoELayer, root, Path(f"{output}.{os.environ['RANK']}"))
    return run_command(["train", *options])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
