"""moe_train: expert-parallel training of Mixture-of-Experts language models.

`moe_train.api` describes the Python interface; its names are here too, and are loaded when they are first used.
"""

import importlib
from typing import Any

__all__ = [
    "Config",
    "LoadedRun",
    "RunFailed",
    "UsageError",
    "build_model",
    "load_config",
    "load_run",
    "open_data",
    "run_training",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("moe_train.config.version").VERSION
    if name not in __all__:
        raise AttributeError(f"module 'moe_train' has no attribute {name!r}")
    return getattr(importlib.import_module("moe_train.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
