"""Kill a launcher itself at random moments: no rank outlives it, and the next start goes on with the same losses.

A short run is started under each launcher. At a random moment, from its start to its end, the process that was started
(deepspeed, torchrun, mpirun, make) gets SIGKILL. All that it has started must end within 30 s. The next life goes on in
the same run folder, until the run is complete; then its losses must be those of a run that nothing happened to, to the
last bit (fp32, the same layout).

    python -m benchmarks.launcher_kills [--json] [--kills 30] [--steps 30] [--seed 0] [--launchers deepspeed,make]

`moe-train launch` starts ranks on hosts over ssh: tests/cluster/test_faults.py does the same with it.
"""

import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kills.run import OPTIONS, losses
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.processes import ROOT
from benchmarks.runner.results import print_json, say
from moe_train.distributed.addresses import free_port
from moe_train.host.processes import end_processes, processes_with

LAUNCHERS = ("deepspeed", "torchrun", "mpirun", "make")
LIMIT_SECONDS = 30.0  # from the launcher's end to that of everything else
RUN_TIMEOUT_SECONDS = 240
_BIN = Path(sys.executable).parent
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PATH": os.pathsep.join([str(_BIN), os.environ.get("PATH", os.defpath)]),
}


@dataclass(frozen=True)
class Life:
    """One start of the run, and the kill of its launcher.

    Attributes:
        launcher: Name of the launcher.
        moment: Seconds from the start to the kill.
        step: Last step on record by then.
        seconds_to_end: From the kill until no process of the launch was left.
        left: Number of processes that were left after 30 s.
    """

    launcher: str
    moment: float
    step: int
    seconds_to_end: float
    left: int


