"""A dense feed-forward layer with a ReLU. Legend: B batch, S sequence, D hidden_size."""

from torch import Tensor

from moe_train.model.cost import Elementwise, FeedForwardCost, Product
from moe_train.model.feed_forward import FeedForward, FeedForwardKind, FeedForwardSpec
from moe_train.model.layers import Linear
from moe_train.model.mixers.base import MixerContext


class ReLUFeedForward(FeedForward):
    """output(relu(input x)), of width intermediate_size."""

    def __init__(self, spec: FeedForwardSpec) -> None:
        super().__init__()
        model = spec.model
        self.input = Linear(model.hidden_size, model.intermediate_size, model.init_std)
        self.output = Linear(model.intermediate_size, model.hidden_size, spec.output_std)

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, None]:
        del context
        return self.output(self.input(x_BSD).relu()), None


def _cost(spec: FeedForwardSpec) -> FeedForwardCost:
    hidden, inner = spec.model.hidden_size, spec.model.intermediate_size
    return FeedForwardCost(
        products=(Product(hidden, inner), Product(inner, hidden)),
        kept=hidden + inner,
        work=inner,
        elementwise=(Elementwise(inner, forward=8, backward=12, is_narrow=True),),
    )


KIND = FeedForwardKind(build=ReLUFeedForward, cost=_cost)
