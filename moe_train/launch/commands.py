"""Commands of the supported launchers: deepspeed over pdsh or openmpi, mpirun of Open MPI or MPICH, torchrun by ssh."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_train.config.errors import UsageError
from moe_train.config.paths import home_folder
from moe_train.distributed.rendezvous import LAUNCH_MARK
from moe_train.launch.host_agents import SSH, shell_command
from moe_train.launch.hostfile import HostLine

LaunchBy = Literal["pdsh", "openmpi", "mpirun", "torchrun"]
LAUNCHERS: tuple[LaunchBy, ...] = ("pdsh", "openmpi", "mpirun", "torchrun")
PASSED_ON = (
    *("DS_ACCELERATOR", "OMP_NUM_THREADS", "*_SOCKET_IFNAME", "NCCL_*", "PATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
    *("PYTHONPATH", "MPI4PY_MPIABI"),
)
_AGENT_SECONDS = 120  # for torchrun's agents to find each other, and for a message from one agent to the others
# mpirun refuses to run as root unless told twice. It also binds ranks, at worst to one core each: see --bind-to none.
_MPI_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class LaunchPlan:
    """Plan of one launch: hosts, program and environment.

    Attributes:
        hosts: Hosts with their slots.
        program: Script (*.py) or command.
        arguments: Arguments of the program.
        python: Interpreter on every host.
        folder: Working directory on every host.
        address: Address at which the other hosts reach the first host.
        networks: Networks of that address, such as 10.0.0.7/24.
        port: Master port on the first host.
        environment: Environment variables for the ranks.
        scratch: Folder for files of the launch.
    """

    hosts: Sequence[HostLine]
    program: str
    arguments: Sequence[str]
    python: str
    folder: Path
    address: str
    networks: Sequence[str]
    port: int
    environment: Mapping[str, str]
    scratch: Path

    @property
    def is_script(self) -> bool:
        """Whether python runs the program."""
        return self.program.endswith(".py")

    @property
    def words(self) -> list[str]:
        """Command of one rank."""
        return [*([self.python] if self.is_script else []), self.program, *self.arguments]

    @property
    def num_ranks(self) -> int:
        """Number of ranks on all hosts."""
        return sum(host.slots for host in self.hosts)

    def hostfile(self) -> Path:
        """Write a hostfile with exactly these hosts, and return its path."""
        path = self.scratch / "hostfile"
        path.write_text("".join(f"{host.target} slots={host.slots}\n" for host in self.hosts))
        return path


def passed_environment(
    named: Sequence[str], mark: str, python: str, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Collect the environment of the ranks: what PASSED_ON and --env name, deepspeed's own file, and the launch mark.

    Args:
        named: NAME or NAME=value, from --env.
        mark: Mark of the launch.
        python: Interpreter; its folder comes first on PATH.
        environ: Environment variables of this process.

    Returns:
        Values by name.

    Raises:
        UsageError: If a named variable is not set here.
    """
    kept = {name: value for name, value in environ.items() if any(fnmatch.fnmatch(name, each) for each in PASSED_ON)}
    own_file = environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path(folder, own_file) for folder in (home_folder(), os.getcwd()) if folder is not None):
        if path.is_file():
            lines = [line.strip() for line in path.read_text().splitlines()]
            kept |= dict(line.split("=", 1) for line in lines if "=" in line)
    for each in named:
        name, equals, value = each.partition("=")
        if not equals and name not in environ:
            raise UsageError(f"--env {name}: is not set here; give it as --env {name}=VALUE")
        kept[name] = value if equals else environ[name]
    kept["PATH"] = os.pathsep.join([str(Path(python).parent), kept.get("PATH", os.defpath)])
    return {**kept, LAUNCH_MARK: mark}


def launch_commands(launcher: LaunchBy, plan: LaunchPlan) -> tuple[list[list[str]], dict[str, str]]:
    """Build the commands that start the ranks.

    Args:
        launcher: One of LAUNCHERS.
        plan: Hosts, program and environment.

    Returns:
        Commands to start on this host, all at once, and environment variables to add for them.

    Raises:
        UsageError: If the launcher is not installed here, or cannot take the user of a host.
    """
    if launcher == "torchrun":
        return _torchrun(plan), {}
    user = next((host for host in plan.hosts if host.user is not None), None)
    if launcher in ("openmpi", "mpirun") and user is not None:
        raise UsageError(
            f"{user.place}: {user.target}: --launcher {launcher} takes no user; name the user in ~/.ssh/config"
        )
    if launcher == "mpirun":
        command, extra = _mpirun(plan)
        return [command], extra
    needed = {"pdsh": "pdsh", "openmpi": "ompi_info"}[launcher]
    _require(needed, launcher, plan)
    env_file = plan.scratch / "environment"
    command = [str(Path(plan.python).with_name("deepspeed")), "--hostfile", str(plan.hostfile()), "--force_multi"]
    command += ["--launcher", launcher, "--master_addr", plan.address, "--master_port", str(plan.port)]
    command += ["--no_ssh_check", "--log_level", "error"]
    extra = {"DS_ENV_FILE": str(env_file)}
    if launcher == "openmpi":
        # Set by `env`, with the plain values: deepspeed would add quotes to some values, and they would stay.
        env_file.touch()
        command += _openmpi_options(plan.networks)
        variables = [f"{name}={value}" for name, value in plan.environment.items()]
        command += ["--no_python", "/usr/bin/env", *variables, *plan.words]
        return [command], {**extra, **_MPI_ROOT, **_agent(plan)}
    env_file.write_text("".join(_line_for_pdsh(name, value) for name, value in plan.environment.items()))
    if not plan.is_script:
        command.append("--no_python")
    return [[*command, plan.program, *(_for_pdsh(word) for word in plan.arguments)]], extra


