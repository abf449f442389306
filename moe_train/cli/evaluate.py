"""Command `moe-train evaluate`: loss, perplexity, bits per byte and expert load of a trained model on any text."""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe_train.cli.trained import (
    add_trained_options,
    check_positive,
    data_fields,
    names_other_data,
    open_from_options,
)
from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError
from moe_train.data import Domain, open_domains

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_train.infer.evaluate import Evaluation
    from moe_train.infer.trained import Trained

_BATCH_SIZE = 8


def run(arguments: Sequence[str]) -> int:
    """Evaluate a trained model and print the results.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code 0.

    Raises:
        UsageError: If an argument is wrong, or a checkpoint or text cannot be read.

    Collective: All ranks of the world.
    """
    options, data_options = _parser().parse_known_args(list(arguments))
    check_positive(options, "max_sequences", "sequence_length", "batch_size", "context_parallel_size")
    _check_length(options)
    trained = open_from_options(options, "moe-train evaluate", _changes(options), data_options)
    config, world = trained.config, trained.world
    domains = open_domains(
        config.data,
        trained.tokenizer,
        sequence_length=options.sequence_length or config.train.sequence_length,
        split=options.split or ("all" if names_other_data(data_fields(data_options)) else "held_out"),
        local_rank=world.local_rank,
        show_progress=world.local_rank == 0,
    )
    trained_on = config.train.sequence_length
    if (options.sequence_length or 0) > trained_on and world.rank == 0:
        text = f"--sequence-length ({options.sequence_length}) is beyond train.sequence_length ({trained_on})"
        print(f"warning: {text}, which the model was trained on", file=sys.stderr)
    from moe_train.distributed.collectives import world_group
    from moe_train.infer.evaluate import EvaluationPlan, chosen_sequences, evaluate, joined
    from moe_train.infer.trained import load_model, sharing_ranks

    model = load_model(trained)
    mark = trained.tokenizer.end_of_document if config.model.isolate_documents else None
    plan = EvaluationPlan(options.batch_size, options.max_sequences, mark, sharing_ranks(trained))
    total = sum(len(chosen_sequences(domain.text.num_sequences, plan.max_sequences)) for domain in domains)
    began = time.perf_counter()
    with _progress(total, world.rank == 0) as advance:
        results = evaluate(model, domains, plan, trained.device, world_group(), advance)
    seconds = time.perf_counter() - began
    if world.rank == 0:
        _show(options, trained, domains, [*results, joined(results)], seconds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="moe-train evaluate",
        description="Measure a trained model on the held-out text of its run, or on any other text: loss, perplexity, "
        "bits per byte, and the load of every expert by source. The result is the same every time and, within "
        "rounding, on any number of ranks.",
        epilog="Other text is named by fields of data, as in training: --data.source=text --data.paths=FILE, or "
        "--data.mixture='[{\"source\": ...}, ...]' for several sources. The tokenizer is always the run's.",
        allow_abbrev=False,
    )
    add_trained_options(parser)
    help_text = "ranks that share the tokens of a sequence, under a launcher (default: 1)"
    parser.add_argument("--context-parallel-size", type=int, default=1, metavar="N", help=help_text)
    group = parser.add_argument_group("what is measured")
    help_text = "documents of each source (default: held_out of the run's own data, all of other data)"
    group.add_argument("--split", choices=("held_out", "train", "all"), help=help_text)
    help_text = "sequences of each source, evenly spread over it (default: all)"
    group.add_argument("--max-sequences", type=int, metavar="N", help=help_text)
    help_text = "tokens of a sequence (default: train.sequence_length of the run)"
    group.add_argument("--sequence-length", type=int, metavar="N", help=help_text)
    help_text = (
        "bound of an expert's tokens in each sequence, as a multiple of the mean; none: dropless "
        "(default: model.moe.eval_capacity_factor of the run)"
    )
    group.add_argument("--capacity-factor", metavar="X", help=help_text)
    help_text = f"sequences of a rank, or of ranks that share them, in one forward pass (default: {_BATCH_SIZE})"
    group.add_argument("--batch-size", type=int, default=_BATCH_SIZE, metavar="N", help=help_text)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _check_length(options: argparse.Namespace) -> None:
    length, size = options.sequence_length, options.context_parallel_size
    if length is not None and size > 1 and length % (2 * size):
        raise UsageError(
            f"--sequence-length ({length}) must be divisible by 2 x --context-parallel-size (2 x {size} = {2 * size}): "
            "each rank has two chunks of every sequence"
        )


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    if options.capacity_factor is None:
        return {}
    factor = None
    if options.capacity_factor != "none":
        try:
            factor = float(options.capacity_factor)
        except ValueError as error:
            raise UsageError(f"--capacity-factor ({options.capacity_factor!r}) must be a number or none") from error
        if not 0.0 < factor < math.inf:
            raise UsageError(f"--capacity-factor ({options.capacity_factor}) must be a finite number above 0, or none")
    return {"model": {"moe": {"eval_capacity_factor": factor}}}


