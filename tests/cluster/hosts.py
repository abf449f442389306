"""Several hosts on one machine, made of namespaces: each with its own network, processes, names and sshd.

    with virtual_cluster(num_hosts=2) as cluster:
        first, second = cluster.hosts
        first.run("ssh", second.name, "hostname", timeout=10)
        second.cut()        # its cable is pulled
        second.restore()
        second.power_off()  # without a word to anybody
        second.power_on()

Files and processors are the machine's, seen by all hosts alike, as with a shared file system; /dev/shm, /etc/hosts,
/root/.ssh and the folder of TMPDIR are each host's own. The hosts are host1, host2, ... at 10.77.0.1, 10.77.0.2, ... on
eth0, root may go from each to each over ssh, and their switch has a namespace too: the machine's network is not
touched, and several clusters can be up at once. Needs root, iproute2, util-linux and openssh-server; ClusterUnavailable
says what is missing.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.runner.namespaces import (
    END_SECONDS,
    answer_of,
    command_path,
    left_over,
    namespaces_of,
    remove_namespaces,
    run_command,
)
from tests.processes import ProcessResult, run_process

NAME_PREFIX = "moe-train-cluster"  # of namespaces; the process's id and random digits follow
INTERFACE = "eth0"  # of every host
COMMANDS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd")
_START_SECONDS = 20
_SSHD_CONFIG = """Port 22
HostKey {folder}/host_key
PidFile none
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
UseDNS no
SetEnv TMPDIR={temporary}
"""
# Process 1 of a host. It waits for others' orphans (a bare sleep would leave zombies), and all end with it.
_FIRST_PROCESS = """
hostname {name}
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount -t tmpfs -o size=4g tmpfs {temporary}
mount --bind {folder}/ssh /root/.ssh
mount --bind {folder}/hosts /etc/hosts
{sshd} -f {folder}/sshd_config -E {folder}/sshd.log
while :; do sleep 1000 & wait $!; done
"""


class ClusterUnavailable(RuntimeError):
    """This machine cannot make the hosts; with what is missing."""


@dataclass
class Host:
    """One of the hosts.

    Attributes:
        name: Host name, which the other hosts know.
        address: IPv4 address.
        namespace: Of its network.
        switch: Network namespace of the switch, whose port has the name of the host.
        folder: Its own files: ssh/ is /root/.ssh.
        temporary: Where it has its own TMPDIR, empty when it starts: Open MPI's session folders are named by host and
            pid, and a host's pids begin with 1 each time.
    """

    name: str
    address: str
    namespace: str
    switch: str
    folder: Path
    temporary: Path
    _process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)
    _first_pid: int = 0  # of its process 1, as seen from outside

    @property
    def prefix(self) -> list[str]:
        """What comes before a command that is to run in the host, in the present folder."""
        return self._prefix(Path.cwd())

    def _prefix(self, cwd: Path) -> list[str]:
        enter = ["nsenter", "-t", str(self._first_pid), "-n", "-m", "-p", "-u", "-i", f"--wdns={cwd}", "--"]
        return [*enter, "env", f"TMPDIR={self.temporary}"]

    def run(
        self, *args: str | Path, timeout: float, env: Mapping[str, str | None] | None = None, cwd: Path | None = None
    ) -> ProcessResult:
        """Run a command in the host and wait for it, as `run_process` does."""
        return run_process([*self._prefix(cwd or Path.cwd()), *args], timeout, env=env)

    def cut(self) -> None:
        """Pull its cable."""
        _need("ip", "-n", self.switch, "link", "set", self.name, "down")

    def restore(self) -> None:
        """Plug its cable in again."""
        _need("ip", "-n", self.switch, "link", "set", self.name, "up")

    def power_off(self) -> None:
        """All its processes are gone at once, and no packet tells of it."""
        self.cut()
        self._kill()

    def power_on(self) -> None:
        """Start it, with its cable plugged in."""
        self.restore()
        self._start()

    def processes(self) -> dict[int, str]:
        """Command lines by pid, as seen from outside, of what runs in the host beside its process 1 and sshd."""
        if not self._first_pid:
            return {}
        own = _pid_namespace(self._first_pid)
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _pid_namespace(int(entry.name)) == own is not None:
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    found[int(entry.name)] = b" ".join(words).decode(errors="replace").strip()
        return {
            pid: line
            for pid, line in found.items()
            if pid != self._first_pid and line and line != "sleep 1000" and not line.startswith("sshd:")
        }

    def stop_server(self) -> None:
        """End its sshd: connections are refused from now on, until it is started again."""
        result = self.run("pkill", "-x", "-P", "1", "sshd", timeout=10)  # of its own namespace alone
        assert result.returncode == 0, result

    def _start(self) -> None:
        sshd = shutil.which("sshd", path=command_path())
        script = _FIRST_PROCESS.format(name=self.name, folder=self.folder, temporary=self.temporary, sshd=sshd)
        apart = ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with (self.folder / "first_process.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *apart, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PATH": command_path()},
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            self._first_pid = _child(self._process.pid)
            if self._first_pid and _listens_on_22(self._first_pid):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ClusterUnavailable(
                    f"{self.name} did not start: {(self.folder / 'first_process.log').read_text()}"
                )
            time.sleep(0.02)

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._first_pid or self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            self._process, self._first_pid = None, 0


@dataclass(frozen=True)
class VirtualCluster:
    """Hosts that reach each other.

    Attributes:
        hosts: host1, host2, ...
        hostfile: Names them, with their slots, as deepspeed and Open MPI read it.
        folder: For files of the tests; it goes with the cluster.
    """

    hosts: list[Host]
    hostfile: Path
    folder: Path

    def processes(self) -> dict[str, list[str]]:
        """What runs on each host, without hosts where nothing does."""
        found = {host.name: list(host.processes().values()) for host in self.hosts}
        return {name: lines for name, lines in found.items() if lines}

    def wait_until_idle(self, seconds: float) -> dict[str, list[str]]:
        """What still runs on the hosts after so many seconds; returns as soon as nothing does."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def mend(self) -> None:
        """End what runs on the hosts, plug in their cables, and start those that are off."""
        for host in self.hosts:
            for pid in host.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            host.restore()
            if host._process is None:
                host.power_on()


