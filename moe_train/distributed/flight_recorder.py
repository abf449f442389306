"""Flight recorder: the step, the phase and the all-to-all that this process is in, for whoever looks for a hang.

The training thread writes, the watchdog's thread reads. There is no lock. One thread writes at a time (in a backward
pass on CUDA it is autograd's, for which the training thread waits). Each write is one assignment, which Python makes
whole, and what belongs together is assigned as one object. A reader may see a step beside the phase of the step before,
for microseconds; readers look at a process that has not moved for seconds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class CollectiveRecord:
    """One all-to-all of this process.

    Attributes:
        operation: Its name: all_to_all_rows or all_to_all_counts.
        layer: Index of the model's layer; None where it belongs to none.
        direction: The pass it belongs to; a recomputed forward pass is "forward".
        send: Rows for each rank of the group.
        receive: Rows from each rank of the group.
    """

    operation: str
    layer: int | None
    direction: Direction
    send: Sequence[int]
    receive: Sequence[int]

    def describe(self) -> str:
        """Describe the operation in words."""
        layer = "" if self.layer is None else f" of layer {self.layer}"
        splits = f"send {list(self.send)}, receive {list(self.receive)}"
        return f"{self.operation}{layer}, {self.direction}: {splits}"


class FlightRecorder:
    """What this process does now. `at` notes step and phase; a `CommObserver` notes collectives.

    Attributes:
        step: The step being made, as the loop counts; None before the first.
        phase: What the process does: "start", "data", "forward", "backward", "update", "validate", "save", ...
        collective: The all-to-all that the host waits for, or that failed; None outside of one.
        last_collective: The one started or waited for last. On CUDA the host does not wait until one is done, and hangs
            later.
        num_moves: Grows with every note: a process whose number stands still is stuck, or in a long computation.
    """

    __slots__ = ("collective", "last_collective", "num_moves", "phase", "step")

    def __init__(self) -> None:
        self.step: int | None = None
        self.phase = "start"
        self.collective: CollectiveRecord | None = None
        self.last_collective: CollectiveRecord | None = None
        self.num_moves = 0

    def at(self, phase: str, step: int | None = None) -> None:
        """Note a new phase.

        Args:
            phase: What begins now.
            step: The new step; None: the same as before.
        """
        if step is not None:
            self.step = step
        self.phase, self.collective = phase, None
        self.num_moves += 1

    def start(self, collective: CollectiveRecord) -> None:
        """Note an all-to-all that is started, and goes on by itself."""
        self.last_collective = collective
        self.num_moves += 1

    def begin(self, collective: CollectiveRecord) -> None:
        """Note an all-to-all that the host waits for."""
        self.collective = self.last_collective = collective
        self.num_moves += 1

    def end(self) -> None:
        """Note that the host has left the all-to-all."""
        self.collective = None
        self.num_moves += 1

    def describe(self) -> str:
        """Describe where the process is, in one line of text."""
        collective, last = self.collective, self.last_collective  # read once: the writer goes on
        place = f"step {self.step}, phase {self.phase}" if self.step is not None else f"phase {self.phase}"
        if collective is not None:
            return f"{place}, in {collective.describe()}"
        return f"{place}, in no all-to-all; the last was {last.describe()}" if last is not None else place

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        collective, last = self.collective, self.last_collective
        return {
            "step": self.step,
            "phase": self.phase,
            "collective": None if collective is None else _plain(collective),
            "last_collective": None if last is None else _plain(last),
        }


def _plain(collective: CollectiveRecord) -> dict[str, Any]:
    return asdict(collective) | {"send": list(collective.send), "receive": list(collective.receive)}
