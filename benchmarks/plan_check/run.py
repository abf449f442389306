"""How far `moe-train plan` is from what happens on this machine: model states, peak memory, bytes and step time.

The memory of every setting is counted in a few steps (memory.py), and it is trained by launch/train.py. Right before
and right after that moe-train doctor measures the machine with as many ranks: its speed may change within minutes. The
planned time is the mean of the two plans. The ranks of some settings are on two network namespaces with a slow line
between them (Linux, root). The machine should have nothing else to do. Writes plan.md.

    python -m benchmarks.plan_check [--json] [--settings NAME ...] [--steps 16] [--output FOLDER]
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plan_check.report import markdown_report
from benchmarks.plan_check.rows import (
    SETTINGS,
    STEPS_PER_RECORD,
    Place,
    RowResult,
    Setting,
    claims_of,
    measure,
    measure_machine,
    plan_setting,
    result_row,
)
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, machine_words, print_json, say, write_results
from benchmarks.runner.slow_link import SlowLinkUnavailable
from moe_train.config.machine import Machine


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, checked."""
    names = [setting.name for setting in SETTINGS]
    parser = BenchmarkParser("plan_check", __doc__, epilog="About 25 minutes on two cores.")
    what = f"of {', '.join(names)} (all)"
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="NAME", help=what)
    parser.add_number("--steps", 16, "timed steps of a setting", least=STEPS_PER_RECORD)
    parser.add_output("plan.md")
    options = parser.read(arguments)
    if options.steps % STEPS_PER_RECORD:
        parser.error(f"--steps ({options.steps}) must be a multiple of {STEPS_PER_RECORD}")
    return options


class Check:
    """Planned and measured figures of settings, and the machines that the doctor measured meanwhile.

    Attributes:
        rows: Rows by the name of their setting.
        machines: By place, every measurement of the machine.
        slow_lines: By place with a line, whether the doctor named it every time.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        """Begin with nothing measured.

        Args:
            folder: For everything that is written meanwhile.
            steps: Timed steps of a setting.
        """
        self._folder, self._steps = folder, steps
        self.rows: dict[str, RowResult] = {}
        self.machines: dict[str, list[Machine]] = {}
        self.slow_lines: dict[str, bool] = {}

    def run(self, place: Place, settings: Sequence[Setting]) -> None:
        """Measure and plan settings that have their place in common.

        Raises:
            SlowLinkUnavailable: The place has several nodes, and this machine cannot make them.
        """
        before = self._examine(place)
        for setting in settings:
            say(setting.name)
            measured = measure(setting, self._steps, self._folder)
            after = self._examine(place)
            row = result_row(setting, [plan_setting(setting, each) for each in (before, after)], measured)
            self.rows[setting.name], before = row, after
            say(", ".join(f"{name} {off:+.1%}" for name, off in row.off.items()))

    def _examine(self, place: Place) -> Machine:
        say(f"moe-train doctor, ranks: {place}")
        folder = self._folder / f"doctor_{sum(map(len, self.machines.values()))}"
        machine, named = measure_machine(place, folder)
        self.machines.setdefault(str(place), []).append(machine)
        if place.nodes > 1:
            self.slow_lines[str(place)] = self.slow_lines.get(str(place), True) and named
        return machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; the exit code."""
    options = parse_options(arguments)
    chosen = [setting for setting in SETTINGS if setting.name in options.settings]
    left_out = []
    with tempfile.TemporaryDirectory(prefix="moe_train_plan_check_") as temporary:
        check = Check(Path(temporary), options.steps)
        for place in dict.fromkeys(setting.place for setting in chosen):
            here = [setting for setting in chosen if setting.place == place]
            try:
                check.run(place, here)
            except SlowLinkUnavailable as reason:
                names = ", ".join(setting.name for setting in here if setting.name not in check.rows)
                left_out.append(f"{names} left out: {reason}")
                say(left_out[-1])
    rows = [check.rows[setting.name] for setting in chosen if setting.name in check.rows]
    if not rows:
        return 1
    claims, machine = claims_of(rows, check.slow_lines), describe_machine("deepspeed")
    about = [
        f"`python -m benchmarks.plan_check --steps {options.steps}` on {machine_words(machine)}; ranks of one thread, "
        "fp32, gloo. Peak: most bytes of tensors at one time.",
        *left_out,
    ]
    write_results(options.output, "plan", markdown_report(rows, claims, about))
    known = {place: [each.model_dump(mode="json") for each in given] for place, given in check.machines.items()}
    print_json(options, {"rows": rows, "claims": claims, "machine": machine, "machines": known})
    return 0
