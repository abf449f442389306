"""Experts of one rank: SwiGLUs with stacked weights.

Legend: N rows, D hidden_size, F intermediate_size, e experts of this rank.
"""

import torch
from torch import Tensor, nn

from moe_train.model.moe.steps import Assignments
from moe_train.model.parameters import ExpertParameter, InitialValue, Normal, OptimRule
from moe_train.ops.routed_mlp import routed_swiglu


class GroupedExperts(nn.Module):
    """Experts first_expert .. first_expert + num_local - 1 of num_experts."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_local: int,
        first_expert: int,
        init_std: float,
        output_std: float,
    ) -> None:
        super().__init__()
        gate_up_eDG = torch.empty(num_local, hidden_size, 2 * intermediate_size)
        down_eFD = torch.empty(num_local, intermediate_size, hidden_size)
        self.gate_up = ExpertParameter.create(gate_up_eDG, num_experts, first_expert)
        self.down = ExpertParameter.create(down_eFD, num_experts, first_expert)
        self.init_std, self.output_std = init_std, output_std

    def initial_values(self) -> dict[str, InitialValue]:
        return {"gate_up": Normal(self.init_std), "down": Normal(self.output_std)}

    def optim_rules(self) -> dict[str, OptimRule]:
        return {"gate_up": OptimRule(matrices=2), "down": OptimRule(matrices=1)}

    def forward(self, rows_ND: Tensor, assignments: Assignments) -> Tensor:
        """Compute the gate-weighted sum of each row's experts, of those that are on this rank. [N, D]."""
        return routed_swiglu(
            rows_ND, assignments.gates_R, assignments.row_map, assignments.counts_e, self.gate_up, self.down
        )
