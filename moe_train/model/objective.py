"""The training objective: cross-entropy and balance terms of one part of an optimizer step.

Every loss is weighed so that the mean over all parts, which the engine takes, is the loss of the whole step: the same
for every split of the step over ranks and micro-batches.
Legend: B batch, S sequence, L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from moe_train.distributed.collectives import Group, all_reduce_sum
from moe_train.model.moe.balance.base import BalanceContext, BalanceTerm, BiasRule, Scheduled, StepBalanceTerm
from moe_train.model.moe.routers.last_step import LastStep, remember
from moe_train.model.moe.steps import RoutingSums
from moe_train.model.step_size import StepSize
from moe_train.model.transformer import LossOutput, Tokens, Transformer

_REDUCED = ("importance", "load", "probability", "counts")  # sums that terms and rules of whole steps need


@dataclass(frozen=True)
class Losses:
    """Losses of one part of a step, fp32 scalars; their means over all parts are those of the step.

    Attributes:
        total: What is differentiated: cross-entropy and balance terms.
        cross_entropy: Cross-entropy, nats per target.
        shown: total without the terms whose value is that of the whole step (`after_step`), detached.
        sums: [L, ...] routing sums of this rank's micro-batch, or None without MoE layers.
    """

    total: Tensor
    cross_entropy: Tensor
    shown: Tensor
    sums: RoutingSums | None


class TrainingObjective(nn.Module):
    """The model with its losses: what the engine drives."""

    def __init__(
        self,
        model: Transformer,
        balance_terms: Sequence[Scheduled[BalanceTerm]],
        balance_group: Group | None,
        bias_rule: Scheduled[BiasRule] | None = None,
        warmup_steps: int = 0,
    ) -> None:
        """Join a model and its losses.

        Args:
            model: The model.
            balance_terms: Losses on the routing sums.
            balance_group: All ranks; None: this process is alone.
            bias_rule: What moves the routers' selection biases after a step; None: nothing does.
            warmup_steps: Number of the optimizer's warm-up steps, over which mixers may warm up too.
        """
        super().__init__()
        self.model = model
        self.balance_terms = tuple(balance_terms)
        self.balance_group = balance_group
        self.bias_rule = bias_rule
        self.warmup_steps = warmup_steps

    def forward(self, tokens: Tokens, targets_BS: Tensor, size: StepSize) -> Losses:
        """Compute the losses of one part of a step.

        Args:
            tokens: The micro-batch.
            targets_BS: int64 next tokens; IGNORED_TARGET is left out.
            size: Sizes of the whole step.

        Collective: All ranks.
        """
        self.model.warm_up(min(1.0, tokens.step / self.warmup_steps) if self.warmup_steps else 1.0)
        output: LossOutput = self.model(tokens, targets_BS=targets_BS)
        cross_entropy = output.total * (size.num_parts / max(1, size.num_targets))
        total, shown = cross_entropy, cross_entropy.detach()
        if output.sums is not None and self.balance_terms:
            last = LastStep.of(self.model.routers, output.sums.counts.shape[-1], output.sums.counts.device)
            context = BalanceContext(size, last, self.balance_group)
            for term in self.balance_terms:
                loss = term.factor(tokens.step) * term.rule.loss(output.sums, context)
                total = total + loss
                if not term.is_of_step:
                    shown = shown + loss.detach()
        return Losses(total, cross_entropy, shown, output.sums)

    @torch.no_grad()
    def after_step(self, sums: RoutingSums, step: int, size: StepSize, skipped: bool) -> Tensor:
        """Add up the step's sums over all ranks; remember them, and move the routers' selection biases.

        Args:
            sums: [L, ...] sums over this rank's micro-batches of the step.
            step: Optimizer step, from 0.
            size: Sizes of the step.
            skipped: Whether the update was left out: then nothing is remembered, and no bias moves.

        Returns:
            Value of the terms over the whole step, fp32 scalar, the same on every rank.

        Collective: All ranks, where a term or rule is over whole steps.
        """
        value = torch.zeros((), device=sums.importance.device)
        of_step = [term for term in self.balance_terms if term.is_of_step]
        if not of_step and self.bias_rule is None:
            return value
        total = self._over_all_ranks(sums)
        for term in of_step:
            rule = cast(StepBalanceTerm, term.rule)
            value = value + term.factor(step) * rule.value_of_step(total).to(value.dtype)
        if not skipped:
            remember(self.model.routers, total, size.num_tokens)
            self._move_biases(total.counts, step)
        return value

    def _over_all_ranks(self, sums: RoutingSums) -> RoutingSums:
        """Add up over all ranks what terms and rules of whole steps need: one all-reduce, in fp64, exact for counts."""
        parts = [getattr(sums, name) for name in _REDUCED]
        found = all_reduce_sum(torch.stack([part.double() for part in parts]), self.balance_group).unbind(0)
        values = {name: value.to(part.dtype) for name, value, part in zip(_REDUCED, found, parts, strict=True)}
        return replace(sums, **values)

    def _move_biases(self, counts_LE: Tensor, step: int) -> None:
        if self.bias_rule is None:
            return
        biases = [router.selection_bias for router in self.model.routers if router.selection_bias is not None]
        moved_LE = self.bias_rule.rule.after_step(torch.stack(biases), counts_LE, self.bias_rule.factor(step))
        for bias_E, moved_E in zip(biases, moved_LE.unbind(0), strict=True):
            bias_E.copy_(moved_E)
