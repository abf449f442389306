"""Floating-point operations of training, counted from the configuration."""

from moe_train.config.model import ModelConfig
from moe_train.model.build import build_model
from moe_train.model.parameters import logical_tensors

_BACKWARD_PASSES = 2  # the products of a backward pass are twice those of the forward pass


def training_flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> float:
    """Operations of one token's forward and backward pass that the model needs, whatever is computed again.

    Two for each weight of the matrices that a token passes (of the experts, top_k of num_experts), and two products of
    queries with the keys and values that causal attention sees: (S + 1) / 2 in the mean, or what a window leaves. What
    is looked up, normed, activated or sampled is not counted.

    Args:
        config: The model.
        vocab_size: Rows of the embedding.
        sequence_length: S, tokens of a sequence.

    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B, with the keys that are not masked.
    """
    tensors = logical_tensors(build_model(config, vocab_size))
    matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) > 1}
    weights = 0.0
    for name, tensor in matrices.items():
        if name == "embedding.weight" and not config.tie_embeddings:
            continue  # looked up; where it is the head's too, it is counted once for the head
        share = config.moe.top_k / config.moe.num_experts if tensor.is_expert else 1.0
        weights += share * tensor.global_numel
    window = min(config.sliding_window or sequence_length, sequence_length)
    # The first `window` tokens see 1, 2, ... keys, the others `window`.
    keys = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
    attention = 2 * config.num_layers * config.num_heads * config.attention_head_dim * keys
    return (1 + _BACKWARD_PASSES) * 2 * (weights + attention)
