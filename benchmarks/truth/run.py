"""Who keeps the numbers where: moe_train, DeepSpeed AutoEP, DeepSpeed MoE and Hugging Face under ZeRO, checked alike.

One small Mixtral-like model with the same start weights and synthetic tokens is trained 20 steps in fp32 by each system
in every layout of 1, 2 and 4 ranks, expert parallelism, ZeRO 0 to 3 and accumulation 1, 2, 4, with the cross-entropy
alone and with the system's own balance loss. Each step's loss and gradient norm and the last weights are held against
one process of the same system, with the bounds of `moe-train parity`. A checkpoint of step 10 goes on in other layouts,
against the run that was never stopped. Writes truth.md.

    python -m benchmarks.truth [--json] [--systems NAME ...] [--terms NAME ...] [--cases CODE ...] [--whole]
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, machine_words, print_json, say, write_results
from benchmarks.truth.cases import SYSTEMS, TERMS, Case, default_cases, read_case
from benchmarks.truth.report import markdown_report, verdict_line
from benchmarks.truth.rows import Verdict, claims_of, judge_cases
from benchmarks.truth.systems import Numbers, Systems
from moe_train.config.errors import UsageError


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, checked.

    Raises:
        UsageError: If a case has no such name.
    """
    parser = BenchmarkParser(
        "truth", __doc__, epilog="Ten to forty minutes on two cores, by what else runs; needs 6 GB of memory."
    )
    add = parser.add_argument
    add("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="NAME", help=f"of {', '.join(SYSTEMS)} (all)")
    add("--terms", nargs="+", choices=tuple(TERMS), default=tuple(TERMS), metavar="NAME", help="plain, balance (both)")
    what = "such as 4x2z3a2 (4 ranks, EP 2, ZeRO 3, accumulation 2), or 2x2z1a1-4x4z2a1: saved by, loaded by (all)"
    add("--cases", nargs="+", metavar="CODE", help=what)
    add(
        "--whole", action="store_true", help="every layout of the grid in place of a slice of it; several times as long"
    )
    parser.add_output("truth.md")
    options = parser.read(arguments)
    options.cases = None if options.cases is None else [read_case(code) for code in options.cases]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, judge and show; 0 if this project keeps its numbers, else 1."""
    options = parse_options(arguments)
    if importlib.util.find_spec("transformers") is None:
        install = 'pip install -c requirements/constraints.txt -e ".[hf]"'
        raise UsageError(f"the peers need transformers: {install}")
    began = time.monotonic()
    verdicts: list[Verdict] = []
    starts: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="moe_train_truth_") as folder, Systems(Path(folder)) as systems:
        for system in options.systems:
            for terms in options.terms:
                cases = options.cases if options.cases is not None else default_cases(terms, options.whole)

                def run(case: Case, system: str = system, terms: str = terms) -> Numbers:
                    numbers = systems.run(system, case, terms)
                    if terms == "plain":
                        starts.setdefault(system, float(numbers.records[0]["train/loss"] or 0.0))
                    return numbers

                verdicts += judge_cases(system, cases, terms, run, lambda verdict: say(verdict_line(verdict)))
    claims, machine = claims_of(verdicts), describe_machine("deepspeed", "transformers")
    about = [
        f"`python -m benchmarks.truth` on {machine_words(machine)}; ranks of one thread, gloo, fp32, "
        f"{time.monotonic() - began:.0f} s.",
    ]
    if starts:
        first = ", ".join(f"{system} {loss:.6f}" for system, loss in starts.items())
        about.append(f"Loss of the first step, all with the same weights and tokens: {first}.")
    page = markdown_report(verdicts, claims, about)
    is_everything = options.cases is None and set(options.systems) == set(SYSTEMS) and set(options.terms) == set(TERMS)
    if is_everything:
        write_results(options.output, "truth", page)
    else:
        print(page)
    print_json(options, {"machine": machine, "verdicts": [each.as_dict() for each in verdicts], "claims": claims})
    return 0 if all(claim["holds"] for claim in claims) else 1
