"""Where this process is: step, phase, and the all-to-all it is in. Told to those who look for a hang.

Written by the thread that trains, read by the watchdog's. There is no lock: one thread writes at a time (in a backward
pass on CUDA it is autograd's, for which the training thread waits), each write is one assignment, which Python makes
whole, and what belongs together is assigned as one object. A reader may meet a step beside the phase of the step
before, for microseconds; those who read look at a process that has not moved for seconds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Exchange:
    """One all-to-all of this process.

    Attributes:
        operation: Its name: all_to_all_rows or all_to_all_counts.
        layer: Of the model; None where it belongs to none.
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
        """In words."""
        layer = "" if self.layer is None else f" of layer {self.layer}"
        splits = f"send {list(self.send)}, receive {list(self.receive)}"
        return f"{self.operation}{layer}, {self.direction}: {splits}"


class Position:
    """Where this process is. Set step and phase with `at`; exchanges are noted by `moe_train.parallel.probe.Probe`.

    Attributes:
        step: The step being made, as the loop counts; None before the first.
        phase: What the process does: "start", "data", "forward", "backward", "update", "validate", "save", ...
        exchange: The all-to-all that the host waits for, or that failed; None outside of one.
        last_exchange: The one started or waited for last. On CUDA the host does not wait until one is done, and hangs
            later.
        num_moves: Grows with every note: a process whose number stands still is stuck, or in a long computation.
    """

    __slots__ = ("exchange", "last_exchange", "num_moves", "phase", "step")

    def __init__(self) -> None:
        self.step: int | None = None
        self.phase = "start"
        self.exchange: Exchange | None = None
        self.last_exchange: Exchange | None = None
        self.num_moves = 0

    def at(self, phase: str, step: int | None = None) -> None:
        """Note a new phase.

        Args:
            phase: What begins now.
            step: Where it changes; None: the same as before.
        """
        if step is not None:
            self.step = step
        self.phase, self.exchange = phase, None
        self.num_moves += 1

    def start(self, exchange: Exchange) -> None:
        """Note an all-to-all that is started, and goes on by itself."""
        self.last_exchange = exchange
        self.num_moves += 1

    def begin(self, exchange: Exchange) -> None:
        """Note an all-to-all that the host waits for."""
        self.exchange = self.last_exchange = exchange
        self.num_moves += 1

    def end(self) -> None:
        """The host has left the all-to-all."""
        self.exchange = None
        self.num_moves += 1

    def describe(self) -> str:
        """One line of text."""
        exchange, last = self.exchange, self.last_exchange  # read once: the writer goes on
        place = f"step {self.step}, phase {self.phase}" if self.step is not None else f"phase {self.phase}"
        if exchange is not None:
            return f"{place}, in {exchange.describe()}"
        return f"{place}, in no all-to-all; the last was {last.describe()}" if last is not None else place

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        exchange, last = self.exchange, self.last_exchange
        return {
            "step": self.step,
            "phase": self.phase,
            "exchange": None if exchange is None else _plain(exchange),
            "last_exchange": None if last is None else _plain(last),
        }


def _plain(exchange: Exchange) -> dict[str, Any]:
    return asdict(exchange) | {"send": list(exchange.send), "receive": list(exchange.receive)}
