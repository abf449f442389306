"""Ranks of this machine as processes forked from a server that has imported everything already.

    with ForkServer(["moe_train.train.loop"], environment) as server:
        rank = server.start("moe_train.cli.main:main", ["train"], environment)
        result = rank.wait(timeout=60)

A start costs a fork in place of the import of torch and DeepSpeed (4 s of a core). The server is an interpreter of its
own with one thread and a private channel: multiprocessing has only one fork server a process, whose modules are fixed
by whoever starts it first. A child becomes what a command of its own would be: its own environment, arguments, output
files and session, default signals, the interpreter's own end. It shares with its siblings what is settled before a
fork, such as the seed of Python's hashes. CUDA is not to be forked: on the CPU only.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from moe_train.host.cores import usable_cores

_END_SECONDS = 10  # for the server to end its children and itself
_LONGEST_PAUSE_SECONDS = 0.02  # between two looks at a child that is waited for
_KEPT_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)  # as every Python interpreter has them
_TAIL_CHARACTERS = 3000  # of the server's log in an error message
# Run by a fresh interpreter. The environment is handed in, since it is read in bootstrap.py and launch/ only.
_SERVER = "import os, sys; sys.path[:] = {path!r}; from {module} import serve; serve({descriptor}, os.environ)"


@dataclass(frozen=True)
class RankResult:
    """What a rank left.

    Attributes:
        returncode: Its exit code; negative: the signal that ended it.
        stdout: All that it wrote there.
        stderr: Likewise.
        seconds: From its start to when its end was seen.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float


