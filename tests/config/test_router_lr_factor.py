"""optim.router_lr_factor: how it resolves, and what it acts on."""

import pytest

from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from tests.resolved import resolve_for


def factor_of(*options: str) -> float:
    base = ("--train.run_dir=unused", "--model.hidden_size=64", "--optim.learning_rate=4e-3")
    return resolve_for(load_config([*base, *options], program="t"), 1).optim.router_lr_factor


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), 0.05 / (4e-3 * 64)),
        (("--model.hidden_size=128",), 0.05 / (4e-3 * 128)),
        (("--optim.learning_rate=1e-4",), 1.0),
        (("--model.moe.balance_scope=micro_step",), 1.0),  # no lag
        (("--model.moe.router=softmax_topk", "--model.moe.switch_aux_coef=0.01"), 1.0),  # no CV^2 terms
        (("--model.moe_every=0",), 1.0),
        (("--optim.router_lr_factor=0.3",), 0.3),
    ],
)
def test_auto_bounds_how_far_an_update_moves_a_logit(options: tuple[str, ...], expected: float) -> None:
    assert factor_of(*options) == pytest.approx(expected)


def test_without_routers_it_is_refused_but_what_was_resolved_is_read_again() -> None:
    with pytest.raises(UsageError, match=r"optim.router_lr_factor \(0.3\) has no effect"):
        factor_of("--model.moe_every=0", "--optim.router_lr_factor=0.3")
    assert factor_of("--model.moe_every=0", "--optim.router_lr_factor=1.0") == 1.0
