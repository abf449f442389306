"""Local rank of a process whose LOCAL_RANK has become the number of its device."""

import os
from collections.abc import Mapping, MutableMapping

# Its value has the process's id too: processes that this one starts have other ranks.
OWN_LOCAL_RANK = "MOE_TRAIN_LOCAL_RANK"


def remember_local_rank(environ: MutableMapping[str, str], local_rank: int) -> None:
    """Write the local rank of this process into the environment, for `with_own_local_rank`."""
    environ[OWN_LOCAL_RANK] = f"{local_rank} {os.getpid()}"


def has_own_local_rank(environ: Mapping[str, str]) -> bool:
    """Return whether this process has written its local rank."""
    _, _, pid = environ.get(OWN_LOCAL_RANK, "").partition(" ")
    return pid == str(os.getpid())


def with_own_local_rank(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment with the local rank that this process has written, if it has, as LOCAL_RANK."""
    if not has_own_local_rank(environ):
        return environ
    return {**environ, "LOCAL_RANK": environ[OWN_LOCAL_RANK].partition(" ")[0]}
