"""Where the ranks meet: the store of torch.distributed, and a port of it that something else has taken.

torch is imported inside the functions: a wrong setting is reported before torch is loaded.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moe_train.config.errors import UsageError
from moe_train.distributed.addresses import accepts_connections
from moe_train.distributed.world import World

if TYPE_CHECKING:
    import torch

_ANSWER_SECONDS = 20.0  # for a store that listens to answer; it does so at once
_NAME_SECONDS = 10.0  # for rank 0 to write the launch's name, the first thing it does with its store
_ASK_SECONDS = 0.1  # between two looks whether rank 0 listens yet
_RESOLVE_SECONDS = 30.0  # for the master's name to be known: Kubernetes makes that of a pod as it starts
LAUNCH_MARK = "MOE_TRAIN_LAUNCH"  # environment variable of all processes of a `moe-train launch`
_LAUNCH_KEY, _SEATS = "moe_train/launch", "moe_train/seat"


def open_store(world: World, timeout: timedelta, environ: Mapping[str, str]) -> Any:
    """The store in which the ranks of this start meet.

    Args:
        world: The place of this process.
        timeout: To wait for the other ranks, here and in operations of the store.
        environ: Environment variables of this process.

    Raises:
        UsageError: If the master's port is taken, or its name not known; on every rank.
        TimeoutError: If nothing listens there.
        ConnectionError: If rank 0 was lost meanwhile.

    Collective: All ranks.
    """
    import torch.distributed as dist

    if world.world_size == 1:
        return dist.HashStore()  # no port: nothing can clash
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return join_agent(world, timeout)
    return open_rendezvous(world, timeout, environ)


def join_group(store: Any, world: World, device: torch.device, timeout: timedelta) -> None:
    """Joins torch.distributed: gloo, and on CUDA NCCL beside it, so that tensors of both kinds can be reduced.

    Args:
        store: Of `open_store`.
        world: The place of this process.
        device: Of this rank.
        timeout: After which a collective operation that does not complete is an error.

    Collective: All ranks.
    """
    import torch
    import torch.distributed as dist

    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    dist.init_process_group(rank=world.rank, world_size=world.world_size, store=store, timeout=timeout, **options)


def open_rendezvous(world: World, timeout: timedelta, environ: Mapping[str, str]) -> Any:
    """The store that rank 0 holds at the master's address and port.

    Another launch may hold one there: rank 0 writes its launch's name into its own, and each other rank, once it has
    found its launch's name, takes its seat, which is free in a store of a launch of the same name alone if that is its
    own.

    Raises: UsageError where the master's name is not known, or the port is taken: on rank 0 at once, on the others as
    soon as what has it gives no answer or another launch's. TimeoutError, ConnectionError as `open_store`.
    Collective: all ranks.
    """
    import torch.distributed as dist

    name = launch_name(world, environ)
    _resolve(world, min(timeout.total_seconds(), _RESOLVE_SECONDS))
    if world.rank == 0:
        try:
            store = dist.TCPStore(
                world.master_addr, world.master_port, is_master=True, wait_for_workers=False, timeout=timeout
            )
        except (RuntimeError, OSError) as error:
            raise _taken(world, str(error).splitlines()[0]) from error
        store.set(_LAUNCH_KEY, name)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while not accepts_connections(world.master_addr, world.master_port):  # rank 0 may be late
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"nothing listened at {world.master_addr}, port {world.master_port}, for {timeout.total_seconds():.0f} "
                "s: rank 0 has not come, or a firewall is between the hosts"
            )
        time.sleep(_ASK_SECONDS)
    store = _connect(world, min(timeout.total_seconds(), _ANSWER_SECONDS))
    try:
        store.wait([_LAUNCH_KEY], timedelta(seconds=min(timeout.total_seconds(), _NAME_SECONDS)))
        seat = f"{_SEATS}/{world.rank}"
        is_own = store.get(_LAUNCH_KEY).decode() == name and not store.check([seat]) and store.add(seat, 1) == 1
    except dist.DistNetworkError as error:
        raise ConnectionError(
            f"rank 0 at {world.master_addr}, port {world.master_port}, was lost: {str(error).splitlines()[0]}"
        ) from error
    except dist.DistStoreError as error:  # the time is over
        raise _taken(world, "what listens there is not rank 0's store") from error
    if not is_own:
        raise _taken(world, "another launch's rank 0 listens there")
    store.set_timeout(timeout)
    return store


def launch_name(world: World, environ: Mapping[str, str]) -> str:
    """What all ranks of a launch have in common, and those of another mostly have not."""
    names = {"srun": ("SLURM_JOB_ID", "SLURM_STEP_ID"), "mpirun": ("PMIX_NAMESPACE",)}
    names |= {"torchrun": ("TORCHELASTIC_RUN_ID",)}
    known = [f"{name}={environ.get(name, '')}" for name in (LAUNCH_MARK, *names.get(world.launcher, ()))]
    return " ".join([f"{world.world_size} ranks", world.launcher, *known])


def _resolve(world: World, seconds: float) -> None:
    """Wait until the master's name is known here. torch alone would say of it that the port cannot be reached."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(world.master_addr, world.master_port, type=socket.SOCK_STREAM)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"MASTER_ADDR ({world.master_addr!r}): {socket.gethostname()} does not know this host "
                    f"({error.strerror}); set it to the address of rank 0's host, or make the name known to all hosts"
                ) from error
            time.sleep(_ASK_SECONDS)
        else:
            return


