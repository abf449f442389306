"""Count of the floating-point operations of training, from the configuration."""

from collections import Counter

from moe_train.config.model import ModelConfig
from moe_train.model.build import build_model, mixer_of
from moe_train.model.parameters import logical_tensors

_BACKWARD_PASSES = 2  # the products of a backward pass are twice those of the forward pass


def training_flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> float:
    """Count the operations of one token's forward and backward pass that the model needs, without recomputation.

    In the forward pass they are two for each weight of the matrices that a token passes (top_k of num_experts experts),
    and what each mixer states that it computes beside them, its own tensors of three dimensions included; in the
    backward pass they are twice as many. All hidden copies of a token count for it; only the last copy passes the head.
    Lookups, norms, activations and sampling are not counted.

    Args:
        config: Model section of the configuration.
        vocab_size: Rows of the embedding.
        sequence_length: S, tokens of a sequence.

    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B, with the keys that are not masked.
    """
    tensors = logical_tensors(build_model(config, vocab_size))
    matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) == 2 or tensor.is_expert}
    weights, head = 0.0, "embedding.weight" if config.tie_embeddings else "head.weight"
    for name, tensor in matrices.items():
        if name == "embedding.weight" and not config.tie_embeddings:
            continue  # looked up; where it is the head's too, it is counted once for the head
        share = config.moe.top_k / config.moe.num_experts if tensor.is_expert else 1.0
        share *= 1 if name == head else config.hidden_copies.copies
        weights += share * tensor.global_numel
    return (1 + _BACKWARD_PASSES) * (2 * weights + mixing_flops(config, sequence_length))


def mixing_flops(config: ModelConfig, sequence_length: int) -> float:
    """Count the operations of one token's forward pass, with its copies, in all mixers, without their matrices."""
    found = (mixer_of(config, layer) for layer in range(config.num_layers))
    layers = Counter(kind.flops(spec, sequence_length) for kind, spec in found)
    return sum(count * flops for flops, count in layers.items())
