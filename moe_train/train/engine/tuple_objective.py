"""Training objective in a form that DeepSpeed's hooks can look into."""

from torch import Tensor, nn

from moe_train.model.objective import Losses, TrainingObjective
from moe_train.model.step_size import StepSize
from moe_train.model.transformer import Tokens


class TupleObjective(nn.Module):
    """Objective with a flat tuple of tensors as its result: DeepSpeed hooks the tensors that it finds in a tuple.

    Only the loss keeps its graph, because DeepSpeed scales the gradient of every output that has one.
    """

    def __init__(self, objective: TrainingObjective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, tokens: Tokens, targets_BS: Tensor, size: StepSize) -> tuple[Tensor, ...]:
        losses: Losses = self.objective(tokens, targets_BS, size)
        routing = () if losses.sums is None else tuple(tensor.detach() for tensor in losses.sums.tensors)
        return losses.total, losses.cross_entropy.detach(), losses.shown, *routing
