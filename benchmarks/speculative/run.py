"""How much faster a draft model makes decoding: acceptance, tokens per round and speed beside the formula's.

Trains a dense target of 103 M parameters, one with MoE layers, and a draft of a quarter of the dense one's parameters,
by ordinary training. Each target then decodes with that draft and with its own first layers as draft, for several
numbers of proposed tokens and temperatures, in turn with plain decoding. Writes speculative.md and speculative.png.

    python -m benchmarks.speculative [--json] [--small] [--steps N] [--runs FOLDER] [--draft-tokens 1 2 4 6]
                                     [--temperatures 0 0.7 1] [--new-tokens N] [--rounds N] [--output FOLDER]
"""

import argparse
import contextlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, print_json, require_matplotlib, say, write_results
from benchmarks.speculative.decode import Subject, compare_in_fp64, experts_touched, load_subjects, measure
from benchmarks.speculative.models import FULL, SMALL, train_models
from benchmarks.speculative.report import draw_chart, markdown_report
from benchmarks.speculative.rows import Row, Setting, claims_of, result_row
from moe_train.host.cores import usable_cores

MIN_STEPS = 10
DRAFT_TOKENS, TEMPERATURES = (1, 2, 3, 4, 6), (0.0, 0.7, 1.0)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; None: that of this process."""
    parser = BenchmarkParser(
        "speculative",
        __doc__,
        epilog="About an hour and a half on two cores, most of it training; two minutes with --small. Needs 4 GB.",
    )
    small_text = "small models and short training: a check that all works; its claims do not hold, and the code is 1"
    parser.add_argument("--small", action="store_true", help=small_text)
    parser.add_number("--steps", None, "steps of the targets (default: 250; 20 with --small)", least=MIN_STEPS)
    parser.add_numbers("--draft-tokens", DRAFT_TOKENS, "rows: tokens proposed per round")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=list(TEMPERATURES), metavar="X",
        help=f"rows: sampling temperatures, 0 among them: greedy (default: {' '.join(map(str, TEMPERATURES))})",
    )  # fmt: skip
    parser.add_number("--new-tokens", None, "tokens of each text (default: 96; 24 with --small)", least=2)
    parser.add_number("--rounds", None, "timings of every row (default: 3; 1 with --small)")
    parser.add_number("--threads", None, f"CPU threads (default: {usable_cores()}; 1 with --small)")
    parser.add_number("--seed", 0, "seed of training and draws", least=0)
    help_text = "folder for the trained models; those that are there are used (default: a temporary one)"
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help=help_text)
    parser.add_output("speculative.md and speculative.png")
    options = parser.read(arguments)
    options.draft_tokens = sorted(set(options.draft_tokens))
    options.temperatures = sorted(set(options.temperatures))
    for value in options.temperatures:
        if not 0 <= value < math.inf:
            parser.error(f"--temperatures ({value:g}) must be 0 or more")
    if 0 not in options.temperatures:
        parser.error("--temperatures must include 0: the greedy text is compared with the target's own")
    threads = usable_cores(), 1
    for name, value in (("threads", threads), ("steps", (250, 20)), ("new_tokens", (96, 24)), ("rounds", (3, 1))):
        if getattr(options, name) is None:
            setattr(options, name, value[options.small])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, decode, write and print; 0 if every claim holds, else 1."""
    options = parse_options(arguments)
    require_matplotlib()
    recipes, threads = SMALL if options.small else FULL, options.threads
    with contextlib.ExitStack() as stack:
        kept = options.runs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe_train_speculative_")))
        folders = train_models(recipes, options.steps, options.seed, threads, kept.resolve())
        subjects = load_subjects(folders, recipes.own_layers, options.new_tokens, options.seed)
    torch.set_num_threads(threads)
    for subject in subjects.values():  # a warm-up of every model
        replaced = Subject(subject.run, subject.drafts, 4, options.seed)
        for draft in (None, *subject.drafts):
            replaced.decode(0.0, draft, 2)
    found, differences, texts = measure(subjects, options.temperatures, options.draft_tokens, options.rounds)
    rows: list[Row] = [
        result_row(setting, turns, found[Setting(setting.target, "", setting.temperature, 0)])
        for setting, turns in found.items()
        if setting.draft
    ]
    for row in rows:
        say(f"{row.target} {row.draft} T {row.temperature:g} N {row.draft_tokens}: {row.speedup:.2f}")
    parameters = {name: subject.run.model for name, subject in subjects.items()} | {
        "draft": subjects["dense"].drafts["draft"][0]
    }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in parameters.items()}
    figures = _figures(options, threads, subjects, counts) | {"rows": rows, "differences": differences}
    wide = compare_in_fp64(subjects, options.draft_tokens[-1])  # the last use of the models: they are fp64 behind it
    claims = claims_of(rows, differences, texts, counts, wide)
    write_results(options.output, "speculative", markdown_report(rows, claims, figures), draw_chart(rows))
    print_json(options, figures | {"claims": claims})
    return 0 if all(claim["holds"] for claim in claims) else 1


def _figures(
    options: argparse.Namespace, threads: int, subjects: dict[str, Subject], parameters: dict[str, int]
) -> dict[str, Any]:
    sparse = subjects["sparse"]
    moe = sparse.run.config.model.moe
    numbers = (0, *options.draft_tokens)
    return {
        "machine": describe_machine(threads=threads),
        "small": options.small,
        "steps": options.steps,
        "new_tokens": options.new_tokens,
        "texts": len(sparse.prompts),
        "rounds": options.rounds,
        "seed": options.seed,
        "parameters": parameters,
        "experts": experts_touched(sparse, options.draft_tokens),
        "experts_formula": {n: moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** (n + 1)) for n in numbers},
    }
