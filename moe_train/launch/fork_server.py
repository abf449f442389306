"""Fork server for ranks of this machine: it has imported everything already, and each rank is forked from it.

    with ForkServer(["moe_train.train.loop"], environment) as server:
        rank = server.start("moe_train.cli.main:main", ["train"], environment)
        result = rank.wait(timeout=60)

Starting a rank costs a fork in place of the import of torch and DeepSpeed (4 s of one core). The server is a separate
interpreter with one thread and a private channel. (multiprocessing has only one fork server per process, and its first
user fixes the modules.) A child becomes the same as a separate command: its own environment, arguments, output files
and session, default signals, and the interpreter's own end. It shares with its siblings what is fixed before a fork,
such as the seed of Python's hashes. CUDA cannot be forked: use the fork server for CPU ranks only.
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
_LONGEST_PAUSE_SECONDS = 0.02  # between two polls of a child
_KEPT_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)  # every Python interpreter ignores these
_TAIL_CHARACTERS = 3000  # length of the server's log in an error message
# Code for a fresh interpreter. It passes the environment in, because only bootstrap.py, host/ and launch/ read it.
_SERVER = "import os, sys; sys.path[:] = {path!r}; from {module} import serve; serve({descriptor}, os.environ)"


@dataclass(frozen=True)
class RankResult:
    """Result of a rank that has ended.

    Attributes:
        returncode: Exit code; negative: the signal that ended the rank.
        stdout: Everything that the rank wrote to its standard output.
        stderr: Everything that the rank wrote to its standard error.
        seconds: Time from the start to when the end was seen.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float


class ForkedRank:
    """Process that a ForkServer has started. Only ForkServer creates this object.

    Attributes:
        pid: Process id.
    """

    def __init__(self, server: "ForkServer", pid: int, stdout: Path, stderr: Path) -> None:
        self.pid = pid
        self._server, self._stdout, self._stderr = server, stdout, stderr
        self._started = time.monotonic()
        self._returncode: int | None = None
        self._seconds = 0.0

    def poll(self) -> int | None:
        """Return the exit code (negative: a signal), or None while the process runs."""
        if self._returncode is None:
            self._returncode = self._server.ask(do="poll", pid=self.pid)["returncode"]
            self._seconds = time.monotonic() - self._started
        return self._returncode

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal to the process alone; do nothing if it has ended."""
        if self._returncode is None and not self._server.closed:
            self._server.ask(do="signal", pid=self.pid, signal=int(signum))

    def end(self) -> None:
        """End the process and the rest of its process group by SIGKILL; do nothing if the process has ended."""
        if self._returncode is None and not self._server.closed:
            self._returncode = self._server.ask(do="end", pid=self.pid)["returncode"]
            self._seconds = time.monotonic() - self._started

    def wait(self, timeout: float) -> RankResult:
        """Wait for the end of the process.

        Args:
            timeout: Longest wait in seconds. After it the process continues to run.

        Raises:
            TimeoutError: If the process has not ended in time; with its output so far.
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
        """Return what the process has written so far to its standard output and standard error."""
        stdout, stderr = (file.read_text(encoding="utf-8", errors="replace") for file in (self._stdout, self._stderr))
        return stdout, stderr


