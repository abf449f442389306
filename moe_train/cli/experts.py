"""Command `moe-train experts`: what each expert of a trained model works on."""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moe_train.cli.paths import path_argument
from moe_train.cli.trained import (
    add_place_options,
    check_positive,
    data_fields,
    names_other_data,
    open_from_options,
)
from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError
from moe_train.data import open_domains

if TYPE_CHECKING:
    from moe_train.infer.experts import LayerProfile
    from moe_train.infer.trained import Trained

_BATCH_SIZE = 8
_MANY_SEQUENCES = 1000  # default: enough for the tokens of 64 experts, and a minute on a CPU for a small model


def run(arguments: Sequence[str]) -> int:
    """Print what the experts of a trained model work on.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code 0.

    Raises:
        UsageError: If an argument is wrong, the model has no experts, or a checkpoint or text cannot be read.

    Collective: All ranks of the world.
    """
    options, data_options = _parser().parse_known_args(list(arguments))
    check_positive(options, "max_sequences", "tokens")
    trained = open_from_options(options, "moe-train experts", None, data_options)
    config, world = trained.config, trained.world
    layers = config.model.moe_layer_indices
    if not layers:
        raise UsageError(f"{options.run!r}: the model has no MoE layer")
    if options.layer is not None and options.layer not in layers:
        raise UsageError(f"--layer ({options.layer}) is no MoE layer of this model: {', '.join(map(str, layers))}")
    if options.picture is not None and not Path(options.picture).absolute().parent.is_dir():
        raise UsageError(f"--picture ({options.picture!r}): there is no folder {Path(options.picture).parent}")
    domains = open_domains(
        config.data,
        trained.tokenizer,
        sequence_length=config.train.sequence_length,
        split="all" if names_other_data(data_fields(data_options)) else "held_out",
        local_rank=world.local_rank,
        show_progress=world.local_rank == 0,
    )
    from moe_train.distributed.collectives import world_group
    from moe_train.infer.evaluate import EvaluationPlan
    from moe_train.infer.experts import profile_experts
    from moe_train.infer.trained import load_model

    model = load_model(trained)
    mark = trained.tokenizer.end_of_document if config.model.isolate_documents else None
    profiles = profile_experts(
        model,
        domains,
        EvaluationPlan(_BATCH_SIZE, options.max_sequences, mark),
        trained.device,
        world_group(),
        trained.tokenizer.decode,
        layers,
        options.tokens,
    )
    if world.rank == 0:
        _show(options, trained, [each for each in profiles if options.layer in (None, each.layer)])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="moe-train experts",
        description="Show what every expert of a trained model works on: its share of held-out text, and the tokens "
        "that it gets far more often than the other experts do. Routers draw no noise.",
        epilog="Other text is named by fields of data, as in training: --data.source=text --data.paths=FILE.",
        allow_abbrev=False,
    )
    help_text = "a run's folder (its newest checkpoint), or a checkpoint's"
    parser.add_argument("run", type=path_argument, metavar="RUN", help=help_text)
    parser.add_argument("--layer", type=int, metavar="NN", help="only this layer (default: all)")
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="tokens named per expert (default: 8)")
    help_text = f"sequences of each source, evenly spread over it (default: {_MANY_SEQUENCES})"
    parser.add_argument("--max-sequences", type=int, default=_MANY_SEQUENCES, metavar="N", help=help_text)
    help_text = "write a PNG: rows of experts, columns of kinds of tokens, red where an expert gets more than its share"
    parser.add_argument("--picture", type=path_argument, metavar="FILE", help=help_text)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    add_place_options(parser)
    return parser


def _show(options: argparse.Namespace, trained: "Trained", profiles: "Sequence[LayerProfile]") -> None:
    if options.picture is not None:
        _draw(profiles, Path(options.picture))
    if options.json:
        values: dict[str, Any] = {"checkpoint": str(trained.manifest.folder), "step": trained.manifest.step}
        print(json.dumps(values | {"layers": [profile.as_dict() for profile in profiles]}))
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an output encoding may lack characters of the text
    console = Console(highlight=False)
    console.print(f"{trained.manifest.folder} ({trained.manifest.step} steps)", markup=False)
    for profile in profiles:
        title = f"Layer {profile.layer:02d}: a token's id explains {profile.information:.0%} of the choice of experts"
        table = Table(title=title, title_justify="left", min_width=len(title) + 2)
        table.add_column("expert", justify="right")
        table.add_column("share", justify="right")
        table.add_column("tokens that it gets far more often than the others (times)", overflow="fold")
        for expert in profile.experts:
            named = "  ".join(f"{token.text!r} {token.lift:.1f}" for token in expert.tokens)
            table.add_row(str(expert.expert), f"{expert.share:.2f}", named or "-")
        console.print(table, markup=False)


def _draw(profiles: "Sequence[LayerProfile]", path: Path) -> None:
    from moe_train.infer.experts import KINDS
    from moe_train.train.telemetry.heatmap import draw_kinds

    rows = [(profile.layer, expert) for profile in profiles for expert in profile.experts]
    lifts = [[expert.kinds[kind] for kind in KINDS] for _, expert in rows]
    names = [f"{layer:02d}/{expert.expert}" for layer, expert in rows]
    try:
        draw_kinds(lifts, names, KINDS).save(path, format="png")
    except OSError as error:
        raise UsageError(f"--picture ({str(path)!r}) cannot be written: {error}") from error
