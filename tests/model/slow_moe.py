"""The MoE layer as its definition: token by token, one chosen expert after the other, dense and in one process."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.model.moe.routers.base import expert_keys
from moe_train.ops.keyed_random import normal


@dataclass
class SlowMoE:
    """Weights of all experts. `gate` is [E, D]; `noise` is None for a router without it; `gate_up` is [E, D, 2F]."""

    gate: Tensor
    noise: Tensor | None
    gate_up: Tensor
    down: Tensor
    top_k: int
    renormalize: bool

    def logits(self, x: Tensor, keys: Tensor, layer_key: int) -> Tensor:
        """[T, E]; with noise of softplus(x W_noise) + 1e-2 where there is a noise map."""
        logits = x @ self.gate.T
        if self.noise is None:
            return logits
        sigma = torch.log1p(torch.exp(x @ self.noise.T)) + 1e-2
        return logits + sigma * normal(expert_keys(keys, layer_key, len(self.gate)))

    def choose(self, logits: Tensor) -> list[int]:
        """The K best experts of one token, best first."""
        return sorted(range(len(logits)), key=lambda i: -logits[i].item())[: self.top_k]

    def expert(self, i: int, x: Tensor) -> Tensor:
        """w_down(silu(x w_gate) * (x w_up)) of one token."""
        gate, up = (x @ self.gate_up[i]).split(self.down.shape[1])
        return (gate * torch.sigmoid(gate) * up) @ self.down[i]

    def __call__(self, x: Tensor, keys: Tensor, layer_key: int = 0) -> Tensor:
        logits = self.logits(x, keys, layer_key)
        rows = []
        for t in range(len(x)):
            chosen = self.choose(logits[t])
            scores = torch.exp(logits[t] - logits[t].max())
            total = sum(scores[i] for i in chosen) if self.renormalize else scores.sum()
            rows.append(sum(scores[i] / total * self.expert(i, x[t]) for i in chosen))
        return torch.stack(rows)
