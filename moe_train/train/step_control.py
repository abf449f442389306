"""Step control: before a step's update, all ranks decide together whether to skip it, and whether to stop after it."""

import signal
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from moe_train.checkpoint.manifest import StepControlState
from moe_train.distributed.collectives import all_reduce_max, world_group
from moe_train.train.progress import Progress
from moe_train.train.step_result import Gradients

NUM_REMEMBERED = 128  # last steps from whose gradient norms the median is computed
NUM_NEEDED = 32  # steps before a norm can be called too large

_RANKS = 1 << 24  # more than there are ranks: a signal and its rank are packed in one number


@dataclass(frozen=True)
class SkippedStep:
    """A step whose update was skipped.

    Attributes:
        step: Optimizer step, from 0.
        first_sequence: Global index of the step's first sequence.
        num_sequences: Number of sequences of the step.
        loss: Loss of this rank.
        grad_norm: Global gradient norm before clipping.
        reason: Reason, in words.
    """

    step: int
    first_sequence: int
    num_sequences: int
    loss: float
    grad_norm: float
    reason: str


@dataclass(frozen=True)
class StepDecision:
    """Decision about a step, the same on all ranks.

    Attributes:
        skipped: The step, if its update was skipped because of a bad number; else None.
        is_exhausted: Whether so many steps in a row were skipped that the run must not continue like this.
        stop: Signal that a rank got, and the rank, in words; None: continue.
        save_ended: Whether a save in the background has ended on every rank, and its outcome is not known yet.
        save_is_due: Whether rank 0 finds that it is time to save.
    """

    skipped: SkippedStep | None
    is_exhausted: bool
    stop: str | None
    save_ended: bool
    save_is_due: bool


class _Fault(IntEnum):
    """Fault of a step. Of the faults that ranks found, the largest counts."""

    NONE = 0
    NORM_TOO_LARGE = 1
    NORM_NOT_FINITE = 2
    LOSS_NOT_FINITE = 3


@dataclass(frozen=True)
class _Judged:
    """What all ranks found of a step, in one all-reduce.

    Attributes:
        fault: Worst fault.
        rank: Rank that found it; of several, the last.
        signalled: Stop signal and its rank as one number; 0: no signal.
        save_ended: Whether no save is running on any rank.
        save_is_due: Whether a rank finds that it is time to save.
        loss: Loss of this rank.
        norm: Global gradient norm.
    """

    fault: _Fault = _Fault.NONE
    rank: int = 0
    signalled: float = 0.0
    save_ended: bool = False
    save_is_due: bool = False
    loss: float = 0.0
    norm: float = 0.0