class ForkedRank:
    """A process that was started by a ForkServer; made by it alone.

    Attributes:
        pid: Of the process.
    """

    def __init__(self, server: "ForkServer", pid: int, stdout: Path, stderr: Path) -> None:
        self.pid = pid
        self._server, self._stdout, self._stderr = server, stdout, stderr
        self._started = time.monotonic()
        self._returncode: int | None = None
        self._seconds = 0.0

    def poll(self) -> int | None:
        """The exit code (negative: a signal), or None while the process runs."""
        if self._returncode is None:
            self._returncode = self._server.ask(do="poll", pid=self.pid)["returncode"]
            self._seconds = time.monotonic() - self._started
        return self._returncode

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends a signal to the process alone; nothing where it has ended."""
        if self._returncode is None and not self._server.closed:
            self._server.ask(do="signal", pid=self.pid, signal=int(signum))

    def end(self) -> None:
        """Ends the process, and what it started in its process group, by SIGKILL; nothing where it has ended."""
        if self._returncode is None and not self._server.closed:
            self._returncode = self._server.ask(do="end", pid=self.pid)["returncode"]
            self._seconds = time.monotonic() - self._started

    def wait(self, timeout: float) -> RankResult:
        """Waits for the end of the process.

        Args:
            timeout: Seconds; the process runs on afterwards.

        Raises:
            TimeoutError: With the output so far.
        """
        deadline, pause = time.monotonic() + timeout, 0.001
        while self.poll() is None:
            if time.monotonic() >= deadline:
                stdout, stderr = self.output()
                tail = (stdout + stderr)[-_TAIL_CHARACTERS:]
                raise TimeoutError(f"process {self.pid} has not ended within {timeout:g} s:\n{tail}")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        assert self._returncode is not None, "poll gave the code"
        return RankResult(self._returncode, *self.output(), self._seconds)

    def output(self) -> tuple[str, str]:
        """What the process has written so far to its standard output and error."""
        stdout, stderr = (file.read_text(encoding="utf-8", errors="replace") for file in (self._stdout, self._stderr))
        return stdout, stderr


class ForkServer:
    """Starts processes that have the given modules loaded. Of one thread of this process; close() ends all of them.

    If this process ends in any way, so do the server and its children.

    Args:
        preload: Modules to import, which must start no thread and open no device.
        environment: Of the server, while it imports.
    """

    def __init__(self, preload: Sequence[str], environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="moe_train_forked_")
        self._log = Path(self._folder.name) / "server.log"
        self._num_started = 0
        ours, theirs = socket.socketpair()
        self._socket, self._stream = ours, ours.makefile("rw", encoding="utf-8")
        code = _SERVER.format(path=sys.path, module=__name__, descriptor=theirs.fileno())
        with theirs, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env={**environment, "OMP_NUM_THREADS": "1"},  # the libraries start no threads, which a fork would lose
                start_new_session=True,  # Ctrl-C at the terminal is this process's, which then ends the others
            )
        print(json.dumps(list(preload)), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._process.pid

    @property
    def closed(self) -> bool:
        """Whether the server, and so every process of it, has been ended."""
        return self._stream.closed

    def start(
        self, function: str, arguments: Sequence[str], environment: Mapping[str, str], folder: str | Path | None = None
    ) -> ForkedRank:
        """Starts a process that calls `sys.exit(function(arguments))`; waits for the server, not for the process.

        Args:
            function: "module:name" of a function at the top level of a module; it takes a list of strings and returns
                an exit code.
            arguments: For it.
            environment: The whole environment of the process. What modules read while they are imported, and what the
                interpreter reads when it starts, is the server's.
            folder: The one it works in; None takes this process's.

        Raises:
            RuntimeError: If the server has failed, with what it said.
        """
        self._num_started += 1
        stdout, stderr = (Path(self._folder.name) / f"{self._num_started:06d}.{name}" for name in ("out", "err"))
        for output in (stdout, stderr):
            output.touch(0o600)  # there to be read at once
        answer = self.ask(
            do="start",
            function=function,
            arguments=list(arguments),
            environment=dict(environment),
            folder=str(Path(folder or ".").absolute()),
            outputs=[str(stdout), str(stderr)],
        )
        return ForkedRank(self, answer["pid"], stdout, stderr)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request to the server and gives its answer: for ForkedRank."""
        if self.closed:
            raise RuntimeError("the server of forked processes is closed")
        try:
            print(json.dumps(request), file=self._stream, flush=True)
            line = self._stream.readline()
        except ConnectionError:
            line = ""
        except BaseException:
            self.close()  # its answer would be taken for that to the next request
            raise
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
            code, log = self._process.returncode, self._log.read_text(errors="replace")[-_TAIL_CHARACTERS:]
            self.close()
            raise RuntimeError(f"the server of forked processes ended with code {code}:\n{log}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the server and every process that still runs, by SIGKILL, and removes their output."""
        with contextlib.suppress(OSError):  # the server may be gone, with a request unsent
            self._stream.close()
        self._socket.close()  # the server reads the end of its requests
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def wait_for_all(ranks: Sequence[ForkedRank], timeout: float) -> list[RankResult]:
    """Waits for the end of processes; whatever happens, none of them is left.

    Args:
        ranks: The processes.
        timeout: Seconds for all together.

    Raises:
        TimeoutError: With what the first that had not ended wrote.
    """
    deadline = time.monotonic() + timeout
    try:
        return [rank.wait(max(0.0, deadline - time.monotonic())) for rank in ranks]
    except TimeoutError as error:
        raise TimeoutError(f"{len(ranks)} processes were to end within {timeout:g} s: {error}") from error
    finally:
        for rank in ranks:
            rank.end()


def serve(descriptor: int, environ: MutableMapping[str, str]) -> None:
    """What the server runs, and its children after it.

    Args:
        descriptor: Of the socket on which requests come. Its end is the server's, and that of all its children.
        environ: Of this process.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the children too
    children: set[int] = set()
    try:
        with socket.socket(fileno=descriptor) as connection, connection.makefile("rw", encoding="utf-8") as stream:
            for module in json.loads(stream.readline()):
                importlib.import_module(module)
            gc.freeze()  # a collection would touch, and so copy, pages that are shared with the children
            task = _answer_requests(stream, children)
    finally:
        for pid in children:  # none in a child
            _end(pid)
    if task is not None:
        sys.exit(_perform(task, environ))


def _answer_requests(stream: TextIO, children: set[int]) -> dict[str, Any] | None:
    """Answers until the requests end, and returns None; in a forked child returns the request to perform."""
    for line in stream:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "start":
            # A signal that comes before the child has its own dispositions waits for them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            answer["pid"] = _fork()
            if answer["pid"] == 0:
                children.clear()
                return request
            children.add(answer["pid"])
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        elif request["do"] == "signal":
            if request["pid"] in children:  # not reaped, so that the number is still its own
                os.kill(request["pid"], request["signal"])
        elif request["do"] == "end":
            children.discard(request["pid"])
            answer["returncode"] = _end(request["pid"])
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            children.discard(pid)
            answer["returncode"] = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=stream, flush=True)
    return None


def _fork() -> int:
    sys.stdout.flush()  # or each child would write it again
    sys.stderr.flush()
    return os.fork()


def _end(pid: int) -> int:
    """Ends a child and what it started in its own process group; its exit code."""
    with contextlib.suppress(ProcessLookupError):  # it may not have made the group yet
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _perform(task: dict[str, Any], environ: MutableMapping[str, str]) -> int:
    """Becomes the process that a request asks for."""
    os.setsid()
    for path, descriptor in zip(task["outputs"], (1, 2), strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    _reset_signals()
    os.chdir(task["folder"])
    environ.clear()
    environ.update(task["environment"])
    sys.argv = [task["function"], *task["arguments"]]
    if "torch" in sys.modules:  # it read the server's environment
        first = task["environment"].get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        sys.modules["torch"].set_num_threads(int(first) if first.isdecimal() and int(first) else usable_cores())
    module, _, name = task["function"].partition(":")
    return getattr(importlib.import_module(module), name)(task["arguments"])


def _reset_signals() -> None:
    """Gives every signal what a new interpreter gives it, and lets those come that have waited."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, *_KEPT_IGNORED}:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
