"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with a partition that preempts another.

The daemons run in the foreground as children of the test, on free ports and in a folder of their own. Whatever belongs
to them is known by the path of their slurm.conf, which Slurm hands on in the environment of all that it starts.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_train.distributed.addresses import free_port
from tests.distributed.test_launchers import launch
from tests.processes import ProcessResult

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # where daemons are, and PATH of a user need not lead
START_SECONDS = 60
CONF = """\
ClusterName=virtual
SlurmctldHost=localhost(127.0.0.1)
MailProg=/bin/true
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdLogFile={folder}/slurmd.%n.log
TmpFS={folder}/tmp.%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
KillWait=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={first_port} CPUs=4 CoresPerSocket=4 State=UNKNOWN
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={second_port} CPUs=4 CoresPerSocket=4 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n[1-2] State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """The client's side of a running cluster."""

    def __init__(self, conf: Path) -> None:
        self.conf = conf

    def run(self, *args: str | Path, timeout: float = 60, **variables: str) -> ProcessResult:
        """A command of Slurm, from the root of the repository, as a user outside all jobs would give it."""
        return launch(*args, timeout=timeout, SLURM_CONF=str(self.conf), **variables)

    def answer(self, *args: str) -> str:
        """What a command prints that must succeed."""
        result = self.run(*args)
        assert result.returncode == 0, result
        return result.stdout.strip()

    def submit(self, *args: str | Path, **variables: str) -> "Job":
        """sbatch; args are its options, a script and the arguments of that."""
        result = self.run("sbatch", "--parsable", *args, **variables)
        assert result.returncode == 0, result
        return Job(self, int(result.stdout))

    def wait_until(self, is_so: Callable[[], object], seconds: float, describe: Callable[[], str]) -> None:
        """Asks until it is so; fails with the description after the seconds."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, f"not within {seconds} s: {describe()}"
            time.sleep(0.25)  # most questions start a process, on the cores that the ranks need


class Job:
    """A batch job."""

    def __init__(self, slurm: Slurm, number: int) -> None:
        self.slurm, self.number = slurm, number

    def fields(self) -> dict[str, str]:
        """What the controller says about it: JobState, Restarts, StartTime and so on."""
        text = self.slurm.answer("scontrol", "--oneliner", "show", "job", str(self.number))
        return dict(re.findall(r"(?:^| )([A-Z]\w*)=(\S*)", text))

    def wait_for(self, state: str, seconds: float, describe: Callable[[], str]) -> dict[str, str]:
        """Waits for a state such as PENDING; the job's fields then."""
        found: dict[str, str] = {}

        def is_there() -> bool:
            found.update(self.fields())
            return found["JobState"] == state

        self.slurm.wait_until(is_there, seconds, lambda: f"{state}: {found}\n{describe()}")
        return found

    def update(self, *changes: str) -> None:
        """Changes such as TimeLimit=60 or StartTime=now."""
        self.slurm.answer("scontrol", "update", f"JobId={self.number}", *changes)

    def ranks(self) -> dict[int, int]:
        """Pids of its living ranks, by rank."""
        found = {}
        for pid, words in _environments():
            if f"SLURM_CONF={self.slurm.conf}" in words and f"SLURM_JOB_ID={self.number}" in words:
                rank = next((word for word in words if word.startswith("SLURM_PROCID=")), None)
                # The batch script is task 0 as well, and what it starts inherits that.
                if rank is not None and b"launch/train.py" in _command_line(pid) and _parent_name(pid) == "slurmstepd":
                    found[int(rank.removeprefix("SLURM_PROCID="))] = pid
        return found


def _environments() -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "environ").read_bytes().decode(errors="replace").split("\0")


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _parent_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1]
        return Path(f"/proc/{parent}/comm").read_text().strip()
    return ""


def _program(name: str) -> str:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *SBIN])) or name


def skip_where_slurm_cannot_run() -> None:
    """Skips the test, with the reason, where this user or machine cannot start a Slurm."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a Slurm whose jobs run as root")
    missing = [name for name in PROGRAMS if not os.path.isabs(_program(name))]
    if missing:
        pytest.skip(f"Slurm is not installed: {', '.join(missing)} (Debian: slurm-wlm and munge)")


@contextlib.contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """Two nodes, n1 and n2, of 4 CPUs each, and the partitions low (the default) and high, which preempts it.

    Args:
        folder: For its files. Afterwards no process of it is left.
    """
    conf = _write_files(folder)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *options: str) -> None:
        with (folder / f"{name}.{len(daemons)}.out").open("wb") as output:
            # It also ends when the tests are killed.
            command = ["setpriv", "--pdeathsig=TERM", _program(name), *options]
            environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"SLURM_CONF": str(conf)}
            daemons.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, start_new_session=True
                )
            )

    slurm = Slurm(conf)
    try:
        munge = {"key": "munge.key", "socket": "munge.sock", "pid": "munged.pid", "log": "munged.log", "seed": "seed"}
        files = [f"--{name}{'' if name == 'socket' else '-file'}={folder / munge[name]}" for name in munge]
        start("munged", "--foreground", "--force", *files)  # --force: pytest's folders are closed to others
        slurm.wait_until((folder / "munge.sock").exists, START_SECONDS, lambda: _outputs(folder))
        start("slurmctld", "-D", "-f", str(conf))
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node, "-f", str(conf))
        sinfo = ("sinfo", "--noheader", "--partition=low", "--format=%D %t")
        slurm.wait_until(
            lambda: slurm.run(*sinfo).stdout.split() == ["2", "idle"], START_SECONDS, lambda: _outputs(folder)
        )
        yield slurm
    finally:
        _end(conf, daemons)


def _write_files(folder: Path) -> Path:
    for name in ("state", "spool.n1", "spool.n2", "tmp.n1", "tmp.n2"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    # The plugin of cgroups is loaded even where nothing uses it.
    version = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/{version}\n")
    ports = {name: free_port() for name in ("controller_port", "first_port", "second_port")}
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=socket.gethostname().partition(".")[0], **ports))
    return conf


def _outputs(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.out")))


def _end(conf: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Jobs first, by the daemons that know them; then the daemons; then what is left of either."""
    with contextlib.suppress(TimeoutError):
        Slurm(conf).run("scancel", "--signal=KILL", "--full", "--user=root", timeout=10)
        Slurm(conf).run("scancel", "--user=root", timeout=10)
    for daemon in reversed(daemons):
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
    for pid, words in _environments():
        if f"SLURM_CONF={conf}" in words:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for daemon in daemons:
        daemon.wait(10)
