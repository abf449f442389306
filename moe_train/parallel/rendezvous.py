"""Where the ranks meet: the store of torch.distributed, and a port of it that something else has taken.

torch is imported inside the functions: a wrong setting is reported before torch is loaded.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.parallel.addresses import accepts_connections
from moe_train.parallel.world import World

_ANSWER_SECONDS = 20.0  # for a store that listens to answer; it does so at once
_ASK_SECONDS = 0.1  # between two looks whether rank 0 listens yet


def open_rendezvous(world: World, timeout: timedelta) -> Any:
    """The store that rank 0 holds at the master's address and port.

    Raises: UsageError where the port is taken: on rank 0 at once, on the others as soon as what has it gives no answer.
    Collective: all ranks.
    """
    import torch.distributed as dist

    def connect(is_master: bool, seconds: timedelta) -> Any:
        return dist.TCPStore(
            world.master_addr, world.master_port, is_master=is_master, wait_for_workers=False, timeout=seconds
        )

    if world.rank == 0:
        try:
            return connect(True, timeout)
        except (RuntimeError, OSError) as error:
            raise _taken(world, str(error).splitlines()[0]) from error
    deadline = time.monotonic() + timeout.total_seconds()
    while not accepts_connections(world.master_addr, world.master_port):  # rank 0 may be late
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"nothing listened at {world.master_addr}, port {world.master_port}, for {timeout.total_seconds():.0f} "
                "s: rank 0 has not come, or a firewall is between the hosts"
            )
        time.sleep(_ASK_SECONDS)
    try:
        store = connect(False, min(timeout, timedelta(seconds=_ANSWER_SECONDS)))
    except RuntimeError as error:
        raise _taken(world, "what listens there is not rank 0's store") from error
    store.set_timeout(timeout)
    return store


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