@contextlib.contextmanager
def _progress(total: int, is_shown: bool) -> "Iterator[Callable[[int], object]]":
    console = Console(stderr=True)
    if not (is_shown and console.is_terminal and not console.is_dumb_terminal):
        yield lambda _: None
        return
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.update(task, advance=count)


def _show(
    options: argparse.Namespace,
    trained: "Trained",
    domains: Sequence[Domain],
    results: "Sequence[Evaluation]",
    seconds: float,
) -> None:
    layers, moe = trained.config.model.moe_layer_indices, trained.config.model.moe
    whole = results[-1]
    if options.json:
        values = whole.as_dict(layers)
        del values["name"]
        values["domains"] = [result.as_dict(layers) for result in results[:-1]]
        values |= {"capacity_factor": moe.eval_capacity_factor if layers else None}
        values |= {"copies": trained.config.model.hidden_copies.copies}  # experts count copies as tokens
        values |= {"seconds": seconds, "tokens_per_second": whole.tokens / seconds}
        values |= {"checkpoint": str(trained.manifest.folder), "step": trained.manifest.step}
        print(json.dumps(values))
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an output encoding may lack block characters
    console = Console(highlight=False)
    shown = results if len(results) > 2 else results[:1]
    console.print(f"{trained.manifest.folder} ({trained.manifest.step} steps)", markup=False)
    console.print(_loss_table(shown, bool(layers)), markup=False)
    for domain in domains:
        if domain.text.unrecovered:
            console.print(f"{domain.name}: no bits per byte: {domain.text.describe_loss()}", markup=False)
        for name, bits in domain.text.reference_bits_per_byte.items():
            console.print(f"{domain.name}: {name} {bits:.3f} bits/byte", markup=False)
    if layers:
        console.print(_load_table(shown, layers), markup=False)
    console.print(f"{whole.tokens:,} tokens in {seconds:.1f} s, {whole.tokens / seconds:,.0f} tokens/s")


def _loss_table(results: "Sequence[Evaluation]", has_experts: bool) -> Table:
    table = Table()
    table.add_column("text", overflow="fold")
    for column in ("tokens", "loss", "perplexity", "bits/byte", *(["dropped", "MaxVio"] if has_experts else [])):
        table.add_column(column, justify="right")
    for result in results:
        bits = "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        cells = [f"{result.tokens:,}", f"{result.loss:.4f}", f"{result.perplexity:,.2f}", bits]
        if result.max_violation is not None:
            cells += [f"{result.dropped_fraction:.2%}", f"{result.max_violation:.2f}"]
        table.add_row(result.name, *cells)
    return table


def _load_table(results: "Sequence[Evaluation]", layers: Sequence[int]) -> Table:
    from moe_train.train.telemetry.load_report import load_bars

    title = "Tokens per expert (a full bar: twice the mean)"
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    table.add_column("layer", justify="right")
    table.add_column("text", overflow="fold")
    table.add_column("experts", overflow="fold")
    for place, layer in enumerate(layers):
        for number, result in enumerate(results):
            name = f"{layer:02d}" if number == 0 else ""
            table.add_row(name, result.name, load_bars(result.shares(place)), end_section=result is results[-1])
    return table
