"""How far a run is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        consumed_sequences: Place in the data: sequences trained on or passed over.
    """

    step: int = 0
    consumed_sequences: int = 0

    def after(self, num_sequences: int) -> "Progress":
        """One step of some sequences later."""
        return Progress(self.step + 1, self.consumed_sequences + num_sequences)
