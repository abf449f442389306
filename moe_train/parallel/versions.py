"""What must be the same on all hosts before their processes can work together."""

import platform
from importlib.metadata import PackageNotFoundError, version

from moe_train import __version__

PACKAGES = ("torch", "deepspeed")


def versions() -> dict[str, str]:
    """The versions that matter, by name; nothing is imported for it."""
    found = {"the version of moe_train": __version__}
    found["the version of python"] = ".".join(platform.python_version_tuple()[:2])
    for name in PACKAGES:
        try:
            found[f"the version of {name}"] = version(name)
        except PackageNotFoundError:
            found[f"the version of {name}"] = "not installed"
    return found
