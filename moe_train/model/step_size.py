"""Sizes of an optimizer step over all ranks and micro-batches: what losses of a part of it are weighed by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepSize:
    """Sizes of one optimizer step.

    A part is one rank's micro-batch. The engine averages the gradients of all parts.

    Attributes:
        num_parts: Ranks times micro-batches.
        num_tokens: Tokens that routers see, hidden copies included; those whose target is ignored count too.
        num_targets: Targets that count.
    """

    num_parts: int
    num_tokens: int
    num_targets: int

    @staticmethod
    def of_one_part(num_tokens: int, num_targets: int | None = None) -> "StepSize":
        """A step of one micro-batch of one rank; num_targets None: every token has one."""
        return StepSize(1, num_tokens, num_tokens if num_targets is None else num_targets)
