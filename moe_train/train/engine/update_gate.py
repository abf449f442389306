"""Gate between a step's gradients and its update: it notes the global norm and asks step control.

Every ZeRO stage computes the norm of the gradients, then tells its loss scaler whether they overflowed, and then skips
the update if `overflow` is set (deepspeed 0.19.8). So the gate notes the norm in the first of these functions, and asks
step control in the second.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor

from moe_train.train.engine.fragments import ZeroState
from moe_train.train.step_result import Gradients, SkipRule


class UpdateGate:
    """Gate that asks before each update of a ZeRO optimizer whether to skip it.

    Attributes:
        grad_norm: Global norm of the last step's gradients before clipping, scalar; infinite if it was not formed.
        skipped_gradients: `squares_and_faults` of this rank's part of each gradient of the last step, if it was
            skipped; else empty.
    """

    def __init__(self, zero: Any, state: ZeroState, stage: int) -> None:
        """Put the gate between the gradients and the update.

        Args:
            zero: DeepSpeed's optimizer; some of its functions are replaced by functions that call this object.
            state: State of the optimizer.
            stage: ZeRO stage.
        """
        self.grad_norm = torch.zeros(())
        self.skipped_gradients: dict[str, Tensor] = {}
        self._zero, self._state = zero, state
        self._norms: list[Tensor] = []
        self._should_skip: SkipRule | None = None
        self._loss = torch.zeros(())
        self._update_scale: Callable[[bool], None] = zero._update_scale
        zero._update_scale = self._decide
        if stage == 3:
            norm_groups = zero._get_norm_groups
            zero._get_norm_groups = lambda: self._noted(norm_groups(), combine_grad_norm_groups)
        else:
            global_norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda *args: self._noted(global_norm(*args), lambda norm: norm)

    def expect(self, loss: Tensor, should_skip: SkipRule | None) -> None:
        """Prepare for the next update.

        Args:
            loss: Mean total loss of this rank's micro-batches so far.
            should_skip: Function that decides whether to skip the update; None: never.
        """
        self._loss, self._should_skip = loss, should_skip

    def _noted(self, found: Any, norm_of: Callable[[Any], Any]) -> Any:
        self._norms[:] = [torch.as_tensor(norm_of(found))]
        return found

    def _decide(self, has_overflow: bool) -> None:
        scale = self._zero.loss_scale
        self.grad_norm = self._norms.pop() / scale if self._norms else torch.full((), math.inf)
        self._norms.clear()
        is_bad = False
        if self._should_skip is not None:
            # If the scale cannot go lower, it is not the reason of an overflow.
            overflowed = has_overflow and scale > getattr(self._zero.loss_scaler, "min_scale", scale)
            is_bad = self._should_skip(Gradients(self._loss, self.grad_norm, overflowed))
            self._zero.overflow = is_bad or overflowed
            self.skipped_gradients = self._state.gradient_sums(scale) if is_bad else {}
        if self._zero.overflow:
            self._state.forget_gradients()
        self._update_scale(has_overflow and not is_bad)  # only an overflow of its own lowers the scale
