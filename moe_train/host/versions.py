"""Versions of software that must be the same on all hosts before their processes can work together."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from moe_train.config.version import VERSION

PACKAGES = ("torch", "deepspeed")


def software(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of moe_train, Python and packages, by name; nothing is imported for it.

    Args:
        packages: Names of distributions; a missing one has the version "not installed".
    """
    found = {"moe_train": VERSION, "python": ".".join(platform.python_version_tuple()[:2])}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def versions() -> dict[str, str]:
    """Return the versions that matter to training, with keys such as "the version of torch"."""
    return {f"the version of {name}": number for name, number in software().items()}
