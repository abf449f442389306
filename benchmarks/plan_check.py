"""How far `moe-train plan` is from what happens on this machine: model states, peak memory, bytes and step time.

For each number of ranks moe-train doctor measures the machine; every setting is planned with that, its ranks' memory is
counted in a few steps (benchmarks/plan_check_rank.py), and it is trained by launch/train.py. The ranks of some settings
are on two network namespaces with a slow line between them (Linux, root). The machine should have nothing else to do.
Writes plan.md.

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

from benchmarks.plan_check_rows import SETTINGS, STEPS_A_RECORD, claims_of, markdown_report, plan_setting, result_row  # noqa: E402
from benchmarks.plan_check_runs import measure, measure_machine  # noqa: E402
from benchmarks.reports import make_output, processor, say, write_whole  # noqa: E402
from benchmarks.slow_link import SlowLinkUnavailable  # noqa: E402
from moe_train.parallel.cores import usable_cores  # noqa: E402


def parse_options() -> argparse.Namespace:
    """The command line, checked."""
    names = [setting.name for setting in SETTINGS]
    parser = argparse.ArgumentParser(
        prog="plan_check.py", description=__doc__.split("\n\n")[0], epilog="20 minutes or so.", allow_abbrev=False
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
    rows, machines, slow_lines, left_out = [], {}, {}, []
    with tempfile.TemporaryDirectory(prefix="plan-check-") as temporary:
        folder = Path(temporary)
        for setting in chosen:
            place = setting.place
            try:
                if place not in machines:
                    say(f"moe-train doctor, ranks: {place}")
                    machines[place], named = measure_machine(place, folder / f"doctor_{len(machines)}")
                    slow_lines |= {str(place): named} if place.nodes > 1 else {}
                say(setting.name)
                measured = measure(setting, options.steps, folder)
            except SlowLinkUnavailable as reason:
                say(f"{setting.name} is left out: {reason}")
                left_out.append(f"{setting.name} is left out: {reason}")
                continue
            rows.append(result_row(setting, plan_setting(setting, machines[place]), measured))
            say(", ".join(f"{name} {off:+.1%}" for name, off in rows[-1].off.items()))
    if not rows:
        return 1
    claims = claims_of(rows, slow_lines)
    about = [
        f"`python benchmarks/plan_check.py` on {processor()}, {usable_cores()} cores, torch {version('torch')}, "
        f"deepspeed {version('deepspeed')}; ranks of one thread, fp32, gloo. Peak: most bytes of tensors at one time.",
        *left_out,
    ]
    report = markdown_report(rows, claims, about)
    write_whole(options.output / "plan.md", report.encode())
    print(report)
    if options.json:
        known = {str(place): machine.model_dump(mode="json") for place, machine in machines.items()}
        print(json.dumps({"rows": [row.as_dict() for row in rows], "claims": claims, "machines": known}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