class StepControl:
    """Step control of a run. It needs one small all-reduce per step, and one wait for the device."""

    def __init__(
        self,
        *,
        max_norm_ratio: float | None,
        max_skipped: int,
        rank: int,
        received: Callable[[], signal.Signals | None],
        save_is_done: Callable[[], bool],
        save_is_due: Callable[[], bool],
        state: StepControlState | None = None,
    ) -> None:
        """Start with a new state, or with the state of a checkpoint.

        Args:
            max_norm_ratio: Multiple of the median gradient norm above which a step is skipped; None: no bound.
            max_skipped: Number of skipped steps in a row that is too many.
            rank: Rank of this process.
            received: Function that returns the stop signal that this rank got; None: no signal.
            save_is_done: Function that returns whether a save has ended on this rank.
            save_is_due: Function that returns whether it is time to save; if one rank says so, all save.
            state: State from a checkpoint; None: a new state.
        """
        self._max_norm_ratio, self._max_skipped, self._rank = max_norm_ratio, max_skipped, rank
        self._received, self._save_is_done, self._save_is_due = received, save_is_done, save_is_due
        self._judged = _Judged()
        self._num_skipped = 0
        self.restore(state or StepControlState())

    def restore(self, state: StepControlState) -> None:
        """Continue with the state of a checkpoint."""
        self._norms: deque[float] = deque(state.grad_norms, maxlen=NUM_REMEMBERED)
        self._num_skipped = max(self._num_skipped, state.skipped_steps)  # in the whole run, also before recoveries
        self._streak: list[SkippedStep] = []

    @property
    def state(self) -> StepControlState:
        """State for a checkpoint."""
        return StepControlState(tuple(self._norms), self._num_skipped)

    @property
    def streak(self) -> tuple[SkippedStep, ...]:
        """Skipped steps since the last step that was not skipped."""
        return tuple(self._streak)

    @property
    def norm_bound(self) -> float | None:
        """Gradient norm above which a step is skipped now; None: there is no bound (yet)."""
        if self._max_norm_ratio is None or len(self._norms) < NUM_NEEDED:
            return None
        return self._max_norm_ratio * statistics.median(self._norms)

    def should_skip(self, gradients: Gradients) -> bool:
        """Decide together with all ranks whether to skip the update, and keep the decision for `conclude`.

        Collective: All ranks.
        """
        received = self._received()
        stop = 0 if received is None else int(received) * _RANKS + self._rank + 1
        known = [float(stop), float(not self._save_is_done()), float(self._save_is_due())]
        own = torch.cat(
            [
                torch.tensor(known, dtype=torch.float64, device=gradients.loss.device),
                (self._find_fault(gradients).double() * _RANKS + self._rank).reshape(1),
                # Norms are the same on all ranks but for rounding; the largest is what all remember.
                gradients.grad_norm.double().to(gradients.loss.device).reshape(1),
            ]
        )
        # Host synchronisation: whether the update is made is decided here, and once more for this rank's own loss.
        signalled, save_is_running, save_is_due, code, norm = all_reduce_max(own, world_group()).tolist()
        fault, rank = divmod(int(code), _RANKS)
        found = _Judged(
            _Fault(fault), rank, signalled, not save_is_running, save_is_due > 0, float(gradients.loss), norm
        )
        self._judged = found
        if not gradients.overflowed and found.fault == _Fault.NONE:
            self._norms.append(norm)
        return found.fault != _Fault.NONE

    def _find_fault(self, gradients: Gradients) -> Tensor:
        """Compute the code of a step's fault on the device, without a wait."""
        norm, bound = gradients.grad_norm.to(gradients.loss.device), self.norm_bound
        fault = torch.zeros_like(norm)
        if bound is not None:
            fault = torch.where(norm > bound, _Fault.NORM_TOO_LARGE.value, fault)
        fault = torch.where(torch.isfinite(norm) & (norm >= 0), fault, _Fault.NORM_NOT_FINITE.value)
        if gradients.overflowed:
            fault = torch.zeros_like(norm)
        return torch.where(torch.isfinite(gradients.loss), fault, _Fault.LOSS_NOT_FINITE.value)

    def conclude(self, progress: Progress, num_sequences: int) -> StepDecision:
        """Return the decision about the step that begins at `progress`."""
        judged, skipped = self._judged, None
        if judged.fault == _Fault.NONE:
            self._streak.clear()
        else:
            first, reason = progress.consumed_sequences, self._describe(judged)
            skipped = SkippedStep(progress.step, first, num_sequences, judged.loss, judged.norm, reason)
            self._streak.append(skipped)
            self._num_skipped += 1
        stop = None
        if judged.signalled:
            number, stopped_rank = divmod(int(judged.signalled) - 1, _RANKS)
            stop = f"{signal.Signals(number).name} on rank {stopped_rank}"
        is_exhausted = len(self._streak) >= self._max_skipped
        return StepDecision(skipped, is_exhausted, stop, judged.save_ended, judged.save_is_due)

    def _describe(self, judged: _Judged) -> str:
        if judged.fault == _Fault.LOSS_NOT_FINITE:
            return f"the loss of rank {judged.rank} is not finite"
        if judged.fault == _Fault.NORM_NOT_FINITE:
            return "the gradient norm is not finite"
        median = statistics.median(self._norms)
        return f"the gradient norm ({judged.norm:.3g}) is {judged.norm / median:.1f} times the median of the last steps"
