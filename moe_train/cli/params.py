"""Command `moe-train params`: count the parameters of a configuration, total and active, without allocating them."""

import json
from collections.abc import Sequence

from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.root import Config


def run(arguments: Sequence[str]) -> int:
    """Count the parameters of a configuration and print the counts.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code 0.

    Raises:
        UsageError: If an argument is wrong, or the size of the vocabulary is unknown.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, rest = parser.parse_known_args(list(arguments))
    config = load_config(
        rest,
        program="moe-train params",
        description="Count a configuration's parameters. --json: one JSON object.",
        defaults={"train": {"run_dir": "unused"}},
    )
    from moe_train.model.count import count_parameters  # imports torch, so only for a valid configuration

    count = count_parameters(config.model, known_vocab_size(config))
    if options.json:
        print(json.dumps({"total": count.total, "active": count.active, "experts": count.experts}))
    else:
        rows = (("total", count.total), ("active per token", count.active), ("experts", count.experts))
        print("\n".join(f"{name:<16} {number:>18,}" for name, number in rows))
    return 0


def known_vocab_size(config: Config) -> int:
    """Return the rows of the embedding, from the configuration alone.

    Args:
        config: Configuration as loaded.

    Raises:
        UsageError: If only the tokenizer file gives the number.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    known = {"bytes": 257, "bpe": config.data.bpe_vocab_size}
    if config.data.tokenizer not in known:
        raise UsageError(
            "model.vocab_size is not set, and it is unknown what vocabulary "
            f"data.tokenizer ({config.data.tokenizer!r}) has: set model.vocab_size"
        )
    return known[config.data.tokenizer]
