"""Progress of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        consumed_sequences: Place in the data: sequences trained on or passed over.
    """

    step: int = 0
    consumed_sequences: int = 0

    def after(self, num_sequences: int) -> "Progress":
        """Return the progress after one more step of some sequences."""
        return Progress(self.step + 1, self.consumed_sequences + num_sequences)
