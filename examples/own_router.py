"""Write a router of your own, train with it, and compare it with softmax_topk.

    python examples/own_router.py [FOLDER] [STEPS]

A router is one class with `choose`, and one line in the registry. This one scores experts by cosine similarity in a
small space (Chi et al. 2022, arXiv 2204.09179). docs/python.md says how `moe-train train` finds a router of a package.
Legend: T tokens, P projection_size, E experts, K top_k.
"""

import sys
from pathlib import Path

import torch.nn.functional as F
from pydantic import PositiveInt
from rich import print
from rich.table import Table
from torch import Tensor

import moe_train
from moe_train.config.base import Section
from moe_train.config.registry import REGISTRY
from moe_train.model.cost import RouterCost
from moe_train.model.layers import WideLinear
from moe_train.model.moe.routers.base import Choice, Router, RouterKind, RouterSpec, choose_experts, gates_of

CONFIG = Path(__file__).with_name("tiny.yaml")
TEMPERATURE = 0.1


class CosineConfig(Section):
    """Settings of the router, written under model.moe.cosine."""

    projection_size: PositiveInt = 16
    """Width of the space in which tokens and experts are compared."""


class CosineRouter(Router):
    """Logits are cosines between projected tokens and one vector per expert, divided by a temperature."""

    def __init__(self, spec: RouterSpec) -> None:
        moe, size = spec.model.moe, spec.section.projection_size
        super().__init__(moe.num_experts, moe.top_k, spec.options)
        self.projection = WideLinear(spec.model.hidden_size, size, spec.model.init_std)
        self.experts = WideLinear(size, moe.num_experts, spec.model.init_std)

    def choose(self, x_TD: Tensor, token_keys_T: Tensor) -> Choice:
        x_TP = F.normalize(self.projection(x_TD), dim=1)
        lengths_E = self.experts.weight.float().norm(dim=1).clamp(min=1e-6)
        logits_TE = self.experts(x_TP) / lengths_E / TEMPERATURE
        experts_TK = choose_experts(self.with_bias(logits_TE), token_keys_T, self.top_k)
        return Choice(logits_TE, logits_TE.softmax(1), experts_TK, gates_of(logits_TE, experts_TK, renormalize=True))


# The cost is for `moe-train plan`: products of a row with weights, and elements per token and expert.
KIND = RouterKind(CosineRouter, RouterCost(products=1, kept=5, forward=60, backward=30), section=CosineConfig)
REGISTRY["routers"]["cosine"] = "__main__:KIND"  # module and name of the object, which is imported when it is needed


def main(folder: str = "runs/own_router", steps: str = "60") -> None:
    table = Table("router", "bits per byte", title=f"held-out text after {steps} steps")
    for name, settings in {"softmax_topk": {}, "cosine": {"cosine": {"projection_size": 8}}}.items():
        config = moe_train.load_config(
            CONFIG,
            model={"moe": {"router": name, **settings}},
            train={"run_dir": f"{folder}/{name}", "steps": int(steps)},
        )
        result = moe_train.run_training(config)
        table.add_row(name, f"{result.validation.bits_per_byte:.3f}" if result.validation else "-")
    print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
