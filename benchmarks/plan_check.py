"""How far `moe-train plan` is from what happens on this machine: model states, peak memory, bytes and step time.

Every setting's memory is counted in a few steps (benchmarks/plan_check_rank.py), and it is trained by launch/train.py.
Right before and right after that moe-train doctor measures the machine with as many ranks: its speed may change within
minutes. The planned time is the mean of the two plans. The ranks of some settings are on two network namespaces with a
slow line between them (Linux, root). The machine should have nothing else to do. Writes plan.md.

    python benchmarks/plan_check.py [--json] [--settings NAME ...] [--steps 16] [--output FOLDER]
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.plan_check_rows import (  # noqa: E402
    SETTINGS,
    STEPS_A_RECORD,
    Place,
    RowResult,
    claims_of,
    markdown_report,
    plan_setting,
    result_row,
)
from benchmarks.plan_check_runs import measure, measure_machine  # noqa: E402
from benchmarks.reports import make_output, processor, say, write_whole  # noqa: E402
from benchmarks.slow_link import SlowLinkUnavailable  # noqa: E402
from moe_train.config.machine import Machine  # noqa: E402
from moe_train.host.cores import usable_cores  # noqa: E402


def parse_options() -> argparse.Namespace:
    """The command line, checked."""
    names = [setting.name for setting in SETTINGS]
    parser = argparse.ArgumentParser(
        prog="plan_check.py", description=__doc__.split("\n\n")[0], epilog="25 minutes or so.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object as the last line of stdout")
    add("--settings", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)} (all)")
    add("--steps", type=int, default=16, metavar="N", help="timed steps of a setting (default: 16)")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER", help="of plan.md")
    options = parser.parse_args()
    if options.steps < 1 or options.steps % STEPS_A_RECORD:
        parser.error(f"--steps ({options.steps}) must be a multiple of {STEPS_A_RECORD}")
    make_output(parser, options.output)
    return options


def main() -> int:
    """Measure, write and print; the exit code."""
    options = parse_options()
    chosen = [setting for setting in SETTINGS if setting.name in options.settings]
    rows: dict[str, RowResult] = {}
    machines: dict[str, list[Machine]] = {}
    slow_lines: dict[str, bool] = {}
    left_out = []
    with tempfile.TemporaryDirectory(prefix="plan-check-") as temporary:
        folder = Path(temporary)

        def examine(place: Place) -> Machine:
            say(f"moe-train doctor, ranks: {place}")
            machine, named = measure_machine(place, folder / f"doctor_{sum(map(len, machines.values()))}")
            machines.setdefault(str(place), []).append(machine)
            if place.nodes > 1:
                slow_lines[str(place)] = slow_lines.get(str(place), True) and named
            return machine

        for place in dict.fromkeys(setting.place for setting in chosen):
            here = [setting for setting in chosen if setting.place == place]
            try:
                before = examine(place)
                for setting in here:
                    say(setting.name)
                    measured = measure(setting, options.steps, folder)
                    after = examine(place)
                    row = result_row(setting, [plan_setting(setting, each) for each in (before, after)], measured)
                    rows[setting.name], before = row, after
                    say(", ".join(f"{name} {off:+.1%}" for name, off in row.off.items()))
            except SlowLinkUnavailable as reason:
                names = ", ".join(setting.name for setting in here if setting.name not in rows)
                say(f"{names} left out: {reason}")
                left_out.append(f"{names} left out: {reason}")
    if not rows:
        return 1
    found = [rows[setting.name] for setting in chosen if setting.name in rows]
    claims = claims_of(found, slow_lines)
    about = [
        f"`python benchmarks/plan_check.py --steps {options.steps}` on {processor()}, {usable_cores()} cores, "
        f"torch {version('torch')}, deepspeed {version('deepspeed')}; ranks of one thread, fp32, gloo. "
        "Peak: most bytes of tensors at one time.",
        *left_out,
    ]
    report = markdown_report(found, claims, about)
    write_whole(options.output / "plan.md", report.encode())
    print(report)
    if options.json:
        known = {place: [each.model_dump(mode="json") for each in given] for place, given in machines.items()}
        print(json.dumps({"rows": [row.as_dict() for row in found], "claims": claims, "machines": known}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
