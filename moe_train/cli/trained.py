"""Options of every command that uses a trained model, and what they open."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_train.cli.paths import path_argument
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config, validate_config
from moe_train.config.root import Config
from moe_train.distributed.bootstrap import discover_world

if TYPE_CHECKING:
    from moe_train.infer.trained import Trained, Use

_NAMING = ("source", "mixture", "paths", "name", "subset")  # fields that name other data than the run's
_TOKENIZER = ("tokenizer", "bpe_vocab_size", "end_of_document")


def add_run_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the checkpoint, for `find_checkpoint_folder(options.run, "--run")`."""
    # torchrun takes --run for one of its own options, wherever it stands; it leaves --run-dir alone.
    help_text = "a run's folder (its newest checkpoint), or a checkpoint's"
    parser.add_argument(
        "--run", "--run-dir", dest="run", type=path_argument, required=True, metavar="DIR", help=help_text
    )


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuse options that are given with a value below 1.

    Raises:
        UsageError: If a value is below 1; it names the option and the value.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} ({value}) must be 1 or more")


def add_trained_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that uses a trained model."""
    add_run_option(parser)
    add_place_options(parser)


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a trained model runs."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it is")
    help_text = "of the model; auto: as it was trained, fp32 where the device lacks that"
    group.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help=help_text)
    help_text = (
        "ranks that share the experts, under a launcher (default: as many as divide experts and ranks of a host)"
    )
    group.add_argument("--expert-parallel-size", type=int, metavar="N", help=help_text)
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of a rank (default: a host's share)")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it


def use_of(options: argparse.Namespace) -> "Use":
    """Make the settings of the use of a trained model from options of a parser with `add_trained_options`."""
    from moe_train.infer.trained import Use

    size = getattr(options, "context_parallel_size", 1)  # an option of evaluation alone
    return Use(options.device, options.precision, options.expert_parallel_size, options.threads, size)


def open_from_options(
    options: argparse.Namespace,
    program: str,
    changes: dict[str, Any] | None = None,
    data_options: Sequence[str] = (),
) -> "Trained":
    """Find the checkpoint, its configuration and tokenizer.

    Args:
        options: Options of a parser with `add_trained_options`.
        program: Name for messages.
        changes: Fields of the configuration that other options of the command set.
        data_options: Dotted options of the data section.

    Raises:
        UsageError: If there is no checkpoint, or its model or tokenizer differs from the configuration's.
    """
    from moe_train.infer.trained import open_trained

    check_positive(options, "expert_parallel_size", "threads")

    def configure(values: dict[str, Any], origin: str) -> Config:
        if not data_options:
            return validate_config(values, origin=origin)
        return load_config(data_options, program=program, defaults=_with_other_data(values, data_fields(data_options)))

    return open_trained(options.run, discover_world(), use_of(options), changes, configure)


def _with_other_data(values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Drop the fields that describe the run's own data from a configuration's values, if other data is named."""
    if tokenizer := given & set(_TOKENIZER):
        raise UsageError(f"--data.{min(tokenizer)}: the tokenizer is the one that the model was trained with")
    if not names_other_data(given):
        return values
    kept = (*_TOKENIZER, "cache_dir", *(() if given & {"source", "mixture"} else ("source", "text_column")))
    data = values.get("data", {})
    return values | {"data": {name: data[name] for name in kept if name in data}}


def data_fields(data_options: Sequence[str]) -> set[str]:
    """Find the fields of data that dotted options set.

    Args:
        data_options: As on the command line: "--data.x=y", or "--data.x" and "y".

    Raises:
        UsageError: If there is an option of another section.
    """
    names = {option.partition("=")[0] for option in data_options if option.startswith("--")}
    for name in names:
        if not name.startswith("--data."):
            raise UsageError(f"unknown option {name}; --help lists the options, and fields of data begin with --data.")
    return {name.removeprefix("--data.") for name in names}


def names_other_data(fields: set[str]) -> bool:
    """Return whether some fields of data name other data than the run's."""
    return bool(fields & set(_NAMING))