def _connect(world: World, seconds: float) -> Any:
    """A connection to the store of what listens there. Raises UsageError if that gives no answer."""
    import torch.distributed as dist

    # In a thread: torch (2.13) waits without end for the answer of something that accepts and says nothing.
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def connect() -> None:
        limit = timedelta(seconds=seconds)
        try:
            answers.put(
                dist.TCPStore(
                    world.master_addr, world.master_port, is_master=False, wait_for_workers=False, timeout=limit
                )
            )
        except RuntimeError as error:
            answers.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise _taken(world, "what listens there gives no answer") from None
    if isinstance(answer, RuntimeError):
        raise _taken(world, "what listens there is not rank 0's store") from answer
    return answer


def _taken(world: World, reason: str) -> UsageError:
    return UsageError(
        f"MASTER_PORT ({world.master_port}): rank 0 cannot listen there on {world.master_addr} ({reason}); choose "
        "another port (deepspeed and torchrun: --master_port)"
    )


def join_agent(world: World, timeout: timedelta) -> Any:
    """The store that an agent of torchrun holds, under a name of this life of the ranks.

    Collective: all ranks.
    """
    import torch.distributed as dist

    held = dist.TCPStore(world.master_addr, world.master_port, is_master=False, timeout=timeout)
    return dist.PrefixStore(_meet(held, world), held)


def _meet(store: Any, world: World) -> str:
    """A name that the ranks of this life agree on, for a store that torchrun's agent holds.

    The agent keeps one store for all restarts, and torch 2.13 puts no prefix before each one's keys: ranks that were
    started again would take the addresses of those that are gone, and wait for them. Its count of restarts is no such
    name: two agents count apart, and not where a node comes or goes. So each rank asks under a name of its own, and
    rank 0 answers whoever has asked, also those of an earlier life, until all of this one have heard it.
    Collective: all ranks.
    """
    own = uuid.uuid4().hex
    if world.rank > 0:
        store.set(f"ask/{world.rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.add(f"heard/{name}", 1)
        return name
    questions = [f"ask/{rank}" for rank in range(1, world.world_size)]
    while store.add(f"heard/{own}", 0) < len(questions):
        asking = [f"answer/{name.decode()}" for name in store.multi_get(questions)]
        store.multi_set(asking, [own] * len(asking))
        time.sleep(0.02)
    return own
