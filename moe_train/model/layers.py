"""Small modules that every part of the model uses: linear maps, embedding, norms, the dense SwiGLU.

Each states the initial values of its parameters. They must be called through `__call__`, around which ZeRO-3 gathers
their weights.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.model.parameters import Constant, InitialValue, Normal, OptimRule
from moe_train.ops.cross_entropy import loss_chunk, summed_cross_entropy, token_cross_entropy
from moe_train.ops.norms import layer_norm, rms_norm
from moe_train.ops.products import linear
from moe_train.ops.swiglu import swiglu


class Linear(nn.Linear):
    """A linear map without bias."""

    def __init__(self, in_features: int, out_features: int, init_std: float, beside: int = 1) -> None:
        """Make a map.

        Args:
            in_features: Width of the input.
            out_features: Width of the output.
            init_std: Standard deviation of the initial values.
            beside: Number of maps that it is, side by side along the output.
        """
        super().__init__(in_features, out_features, bias=False)
        self.init_std, self.beside = init_std, beside

    def initial_values(self) -> dict[str, InitialValue]:
        return {"weight": Normal(self.init_std) if self.init_std else Constant(0.0)}

    def optim_rules(self) -> dict[str, OptimRule]:
        return {"weight": OptimRule(matrices=self.beside)}

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Head(Linear):
    """The map from hidden states to logits; with targets, to losses, without keeping all logits."""

    def optim_rules(self) -> dict[str, OptimRule]:
        return {}  # its rows are vectors of single tokens, as those of the embedding

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, targets_BS: Tensor | None = None, chunk: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute logits, or losses.

        Args:
            x_BSD: Hidden states.
            targets_BS: int64 targets; IGNORED_TARGET has loss 0. None: logits are wanted.
            chunk: Tokens whose logits exist at a time; None: by their size.

        Returns:
            [B, S, V] logits; with targets the sum of the losses, a scalar, and the losses [B, S] without a gradient.
        """
        if targets_BS is None:
            return linear(x_BSD, self.weight)
        (vocab_size, hidden_size), tokens = self.weight.shape, targets_BS.numel()
        chunk = loss_chunk(tokens, vocab_size, hidden_size, self.weight.element_size(), chunk)
        if chunk < tokens:
            total, losses_T = summed_cross_entropy(x_BSD.flatten(0, 1), self.weight, targets_BS.flatten(), chunk)
        else:
            logits_BSV = linear(x_BSD, self.weight)
            losses_T = token_cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
            total = losses_T.sum()
        return total, losses_T.detach().view(targets_BS.shape)


class WideLinear(Linear):
    """A linear map for routers, computed and returned in at least fp32, whatever the dtype of the weights."""

    def optim_rules(self) -> dict[str, OptimRule]:
        return {}  # its rows are vectors of single experts

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


class Embedding(nn.Embedding):
    """Embedding table, from token ids to rows."""

    def __init__(self, vocab_size: int, hidden_size: int, init_std: float) -> None:
        super().__init__(vocab_size, hidden_size)
        self.init_std = init_std

    def initial_values(self) -> dict[str, InitialValue]:
        return {"weight": Normal(self.init_std)}


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.epsilon = epsilon

    def initial_values(self) -> dict[str, InitialValue]:
        return {"weight": Constant(1.0)}

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class LayerNorm(nn.Module):
    """Layer norm with gain and bias, biased variance."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.epsilon = epsilon

    def initial_values(self) -> dict[str, InitialValue]:
        return {"weight": Constant(1.0), "bias": Constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.epsilon)


def make_norm(kind: Literal["rmsnorm", "layernorm"], hidden_size: int, epsilon: float) -> nn.Module:
    """Make a norm by its name in the configuration."""
    return {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[kind](hidden_size, epsilon)


class SwiGLU(nn.Module):
    """The dense feed-forward layer, w_down(silu(x w_gate) * (x w_up)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, init_std: float, output_std: float) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, init_std, beside=2)
        self.down = Linear(intermediate_size, hidden_size, output_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))