@contextlib.contextmanager
def virtual_cluster(num_hosts: int = 2, slots: int = 2) -> Iterator[VirtualCluster]:
    """Hosts for the time of a block; nothing of them is left after it.

    After SIGKILL they stay, until the next use on this machine.

    Args:
        num_hosts: 1 to 250.
        slots: Of each in the hostfile.

    Raises:
        ClusterUnavailable: They cannot be made here.
    """
    reason = missing()
    if reason is not None:
        raise ClusterUnavailable(reason)
    remove_namespaces(left_over(NAME_PREFIX))
    name = f"{NAME_PREFIX}-{os.getpid()}-{secrets.token_hex(3)}"
    hosts: list[Host] = []
    with tempfile.TemporaryDirectory(prefix=f"{NAME_PREFIX}-") as folder:
        try:
            hosts = _put_up(name, num_hosts, Path(folder))
            hostfile = Path(folder, "hostfile")
            hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
            yield VirtualCluster(hosts, hostfile, Path(folder))
        finally:
            for host in hosts:
                host._kill()
            remove_namespaces(namespaces_of(name))


def missing() -> str | None:
    """Why no cluster can be made here, or None."""
    if not Path("/proc/self/ns/pid").exists():
        return "namespaces are Linux's"
    if os.geteuid() != 0:
        return f"only root can make hosts out of namespaces, and this is user {os.geteuid()}"
    absent = [name for name in COMMANDS if shutil.which(name, path=command_path()) is None]
    if absent:
        return f"no command {', '.join(absent)}: install iproute2, util-linux, openssh-client and openssh-server"
    tried = run_command("unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "true")
    return None if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.strip()}"


def _put_up(name: str, num_hosts: int, folder: Path) -> list[Host]:
    Path("/root/.ssh").mkdir(mode=0o700, exist_ok=True)  # to mount each host's own over it
    Path("/run/sshd").mkdir(exist_ok=True)
    switch = f"{name}-switch"
    _need("ip", "netns", "add", switch)
    _need("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
    _need("ip", "-n", switch, "link", "set", "bridge0", "up")
    (folder / "tmp").mkdir()
    hosts = []
    for number in range(1, num_hosts + 1):
        own = folder / f"host{number}"
        host = Host(f"host{number}", f"10.77.0.{number}", f"{name}-host{number}", switch, own, folder / "tmp")
        (host.folder / "ssh").mkdir(parents=True)
        hosts.append(host)
        _need("ip", "netns", "add", host.namespace)
        pair = ("type", "veth", "peer", "name", host.name, "netns", switch)
        _need("ip", "link", "add", INTERFACE, "netns", host.namespace, *pair)
        for where, *change in (
            (switch, "link", "set", host.name, "master", "bridge0", "up"),
            (host.namespace, "link", "set", "lo", "up"),
            (host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE),
            (host.namespace, "link", "set", INTERFACE, "up"),
        ):
            _need("ip", "-n", where, *change)
    _write_files(hosts, folder)
    for host in hosts:
        host._start()
    return hosts


def _write_files(hosts: Sequence[Host], folder: Path) -> None:
    """Keys and names: one pair of keys for all hosts, so that they are made once."""
    for key in ("id_ed25519", "host_key"):
        _need("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    names = ",".join(f"{host.name},{host.address}" for host in hosts)
    for host in hosts:
        lines = ["127.0.0.1 localhost", *(f"{each.address} {each.name}" for each in hosts)]
        (host.folder / "hosts").write_text("\n".join(lines) + "\n")
        (host.folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=host.folder, temporary=host.temporary))
        shutil.copy(folder / "host_key", host.folder)
        shutil.copy(folder / "id_ed25519", host.folder / "ssh")
        shutil.copy(folder / "id_ed25519.pub", host.folder / "ssh" / "authorized_keys")
        (host.folder / "ssh" / "known_hosts").write_text(f"{names} {host_key}\n")


def _child(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return 0


def _listens_on_22(pid: int) -> bool:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        return any(line.split()[1].endswith(":0016") and line.split()[3] == "0A" for line in lines)  # 0A: listening
    return False


def _pid_namespace(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return None


def _need(*command: str) -> None:
    result = run_command(*command)
    if result.returncode:
        raise ClusterUnavailable(f"`{' '.join(command)}` says: {answer_of(result)}")
