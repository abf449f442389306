"""Key-value store of all ranks, separate from their collectives: it answers while collectives hang. Rank 0 holds it.

The server is a thread of torch in rank 0's process, and needs no GIL. If the server is stopped or cut off, a client's
request blocks without end: send requests from a thread that may block. (The timeout of TCPStore does not help: after it
the client waits again, for the server to confirm that the wait is over; torch 2.13.)
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_train.distributed.collectives import gather_objects, world_group

_CONNECT_SECONDS = 60.0
_REQUEST_DAYS = 30  # longer than any run: see the module's docstring


class KeyStore:
    """Store of texts by key. Several threads may use it; it sends one request at a time."""

    def __init__(self, store: Any) -> None:
        """Wrap a store.

        Args:
            store: Store of torch.distributed.
        """
        self._store = store
        store.set_timeout(timedelta(days=_REQUEST_DAYS))

    def set(self, values: Mapping[str, str]) -> None:
        """Write values.

        Args:
            values: Texts by key.

        Raises:
            ConnectionError: If the process that holds the store is gone.
        """
        try:
            self._store.multi_set(list(values), list(values.values()))
        except RuntimeError as error:  # torch raises RuntimeErrors, for the network and everything else
            raise ConnectionError(str(error).splitlines()[0]) from error

    def get(self, keys: Sequence[str]) -> list[str]:
        """Read values; wait for a key that no rank has written yet.

        Args:
            keys: Keys to read.

        Returns:
            One text per key.

        Raises:
            ConnectionError: If the process that holds the store is gone.
        """
        try:
            return [value.decode() for value in self._store.multi_get(list(keys))]
        except RuntimeError as error:
            raise ConnectionError(str(error).splitlines()[0]) from error


def open_store(address: str, first_values: Mapping[str, str]) -> KeyStore | None:
    """Open a store in rank 0's process, on a free port, and connect every rank to it.

    Args:
        address: Address of rank 0's host, as the other ranks reach it.
        first_values: Texts by key, written before any rank can read. Only rank 0's values count.

    Returns:
        The store; None for one process.

    Raises:
        RuntimeError: On every rank, if a rank cannot open or reach the store.

    Collective: All ranks.
    """
    if world_group() is None:
        return None
    rank, store, port, failure = dist.get_rank(), None, 0, ""
    try:
        if rank == 0:
            store = _connect(address, 0, is_master=True)
            port = store.port
            KeyStore(store).set(first_values)
    except (RuntimeError, OSError) as error:
        failure = _first_line(error)
    port, failure = gather_objects((port, failure))[0]
    try:
        if not failure and rank > 0:
            store = _connect(address, port, is_master=False)
    except RuntimeError as error:
        failure = _first_line(error)
    failures = gather_objects(failure)
    for other, message in enumerate(failures):
        if message:
            raise RuntimeError(f"rank {other}: no store of the ranks at {address}, port {port}: {message}")
    return KeyStore(store)


def _connect(address: str, port: int, is_master: bool) -> dist.TCPStore:
    return dist.TCPStore(
        address, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=_CONNECT_SECONDS)
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
