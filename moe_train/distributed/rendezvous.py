"""Rendezvous of the ranks: the store of torch.distributed, and the errors if another process has taken its port.

torch is imported inside the functions, so that a wrong setting is reported before torch is loaded.
"""

from __future__ import annotations

import queue
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moe_train.config.errors import UsageError
from moe_train.distributed.addresses import accepts_connections
from moe_train.distributed.missing_ranks import NOTICE_SECONDS, Notice, say_error
from moe_train.distributed.world import World

if TYPE_CHECKING:
    import torch

_ANSWER_SECONDS = 20.0  # for a listening store to answer; a good one answers at once
_NAME_SECONDS = 10.0  # for rank 0 to write the launch's name, which it does first
_ASK_SECONDS = 0.1  # between two polls whether rank 0 listens yet
_RESOLVE_SECONDS = 30.0  # for the master's name to resolve: Kubernetes creates a pod's name as the pod starts
LAUNCH_MARK = "MOE_TRAIN_LAUNCH"  # environment variable of all processes of a `moe-train launch`
LAUNCH_OWNER = "MOE_TRAIN_LAUNCH_OWNER"  # environment variable: identity of the process that started the launcher
RANK_ENDED = signal.SIGUSR2  # to that process, when a rank had to be ended because its launcher was gone
_LAUNCH_KEY, _SEATS = "moe_train/launch", "moe_train/seat"


def open_store(
    world: World, timeout: timedelta, environ: Mapping[str, str], say: Callable[[str], None] = say_error
) -> Any:
    """Open the store in which the ranks of this launch meet.

    Args:
        world: Place of this process among the ranks.
        timeout: Time to wait for the other ranks, here and in operations of the store.
        environ: Environment variables of this process.
        say: Called with a message if ranks are missing after a while.

    Returns:
        Store of torch.distributed.

    Raises:
        UsageError: On every rank, if the master's port is taken, or its name does not resolve.
        TimeoutError: If nothing listens at the master's port, or a rank does not come.
        ConnectionError: If rank 0 was lost meanwhile.

    Collective: All ranks.
    """
    import torch.distributed as dist

    if world.world_size == 1:
        return dist.HashStore()  # no port: nothing can clash
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return join_agent(world, timeout, Notice(world, environ, say))
    return open_rendezvous(world, timeout, environ, say)


def wait_for_ranks(
    store: Any, world: World, timeout: timedelta, environ: Mapping[str, str], say: Callable[[str], None] = say_error
) -> None:
    """Wait until every rank has opened the store of `open_store`, and say after a while which ranks have not.

    Args:
        store: The store.
        world: Place of this process among the ranks.
        timeout: Time to wait for the other ranks.
        environ: Environment variables of this process.
        say: Called with the message.

    Raises:
        TimeoutError: On rank 0, if a rank does not come.
    """
    import torch.distributed as dist

    if world.rank > 0 or not isinstance(store, dist.TCPStore):  # others wait for rank 0; under torchrun all have met
        return
    notice, started = Notice(world, environ, say), time.monotonic()
    seats = {rank: f"{_SEATS}/{rank}" for rank in range(1, world.world_size)}
    while True:
        passed = time.monotonic() - started
        limit = (NOTICE_SECONDS if passed < NOTICE_SECONDS else timeout.total_seconds()) - passed
        try:
            store.wait(list(seats.values()), timedelta(seconds=max(_ASK_SECONDS, limit)))
        except dist.DistStoreError as error:  # the time is over
            passed = time.monotonic() - started
            missing = [rank for rank, seat in seats.items() if not store.check([seat])]
            if missing and passed >= timeout.total_seconds():
                raise notice.timeout(missing, passed) from error
            notice.give(missing, passed)
        else:
            return


def join_group(store: Any, world: World, device: torch.device, timeout: timedelta) -> None:
    """Join torch.distributed with gloo, and on CUDA also NCCL, so that tensors on both devices can be reduced.

    Args:
        store: Store of `open_store`.
        world: Place of this process among the ranks.
        device: Device of this rank.
        timeout: Timeout of a collective operation.

    Collective: All ranks.
    """
    import torch
    import torch.distributed as dist

    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = {"backend": "cpu:gloo,cuda:nccl"}
        if world.world_size > 1:  # bound, every further group would split a communicator of one rank (DeepSpeed#8248)
            options["device_id"] = device
    dist.init_process_group(rank=world.rank, world_size=world.world_size, store=store, timeout=timeout, **options)


