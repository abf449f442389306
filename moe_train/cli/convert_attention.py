"""Command `moe-train convert-attention`: convert a trained model to fewer key/value heads or layers, for uptraining."""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.cli.paths import path_argument
from moe_train.cli.trained import add_run_option, check_positive
from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError

if TYPE_CHECKING:
    from moe_train.checkpoint.manifest import Manifest
    from moe_train.interop.convert_attention import Converted


def run(arguments: Sequence[str]) -> int:
    """Convert a checkpoint and print a summary of the result.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code 0.

    Raises:
        UsageError: If an argument is wrong or the output cannot be written.
    """
    options = _parser().parse_args(list(arguments))
    kv_layers = _read_layers(options.kv_layers)
    check_positive(options, "steps")
    if options.num_kv_heads is None and kv_layers is None:
        raise UsageError("give --num-kv-heads, --kv-layers or both: without them nothing changes")
    from moe_train.checkpoint.inventory import find_checkpoint_folder
    from moe_train.checkpoint.manifest import read_manifest
    from moe_train.interop.convert_attention import ConversionRequest, convert_attention

    manifest = read_manifest(find_checkpoint_folder(options.run, "--run"))
    request = ConversionRequest(Path(options.output), options.num_kv_heads, kv_layers, options.steps, options.widen_mlp)
    try:
        done = convert_attention(manifest, request)
    except OSError as error:
        raise UsageError(f"--output ({options.output!r}) could not be written: {error}") from error
    if options.json:
        print(json.dumps(done.as_dict()))
    else:
        _show(manifest, done, options.widen_mlp)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="moe-train convert-attention",
        description="Reduce the keys and values of a trained model, MHA to GQA, MQA or MLKV: a new head is the mean of "
        "the heads of its group, over all layers that are to share it. What is written is a new run folder at step 0, "
        "which the train command goes on from; the source stays as it is.",
        allow_abbrev=False,
    )
    add_run_option(parser)
    parser.add_argument(
        "--output", type=path_argument, required=True, metavar="NEW_RUN_DIR", help="the new run's folder"
    )
    help_text = "heads of keys and values; must divide the source's (default: as many as it has)"
    parser.add_argument("--num-kv-heads", type=int, metavar="G", help=help_text)
    help_text = (
        "layers that own keys and values, which those above read: their number, or a list such as 0,4,8 (default: the "
        "source's). Quality holds down to half of all layers and falls hard at one"
    )
    parser.add_argument("--kv-layers", metavar="M", help=help_text)
    help_text = "steps of uptraining (default: 5%% of the source's train.steps)"
    parser.add_argument("--steps", type=int, metavar="N", help=help_text)
    help_text = (
        "widen the MLPs, in multiples of 8, by as many parameters as are saved; what the model computes stays the same"
    )
    parser.add_argument("--widen-mlp", action="store_true", help=help_text)
    help_text = (
        "print one JSON object as the last line; its kv_cache_bytes_per_token are 2 x kv layers x kv heads x head_dim "
        "x 4, for fp32"
    )
    parser.add_argument("--json", action="store_true", help=help_text)
    return parser


def _read_layers(given: str | None) -> int | tuple[int, ...] | None:
    if given is None:
        return None
    try:
        layers = tuple(int(part) for part in given.split(","))
    except ValueError as error:
        raise UsageError(f"--kv-layers ({given!r}) must be a number of layers, or a list such as 0,4,8") from error
    return layers if len(layers) > 1 else layers[0]


def _show(manifest: "Manifest", done: "Converted", is_widened: bool) -> None:
    cache, parameters = done.kv_cache_bytes_per_token, done.parameters
    layers = ", ".join(map(str, done.kv_layers))
    print(f"{done.output}: made from {manifest.folder}")
    print(f"key and value heads: {done.num_kv_heads}, owned by layers {layers}")
    print(f"KV cache of a token, in fp32: {cache.before:,} -> {cache.after:,} bytes")
    print(f"parameters: {parameters.before:,} -> {parameters.after:,}")
    if is_widened:
        print(f"inner widths: {done.intermediate_size} dense, {done.expert_intermediate_size} of an expert")
    print(f"uptrain it for {done.steps} steps:")
    print(f"  moe-train train --config {shlex.quote(str(Path(done.output) / 'config.yaml'))}")
