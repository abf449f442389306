"""The experts of one rank: SwiGLUs with stacked weights.

Legend: R rows, D hidden_size, F intermediate_size, e experts of this rank.
"""

import torch
from torch import Tensor, nn

from moe_train.model.parameters import ExpertParameter, InitialValue, Normal
from moe_train.ops.grouped_mlp import grouped_swiglu


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

    def forward(self, rows_RD: Tensor, counts_e: Tensor) -> Tensor:
        """Each expert's output for its rows, in their order. [R, D]."""
        return grouped_swiglu(rows_RD, self.gate_up, self.down, counts_e)
