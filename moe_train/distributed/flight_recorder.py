"""Flight recorder: the step, the phase and the all-to-all that this process is in, to explain a hang.

The training thread writes, and the watchdog's thread reads, without a lock. One thread writes at a time (in a backward
pass on CUDA it is autograd's thread, for which the training thread waits). Each write is one assignment, atomic in
Python, and values that belong together are one object. For microseconds a reader may see a step beside the previous
step's phase; but readers look at a process that has not moved for seconds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class CollectiveRecord:
    """Record of one all-to-all of this process, or of one exchange between ranks that share a sequence.

    Attributes:
        operation: Name of the operation: all_to_all_rows or all_to_all_counts; all_gather_keys, scatter_gradients,
            ring_keys or ring_gradients.
        layer: Index of the model's layer; None: the operation belongs to no layer.
        direction: Pass of the operation; a recomputed forward pass is "forward".
        send: Rows for each rank of the group; in an exchange of a sequence, elements.
        receive: Rows from each rank of the group, or elements.
    """

    operation: str
    layer: int | None
    direction: Direction
    send: Sequence[int]
    receive: Sequence[int]

    def describe(self) -> str:
        """Describe the operation in one line of text."""
        layer = "" if self.layer is None else f" of layer {self.layer}"
        splits = f"send {list(self.send)}, receive {list(self.receive)}"
        return f"{self.operation}{layer}, {self.direction}: {splits}"


class FlightRecorder:
    """Recorder of what this process does now. `at` notes step and phase; a `CommObserver` notes collectives.

    Attributes:
        step: Current step, as the loop counts; None before the first step.
        phase: Current activity: "start", "data", "forward", "backward", "update", "validate", "save", ...
        collective: The all-to-all that the host waits for, or that failed; None: no all-to-all.
        last_collective: The all-to-all that was started or waited for last. On CUDA the host does not wait until it is
            done, and hangs later.
        num_moves: Number of notes so far. If it stands still, the process is stuck or in a long computation.
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
            phase: Phase that begins now.
            step: Step that begins now; None: the step stays the same.
        """
        if step is not None:
            self.step = step
        self.phase, self.collective = phase, None
        self.num_moves += 1

    def start(self, collective: CollectiveRecord) -> None:
        """Note an all-to-all that is started and runs in the background."""
        self.last_collective = collective
        self.num_moves += 1

    def begin(self, collective: CollectiveRecord) -> None:
        """Note an all-to-all that the host begins to wait for."""
        self.collective = self.last_collective = collective
        self.num_moves += 1

    def end(self) -> None:
        """Note that the host has finished waiting for the all-to-all."""
        self.collective = None
        self.num_moves += 1

    def describe(self) -> str:
        """Describe where the process is, in one line of text."""
        collective, last = self.collective, self.last_collective  # each read once: the writer may change them
        place = f"step {self.step}, phase {self.phase}" if self.step is not None else f"phase {self.phase}"
        if collective is not None:
            return f"{place}, in {collective.describe()}"
        return f"{place}, in no all-to-all; the last was {last.describe()}" if last is not None else place

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        collective, last = self.collective, self.last_collective
        return {
            "step": self.step,
            "phase": self.phase,
            "collective": None if collective is None else _plain(collective),
            "last_collective": None if last is None else _plain(last),
        }


def _plain(collective: CollectiveRecord) -> dict[str, Any]:
    return asdict(collective) | {"send": list(collective.send), "receive": list(collective.receive)}
