"""Sizes of a model by layer, counted from its logical tensors on the meta device.

Legend: D hidden_size, H query heads, G key/value heads, d head size, F inner width, E experts, K top_k, V vocabulary.
"""

from dataclasses import dataclass, field

from moe_train.config.model import ModelConfig
from moe_train.model.build import build_model, feed_forward_of, mixer_of
from moe_train.model.cost import FeedForwardCost, MixerCost
from moe_train.model.count import ParameterCount
from moe_train.model.flops import training_flops_per_token
from moe_train.model.parameters import LogicalTensor, logical_tensors, optim_rules


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one block.

    Attributes:
        mixer: Cost of its mixer.
        feed_forward: Cost of its dense feed-forward layer; None: it has experts.
        dense: Elements of its tensors, without the experts.
        experts: Elements of its experts on all ranks.
    """

    mixer: MixerCost
    feed_forward: FeedForwardCost | None
    dense: int
    experts: int

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return self.feed_forward is None


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        config: Model section of the configuration.
        vocab_size: V, rows of the embedding.
        layers: Sizes of every block.
        outside: Elements outside the blocks: embedding, final norm, head.
        tensors: All logical tensors.
        flops_per_token: Operations per token that training needs.
        matrices: Tensors that are linear maps of the blocks, with the number of maps side by side in each.
    """

    config: ModelConfig
    vocab_size: int
    layers: tuple[LayerShape, ...]
    outside: int
    tensors: tuple[LogicalTensor, ...]
    flops_per_token: float
    matrices: dict[str, int] = field(default_factory=dict)

    @property
    def parameters(self) -> ParameterCount:
        """Number of parameters, total, active and of experts, as `count_parameters` counts them."""
        experts = self.experts
        moe = self.config.moe
        active = self.dense + experts // moe.num_experts * moe.top_k
        return ParameterCount(self.dense + experts, active, experts)

    @property
    def dense(self) -> int:
        """Elements of all tensors except the experts."""
        return self.outside + sum(layer.dense for layer in self.layers)

    @property
    def experts(self) -> int:
        """Elements of all experts."""
        return sum(layer.experts for layer in self.layers)

    @property
    def num_moe_layers(self) -> int:
        """Number of blocks with experts."""
        return sum(layer.is_moe for layer in self.layers)


def model_shape(config: ModelConfig, vocab_size: int, sequence_length: int) -> ModelShape:
    """Count the sizes of a model.

    Args:
        config: Model section of the configuration.
        vocab_size: V, rows of the embedding.
        sequence_length: Tokens per sequence.
    """
    model = build_model(config, vocab_size)
    tensors = logical_tensors(model).values()
    matrices = {name: rule.matrices for name, rule in optim_rules(model).items() if rule.matrices}
    dense, experts, outside = [0] * config.num_layers, [0] * config.num_layers, 0
    for tensor in tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blocks":
            outside += tensor.global_numel
        elif tensor.is_expert:
            experts[int(parts[1])] += tensor.global_numel
        else:
            dense[int(parts[1])] += tensor.global_numel
    moe = set(config.moe_layer_indices)
    mixers = [kind.cost(spec) for kind, spec in (mixer_of(config, layer) for layer in range(config.num_layers))]
    feed_forwards = [kind.cost(spec) for kind, spec in (feed_forward_of(config, n) for n in range(config.num_layers))]
    layers = tuple(
        LayerShape(mixers[layer], None if layer in moe else feed_forwards[layer], dense[layer], experts[layer])
        for layer in range(config.num_layers)
    )
    flops = training_flops_per_token(config, vocab_size, sequence_length)
    return ModelShape(config, vocab_size, layers, outside, tuple(tensors), flops, matrices)
