"""Worlds of real ranks that are killed, stopped or stuck: processes of their own, joined by gloo, ended by the test."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed

from moe_train.distributed.flight_recorder import FlightRecorder
from moe_train.liveness.hang_report import Reporter
from moe_train.liveness.peers import PeerMonitor, join_peers
from tests.ranks import end_with_parent, environment

SIZE = 3
GROUP_SECONDS = 300  # for a collective: none of these tests waits for it


class Rank:
    """What a rank of a test works with."""

    def __init__(self, rank: int, folder: Path, peer_timeout: float, grace_seconds: float) -> None:
        self.rank, self.folder, self.flight_recorder = rank, folder, FlightRecorder()
        self.log = (folder / f"log_{rank}").open("w")
        self.second_log = (folder / f"second_log_{rank}").open("w")
        streams = (self.log, self.second_log)
        self.reporter = Reporter(rank, self.flight_recorder, streams, grace_seconds=grace_seconds)
        self.peers: PeerMonitor = join_peers("127.0.0.1", rank, SIZE, peer_timeout, self.reporter)

    def say(self, **values: Any) -> None:
        """Leave values for the test."""
        part = self.folder / f"part_{self.rank}"
        part.write_text(json.dumps(values))
        part.replace(self.folder / f"said_{self.rank}")


class RankWorld:
    """Ranks that run one function; none is left at the end of the block."""

    def __init__(
        self,
        function: Callable[..., None],
        folder: Path,
        *args: Any,
        peer_timeout: float = 5,
        grace_seconds: float = 1.5,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self.processes: list[BaseProcess] = [
            context.Process(target=_run, args=(function, rank, folder, peer_timeout, grace_seconds, args), daemon=True)
            for rank in range(SIZE)
        ]

    def __enter__(self) -> Self:
        with environment(OMP_NUM_THREADS="1"):  # read when the server loads torch
            for process in self.processes:
                process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()  # ends a stopped one too
            process.join()

    def wait(self, ranks: list[int], seconds: float) -> dict[int, int | None]:
        """Exit codes of ranks, None for one that has not ended in time."""
        deadline = time.monotonic() + seconds
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return {rank: self.processes[rank].exitcode for rank in ranks}

    def report(self, rank: int) -> str:
        """What a rank wrote, the same to both streams but for the moment of its stacks."""
        first, second = ((self.folder / f"{name}_{rank}").read_text() for name in ("log", "second_log"))
        assert first.splitlines()[:3] == second.splitlines()[:3]
        return first

    def said(self, rank: int) -> dict[str, Any]:
        """What a rank left by `Rank.say`."""
        return json.loads((self.folder / f"said_{rank}").read_text())


def reduce_all() -> None:
    """One all-reduce of the world."""
    torch.distributed.all_reduce(torch.ones(4))


def _run(
    function: Callable[..., None], rank: int, folder: Path, peer_timeout: float, grace_seconds: float, args: tuple
) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=GROUP_SECONDS),
    )
    function(Rank(rank, folder, peer_timeout, grace_seconds), *args)
    os._exit(0)  # as the trainer does: the groups' threads are not waited for