def open_rendezvous(
    world: World, timeout: timedelta, environ: Mapping[str, str], say: Callable[[str], None] = say_error
) -> Any:
    """Open the store that rank 0 holds at the master's address and port.

    Another launch may hold a store there. So rank 0 writes its launch's name into its store. Each other rank continues
    only if it reads its own launch's name, and then takes its seat. A seat that is already taken shows that the store
    belongs to another launch with the same name.

    Args:
        world: Place of this process among the ranks.
        timeout: Time to wait for the other ranks, here and in operations of the store.
        environ: Environment variables of this process.
        say: Called with a message if ranks are missing after a while.

    Raises:
        UsageError: If the master's name does not resolve, or its port is taken. Rank 0 raises at once; the other ranks
            raise when the port gives no answer, or another launch's.
        TimeoutError: If nothing listens at the master's port, or a rank does not come.
        ConnectionError: If rank 0 was lost meanwhile.

    Collective: All ranks.
    """
    import torch.distributed as dist

    name, notice = launch_name(world, environ), Notice(world, environ, say)
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
    started = time.monotonic()
    while not accepts_connections(world.master_addr, world.master_port):  # rank 0 may be late
        notice.give([0], time.monotonic() - started)
        if time.monotonic() - started > timeout.total_seconds():
            raise TimeoutError(
                f"nothing listened at {world.master_addr}, port {world.master_port}, for {timeout.total_seconds():.0f} "
                "s: rank 0 has not come, or a firewall is between the hosts"
            )
        time.sleep(_ASK_SECONDS)
    store = _connect(world, min(timeout.total_seconds(), _ANSWER_SECONDS), lambda reason: _taken(world, reason))
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
    """Build a name that all ranks of a launch have in common, and that ranks of another launch mostly do not have."""
    names = {"srun": ("SLURM_JOB_ID", "SLURM_STEP_ID"), "mpirun": ("PMIX_NAMESPACE",)}
    names |= {"torchrun": ("TORCHELASTIC_RUN_ID",)}
    known = [f"{name}={environ.get(name, '')}" for name in (LAUNCH_MARK, *names.get(world.launcher, ()))]
    return " ".join([f"{world.world_size} ranks", world.launcher, *known])


def _resolve(world: World, seconds: float) -> None:
    """Wait until the master's name resolves here. torch alone would only say that the port cannot be reached."""
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


def _connect(world: World, seconds: float, failure: Callable[[str], Exception]) -> Any:
    """Connect to the store at the master's port. Raises what `failure` makes of a reason."""
    import torch.distributed as dist

    # In a thread: torch (2.13) waits without end for the answer of a process that accepts connections and says nothing.
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
        raise failure("what listens there gives no answer") from None
    if isinstance(answer, RuntimeError):
        raise failure("what listens there is not rank 0's store") from answer
    return answer


def _taken(world: World, reason: str) -> UsageError:
    return UsageError(
        f"MASTER_PORT ({world.master_port}): rank 0 cannot listen there on {world.master_addr} ({reason}); choose "
        "another port (deepspeed and torchrun: --master_port)"
    )


def join_agent(world: World, timeout: timedelta, notice: Notice) -> Any:
    """Join the store that a torchrun agent holds, under a name for this start of the ranks.

    Args:
        world: Place of this process among the ranks.
        timeout: Time to wait for the other ranks, here and in operations of the store.
        notice: Message about ranks that are missing.

    Raises:
        ConnectionError: If the agent does not answer.
        TimeoutError: If a rank does not come.

    Collective: All ranks.
    """
    import torch.distributed as dist

    def gone(reason: str) -> ConnectionError:
        return ConnectionError(f"torchrun's agent at {world.master_addr}, port {world.master_port}: {reason}")

    held = _connect(world, min(timeout.total_seconds(), _ANSWER_SECONDS), gone)
    held.set_timeout(timeout)
    return dist.PrefixStore(_meet(held, world, timeout, notice), held)


def _meet(store: Any, world: World, timeout: timedelta, notice: Notice) -> str:
    """Agree with the ranks of this start on a name, for a store that torchrun's agent holds.

    The agent keeps one store for all restarts, and torch 2.13 adds no prefix per restart. So restarted ranks would read
    the addresses of ranks that are gone, and wait for them. The agent's count of restarts cannot be the name: agents
    count separately, and a node that joins or leaves is not counted. So each rank asks under a name of its own. Rank 0
    answers every rank that has asked, also ranks of an earlier start, until all ranks of this start have the answer.

    Collective: All ranks.
    """
    own = uuid.uuid4().hex
    if world.rank > 0:
        store.set(f"ask/{world.rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"heard/{name}/{world.rank}", "")
        return name
    started, others = time.monotonic(), range(1, world.world_size)
    questions, heard = [f"ask/{rank}" for rank in others], [f"heard/{own}/{rank}" for rank in others]
    while not store.check(heard):
        if store.check(questions):
            asking = [f"answer/{name.decode()}" for name in store.multi_get(questions)]
            store.multi_set(asking, [own] * len(asking))
        passed, limit = time.monotonic() - started, timeout.total_seconds()
        if notice.is_due(passed) or passed > limit:  # asked seldom: it takes a request per rank
            missing = [rank for rank in others if not store.check([f"heard/{own}/{rank}"])]
            notice.give(missing, passed)
            if passed > limit:
                raise notice.timeout(missing, passed)
        time.sleep(0.02)
    return own