class ForkServer:
    """Server that starts processes with the given modules already imported.

    Use it from one thread of this process. `close` ends all its processes. If this process ends in any way, so do the
    server and its children.

    Args:
        preload: Modules to import; they must not start a thread or open a device.
        environment: Environment of the server while it imports.
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
                env={**environment, "OMP_NUM_THREADS": "1"},  # libraries must start no threads: a fork would lose them
                start_new_session=True,  # Ctrl-C at the terminal reaches this process alone, which ends the others
            )
        print(json.dumps(list(preload)), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    @property
    def closed(self) -> bool:
        """Whether the server, and so each of its processes, has been ended."""
        return self._stream.closed

    def start(
        self, function: str, arguments: Sequence[str], environment: Mapping[str, str], folder: str | Path | None = None
    ) -> ForkedRank:
        """Start a process that calls `sys.exit(function(arguments))`; wait for the server, not for the process.

        Args:
            function: "module:name" of a function at the top level of a module. The function takes a list of strings and
                returns an exit code.
            arguments: Arguments for the function.
            environment: The whole environment of the process. Modules that read the environment during their import,
                and the interpreter at its start, have seen the server's environment instead.
            folder: Working directory of the process; None: this process's.

        Raises:
            RuntimeError: If the server has failed, with its log.
        """
        self._num_started += 1
        stdout, stderr = (Path(self._folder.name) / f"{self._num_started:06d}.{name}" for name in ("out", "err"))
        for output in (stdout, stderr):
            output.touch(0o600)  # so that the file can be read at once
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
        """Send a request to the server and return the answer. Only ForkedRank calls this."""
        if self.closed:
            raise RuntimeError("the server of forked processes is closed")
        try:
            print(json.dumps(request), file=self._stream, flush=True)
            line = self._stream.readline()
        except ConnectionError:
            line = ""
        except BaseException:
            self.close()  # otherwise the next request would get this request's answer
            raise
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
            code, log = self._process.returncode, self._log.read_text(errors="replace")[-_TAIL_CHARACTERS:]
            self.close()
            raise RuntimeError(f"the server of forked processes ended with code {code}:\n{log}")
        return json.loads(line)

    def close(self) -> None:
        """End the server and every process that still runs, by SIGKILL, and remove their output."""
        with contextlib.suppress(OSError):  # the server may be gone, with a request still unsent
            self._stream.close()
        self._socket.close()  # the server reads the end of its requests
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def wait_for_all(ranks: Sequence[ForkedRank], timeout: float) -> list[RankResult]:
    """Wait for the end of several processes; in every case, none of them runs afterwards.

    Args:
        ranks: The processes.
        timeout: Longest wait in seconds for all of them together.

    Returns:
        Result of each process.

    Raises:
        TimeoutError: With the output of the first process that had not ended.
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
    """Run the server, and after a fork its child.

    Args:
        descriptor: Descriptor of the socket for requests. When the socket ends, so do the server and all its children.
        environ: Environment variables of this process.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the children end too
    children: set[int] = set()
    try:
        with socket.socket(fileno=descriptor) as connection, connection.makefile("rw", encoding="utf-8") as stream:
            for module in json.loads(stream.readline()):
                importlib.import_module(module)
            gc.freeze()  # a garbage collection would touch pages shared with the children, and so copy them
            task = _answer_requests(stream, children)
    finally:
        for pid in children:  # empty in a child
            _end(pid)
    if task is not None:
        sys.exit(_perform(task, environ))


def _answer_requests(stream: TextIO, children: set[int]) -> dict[str, Any] | None:
    """Answer until the requests end, and return None; in a forked child, return the request to perform."""
    for line in stream:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "start":
            # A signal that arrives before the child has its own handlers stays pending until then.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            answer["pid"] = _fork()
            if answer["pid"] == 0:
                children.clear()
                return request
            children.add(answer["pid"])
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        elif request["do"] == "signal":
            if request["pid"] in children:  # the child is not reaped yet, so no other process has its id
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
    sys.stdout.flush()  # otherwise each child would write the same buffer again
    sys.stderr.flush()
    return os.fork()


def _end(pid: int) -> int:
    """End a child and the rest of its process group, and return its exit code."""
    with contextlib.suppress(ProcessLookupError):  # the child may not have created its group yet
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _perform(task: dict[str, Any], environ: MutableMapping[str, str]) -> int:
    """Become the process that a request describes, run its function, and return the exit code."""
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
    if "torch" in sys.modules:  # torch has read the server's environment
        first = task["environment"].get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        sys.modules["torch"].set_num_threads(int(first) if first.isdecimal() and int(first) else usable_cores())
    module, _, name = task["function"].partition(":")
    return getattr(importlib.import_module(module), name)(task["arguments"])


def _reset_signals() -> None:
    """Set every signal to what a new interpreter sets, and let pending signals arrive."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, *_KEPT_IGNORED}:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
