"""Configurations resolved for ranks that a test only thinks of, or starts on this CPU."""

from moe_train.config.parts import load_kinds
from moe_train.config.resolve import Device, Ranks, ResolvedConfig, resolve
from moe_train.config.root import Config

BYTES = 257  # tokens of the byte tokenizer


def resolve_for(
    config: Config, world_size: int, local_world_size: int | None = None, vocab_size: int = 1, device: str = "cpu"
) -> ResolvedConfig:
    """Resolve a configuration for ranks without bf16; all are on one node where the number on a node is left out."""
    ranks = Ranks(world_size, local_world_size or world_size)
    size = config.model.vocab_size or max(vocab_size, BYTES)
    return resolve(config, ranks, Device(device, has_bf16=False), size, load_kinds(config))
