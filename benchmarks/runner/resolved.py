"""Resolution of a benchmark's configuration: for ranks that are started, or that are about to be."""

import torch

from moe_train.config.parts import load_kinds
from moe_train.config.resolve import Ranks, ResolvedConfig, WorldSize, resolve
from moe_train.config.root import Config
from moe_train.host.precision import describe_device

BYTES = 257  # tokens of the byte tokenizer


def resolve_for(
    config: Config, ranks: int | WorldSize, device: str = "cpu", vocab_size: int | None = None
) -> ResolvedConfig:
    """Resolve a configuration.

    Args:
        config: As loaded.
        ranks: Number of ranks on this host, or their world.
        device: Type of the device.
        vocab_size: Tokens of the tokenizer; None: model.vocab_size, or bytes.

    Raises:
        UsageError: If sizes do not divide.
    """
    world = Ranks(ranks, ranks) if isinstance(ranks, int) else ranks
    size = vocab_size or config.model.vocab_size or BYTES
    return resolve(config, world, describe_device(torch.device(device)), size, load_kinds(config))