def launcher_command(launcher: str, arguments: Sequence[str], scratch: Path) -> list[str]:
    """Build the command that starts two ranks on this machine, as a user would."""
    script = ["launch/train.py", *arguments]
    if launcher == "deepspeed":
        options = ["--log_level", "critical", "--num_gpus", "2", "--master_port", str(free_port())]
        return [str(_BIN / "deepspeed"), *options, *script]
    if launcher == "torchrun":
        return [str(_BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *script]
    if launcher == "mpirun":
        mpirun = shutil.which("mpirun", path=_ENVIRONMENT["PATH"]) or "mpirun"
        return [mpirun, "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, *script]
    # The recipe of `make train`, with this interpreter's environment in place of the one that make would set up.
    text = (ROOT / "Makefile").read_text().replace("$(CURDIR)/.venv/bin", str(_BIN)).replace(".venv/bin", str(_BIN))
    makefile = scratch / "Makefile"
    makefile.write_text(re.sub(r"^train: venv$", "train:", text, flags=re.MULTILINE))
    config = scratch / "empty.yaml"
    config.write_text("train: {}\n")
    return ["make", "-f", str(makefile), "train", f"CONFIG={config}", f"ARGS={' '.join(arguments)}"]


class Launch:
    """A launcher at work; everything that it starts carries a mark in its environment."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._variable = f"MOE_TRAIN_BENCHMARK={secrets.token_hex(8)}"
        name, _, value = self._variable.partition("=")
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**os.environ, **_ENVIRONMENT, name: value},
                start_new_session=True,
            )

    def left(self) -> list[int]:
        """Find the processes of this launch that live."""
        return processes_with(self._variable)

    def kill(self) -> tuple[float, int]:
        """Kill the launcher alone; return the seconds until nothing was left, and what was left after the limit."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        began = time.monotonic()
        while self.left() and time.monotonic() - began < LIMIT_SECONDS:
            time.sleep(0.1)
        seconds, left = time.monotonic() - began, self.left()
        end_processes(left)
        return seconds, len(left)


def last_step(folder: Path) -> int:
    """Return the last step on record; 0 if there is none."""
    try:
        return max(losses(folder), default=0)
    except OSError:
        return 0


class Trials:
    """Trials of launchers with one short run.

    Args:
        scratch: Folder for run folders and logs.
        steps: Steps of a run.
        draw: Source of the moments.
    """

    def __init__(self, scratch: Path, steps: int, draw: random.Random) -> None:
        self._scratch, self._draw, self._arguments = scratch, draw, [*OPTIONS, f"--train.steps={steps}"]
        self._log = scratch / "log"
        for name in ("first", "whole"):  # the first one prepares the data
            seconds = self.complete(LAUNCHERS[0], scratch / name)
        self.seconds, self.expected = seconds, losses(scratch / "whole")

    def start(self, launcher: str, folder: Path) -> Launch:
        """Start the run, or go on with it."""
        command = launcher_command(launcher, [*self._arguments, f"--train.run_dir={folder}"], self._scratch)
        return Launch(command, self._log)

    def complete(self, launcher: str, folder: Path) -> float:
        """Let the run come to its end, and return the seconds that it took. RuntimeError if it fails."""
        launch, began = self.start(launcher, folder), time.monotonic()
        code = launch.process.wait(RUN_TIMEOUT_SECONDS)
        if code:
            raise RuntimeError(f"{launcher}: a run ended with code {code}: {self._last_words()}")
        return time.monotonic() - began

    def kill_in(self, launcher: str, folder: Path) -> Life | None:
        """Start the run, or go on with it, and kill the launcher at a random moment; None if the run ended before."""
        launch, moment = self.start(launcher, folder), self._draw.uniform(0.0, self.seconds)
        try:
            code = launch.process.wait(moment)
        except subprocess.TimeoutExpired:
            life = Life(launcher, moment, last_step(folder), *launch.kill())
            say(f"{life}")
            return life
        if code:
            raise RuntimeError(f"{launcher}: ended by itself with code {code}: {self._last_words()}")
        return None

    def try_launcher(self, launcher: str, num_kills: int) -> dict[str, Any]:
        """Kill one launcher again and again.

        Returns:
            Plain values; "passed" if nothing was left, and every run came to its end with the same losses.
        """
        lives, different, number = list[Life](), 0, 0
        while len(lives) < num_kills:
            folder, number = self._scratch / f"{launcher}_{number}", number + 1
            while len(lives) < num_kills and (life := self.kill_in(launcher, folder)) is not None:
                lives.append(life)
            self.complete(launcher, folder)
            different += losses(folder) != self.expected
        return {
            "launcher": launcher,
            "kills": len(lives),
            "runs": number,
            "slowest_end_seconds": max(life.seconds_to_end for life in lives),
            "left": sum(life.left for life in lives),
            "runs_with_other_losses": different,
            "passed": not different and not any(life.left for life in lives),
            "lives": lives,
        }

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what came of it; 0 if nothing was left and every loss is the same, else 1."""
    parser = BenchmarkParser("launcher_kills", __doc__)
    parser.add_number("--kills", 30, "kills of each launcher")
    parser.add_number("--steps", 30, "steps of a run")
    parser.add_number("--seed", 0, "seed of the moments", least=0)
    parser.add_argument("--launchers", default=",".join(LAUNCHERS), help=f"some of {', '.join(LAUNCHERS)}")
    options = parser.read(arguments)
    names = options.launchers.split(",")
    if not set(names) <= set(LAUNCHERS):
        parser.error(f"--launchers ({options.launchers}): must be some of {', '.join(LAUNCHERS)}")
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="moe_train_launcher_kills_") as scratch:
        trials = Trials(Path(scratch), options.steps, draw)
        found = [trials.try_launcher(name, options.kills) for name in names]
    for each in found:
        print(
            f"{each['launcher']}: {each['kills']} kills in {each['runs']} runs, everything ended within "
            f"{each['slowest_end_seconds']:.1f} s, {each['left']} processes left after {LIMIT_SECONDS:.0f} s, "
            f"{each['runs_with_other_losses']} runs with other losses"
        )
    print_json(options, {"seconds_of_a_run": trials.seconds, "launchers": found})
    return 0 if all(each["passed"] for each in found) else 1