def _openmpi_options(networks: Sequence[str]) -> list[str]:
    # Unless told otherwise, deepspeed names eth0 for MPI's own messages. Networks are valid in place of an interface.
    words = ["--bind-to", "none", "--oversubscribe", "--mca", "btl_tcp_if_include", ",".join(networks)]
    return ["--launcher_args", shlex.join(words)]


def _for_pdsh(word: str) -> str:
    """Quote an argument so that it passes unchanged through deepspeed, pdsh and the other host's shell.

    pdsh replaces %h and similar codes. deepspeed (0.19) quotes only arguments with a space, and escapes quotes in them;
    the shell interprets all other arguments.
    """
    word = word.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def _line_for_pdsh(name: str, value: str) -> str:
    """Format a variable for deepspeed's file so that its value arrives unchanged.

    deepspeed quotes values that contain more than letters and the like; the other host's shell interprets what is
    inside the quotes.
    """
    if "\n" in value:
        raise UsageError(f"{name} has a line break, which deepspeed's file of variables cannot hold: unset it")
    value = re.sub(r'([\\$`"])', r"\\\1", value.replace("%", "%%"))
    return f"{name}={value}\n"


def _agent(plan: LaunchPlan) -> dict[str, str]:
    """Make Open MPI's daemons carry the launch mark: on other hosts, they do not end when their connection is cut."""
    return {"PRTE_MCA_prte_launch_agent": f"env {LAUNCH_MARK}={plan.environment[LAUNCH_MARK]} prted"}


def _mpirun(plan: LaunchPlan) -> tuple[list[str], dict[str, str]]:
    mpirun = _require("mpirun", "mpirun", plan)
    said = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout
    hosts = ",".join(f"{host.name}:{host.slots}" for host in plan.hosts)
    master = {"MASTER_ADDR": plan.address, "MASTER_PORT": str(plan.port)}
    environment = {**plan.environment, **master}
    size = ["-n", str(plan.num_ranks)]
    if "Open MPI" in said:
        passed = [word for name in environment for word in ("-x", name)]
        options = ["--host", hosts, *size, "--bind-to", "none", *passed]
        return [mpirun, *options, *plan.words], {**environment, **_MPI_ROOT, **_agent(plan)}
    # MPICH's hydra passes on the whole environment. So does Intel MPI's mpirun, which is a hydra too.
    return [mpirun, "-hosts", hosts, *size, *plan.words], environment


def _torchrun(plan: LaunchPlan) -> list[list[str]]:
    """Build one agent command per host, ranked as in the hostfile; with c10d, agents are ranked by arrival."""
    commands = []
    for number, host in enumerate(plan.hosts):
        agent = [plan.python, "-m", "moe_train.launch.torchrun_agent", "--nnodes", str(len(plan.hosts))]
        agent += ["--nproc-per-node", str(host.slots), "--node-rank", str(number)]
        agent += ["--rdzv-conf", f"timeout={_AGENT_SECONDS}"]
        agent += ["--master-addr", plan.address, "--master-port", str(plan.port)]
        agent += ["--rdzv-id", plan.environment[LAUNCH_MARK], *([] if plan.is_script else ["--no-python"])]
        variables = [f"{name}={value}" for name, value in plan.environment.items()]
        words = ["/usr/bin/env", *variables, *agent, plan.program, *plan.arguments]
        commands.append([*SSH, host.target, shell_command(plan.folder, words)])
    return commands


def _require(command: str, launcher: str, plan: LaunchPlan) -> str:
    folders = [str(Path(plan.python).parent), os.environ.get("PATH", os.defpath)]
    # Open MPI may be installed beside python, but the user's choice on PATH comes first.
    path = os.pathsep.join(folders[::-1] if launcher == "mpirun" else folders)
    found = shutil.which(command, path=path)
    if found is None:
        raise UsageError(f"--launcher {launcher}: {command} is not installed here; --launcher torchrun needs ssh alone")
    return found
