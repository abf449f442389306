"""Real ranks for tests: processes joined by gloo that are started once and run one function after another.

    with RankPool(4) as pool:
        results = pool.run(function, first, second, timeout=60)  # [function(rank, 4, first, second) for each rank]

Workers are forked by a server that has torch loaded (0.1 s a start, against 5 s for four spawned interpreters on two
cores). They are started by the first run, and anew after a run that failed, since a rank that stopped half-way leaves
its collectives out of step. A run starts with torch seed 0, one thread, and the environment of the workers' start.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

START_SECONDS = 180  # the server imports torch first, on a busy machine
GRACE_SECONDS = 2  # for the other ranks to answer after one has failed
STACKS_SIGNAL = signal.SIGUSR2  # makes a worker write where it stands; USR1 is the trainer's own


class RankTraceback(Exception):
    """The traceback of a worker, as the cause of the exception raised in the parent."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class Failure:
    """An exception of one rank and its traceback."""

    rank: int
    exception: BaseException
    traceback: str


@dataclass(frozen=True)
class Worker:
    """One rank's process and the parent's end of its pipe."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection


class RankPool:
    """`world_size` processes with torch.distributed (gloo) initialised, reused from run to run.

    Args:
        world_size: number of ranks.
        group_timeout: seconds after which a collective operation that does not complete fails in its rank.
    """

    def __init__(self, world_size: int, group_timeout: float = 300) -> None:
        self.world_size = world_size
        self.group_timeout = group_timeout
        self._workers: list[Worker] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Calls `function(rank, world_size, *args)` on every rank.

        Args:
            function: a function at the top level of a module (it travels by name); it must not destroy the group.
            args: picklable values, the same for all ranks.
            timeout: seconds for the run; the start of the workers is not counted.
        Returns: the results in the order of ranks.
        Raises: what the first failing rank raised, with its traceback as cause and its rank as note; TimeoutError
            with the ranks that did not answer and where they stand; RuntimeError where a rank's process ended.
        """
        task = pickle.dumps((function, args))  # plain pickle: tensors travel by value, not through shared memory
        if not self._workers:
            self._start()
        for worker in self._workers:
            worker.pipe.send_bytes(task)
        return self._results(timeout)

    def close(self) -> None:
        """Ends the workers; the next run starts new ones."""
        for worker in self._workers:
            worker.process.kill()  # nothing to save, and a worker may hang in a collective
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        with environment(OMP_NUM_THREADS="1"):  # read when the server loads torch
            for rank in range(self.world_size):
                parent_end, child_end = context.Pipe()
                args = (rank, self.world_size, self._folder.name, self.group_timeout, child_end)
                process = context.Process(target=work, args=args, name=f"rank{rank}", daemon=True)
                process.start()
                child_end.close()  # so that the end of the process closes the pipe
                self._workers.append(Worker(process, parent_end))
        self._results(START_SECONDS)

    def _results(self, timeout: float) -> list[Any]:
        answers, failures = self._answers(timeout)
        missing = [rank for rank in range(self.world_size) if rank not in answers]
        if not failures and not missing:
            return [answers[rank] for rank in range(self.world_size)]
        stacks = self._stacks(missing)
        self.close()
        if failures:
            raise_failure(failures, missing, self.world_size)
        raise TimeoutError(f"no answer of ranks {missing} of {self.world_size} within {timeout} s{stacks}")

    def _answers(self, timeout: float) -> tuple[dict[int, Any], list[Failure]]:
        """Answers by rank (a failed rank's answer is its Failure), and the failures, first one first."""
        answers: dict[int, Any] = {}
        failures: list[Failure] = []
        deadline = time.monotonic() + timeout
        while waiting := [rank for rank in range(self.world_size) if rank not in answers]:
            ready = wait([self._workers[rank].pipe for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank in waiting if self._workers[rank].pipe in ready]:
                answers[rank] = self._receive(rank)
                if isinstance(answers[rank], Failure):
                    failures.append(answers[rank])
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers, failures

    def _receive(self, rank: int) -> Any:
        worker = self._workers[rank]
        try:
            return pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            worker.process.join(GRACE_SECONDS)
            message = f"the process of rank {rank} ended with exit code {worker.process.exitcode}"
            return Failure(rank, RuntimeError(message), message)

    def _stacks(self, ranks: list[int]) -> str:
        """Where the given ranks stand, written by themselves."""
        for rank in ranks:
            process = self._workers[rank].process
            if process.is_alive():
                assert process.pid is not None, "the process was started"
                os.kill(process.pid, STACKS_SIGNAL)
        if ranks:
            time.sleep(0.2)  # the workers are writing
        assert self._folder is not None, "the workers were started"
        files = {rank: stacks_file(self._folder.name, rank) for rank in ranks}
        return "".join(f"\n--- rank {rank}\n{file.read_text()}" for rank, file in files.items() if file.exists())


def raise_failure(failures: list[Failure], missing: list[int], world_size: int) -> None:
    """Raises the first failure, and says what the other ranks did."""
    first, *others = failures
    first.exception.add_note(f"raised on rank {first.rank} of {world_size}")
    for other in others:
        first.exception.add_note(f"rank {other.rank} then raised {type(other.exception).__name__}: {other.exception}")
    if missing:
        first.exception.add_note(f"ranks {missing} had not answered {GRACE_SECONDS} s later")
    raise first.exception from RankTraceback(first.traceback)


def work(rank: int, world_size: int, folder: str, group_timeout: float, pipe: Connection) -> None:
    """A worker: joins the group, says so, then answers tasks until the parent closes the pipe."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    faulthandler.register(STACKS_SIGNAL, file=stacks_file(folder, rank).open("w"))
    answer(pipe, rank, join_group, rank, world_size, folder, group_timeout)
    environ = dict(os.environ)
    while True:
        try:
            task = pipe.recv_bytes()
        except (EOFError, KeyboardInterrupt):
            return
        os.environ.clear()
        os.environ.update(environ)
        answer(pipe, rank, run_task, task, rank, world_size)


def join_group(rank: int, world_size: int, folder: str, group_timeout: float) -> None:
    """Initialises torch.distributed through a file in `folder`."""
    from datetime import timedelta

    import torch.distributed

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=group_timeout),
    )


def run_task(task: bytes, rank: int, world_size: int) -> Any:
    """Calls the pickled (function, args) of a run."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    function, args = pickle.loads(task)
    return function(rank, world_size, *args)


def answer(pipe: Connection, rank: int, function: Callable[..., Any], *args: Any) -> None:
    """Sends what `function(*args)` returns, or its failure."""
    try:
        message = pickle.dumps(function(*args))
    except BaseException as exception:  # SystemExit too: the parent must hear of it
        text = "".join(traceback.format_exception(exception))
        message = pickle.dumps(Failure(rank, portable(exception), text))
    pipe.send_bytes(message)


def portable(exception: BaseException) -> BaseException:
    """The exception itself where it survives pickling, else a RuntimeError with its type and message."""
    try:
        pickle.loads(pickle.dumps(exception))
    except Exception:  # whatever it raises, it cannot travel
        return RuntimeError(f"{type(exception).__name__}: {exception}")
    return exception


def end_with_parent() -> None:
    """Ends this process when its parent is gone, also out of a collective that would wait for its timeout."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a child"
    wait([parent.sentinel])
    os._exit(1)


def stacks_file(folder: str, rank: int) -> Path:
    """Where a worker writes its stacks."""
    return Path(folder) / f"stacks{rank}"


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets environment variables of this process inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
