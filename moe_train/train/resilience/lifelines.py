"""What a rank needs to notice, and to say, that it or another rank cannot go on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from moe_train.config.errors import EXIT_DIVERGED, EXIT_LOST
from moe_train.parallel.collectives import is_communication_error
from moe_train.parallel.position import Position
from moe_train.train.resilience.peers import PeerMonitor, join_peers
from moe_train.train.resilience.recovery import TrainingDiverged
from moe_train.train.resilience.report import Reporter
from moe_train.train.resilience.watchdog import Watchdog

_EXIT_FAULT = 1


@dataclass(frozen=True)
class Lifelines:
    """Of one rank.

    Attributes:
        position: Where it is.
        reporter: Writes that.
        peers: Know which rank is lost.
        watchdog: Ends a step that hangs.
    """

    position: Position
    reporter: Reporter
    peers: PeerMonitor
    watchdog: Watchdog

    def explain(self, error: BaseException) -> tuple[str, int]:
        """What an error that ends this rank comes from, in words, and the exit code; the other ranks are told.

        Does not return where another thread is ending the process.
        """
        text = f"{type(error).__name__}: {error}"
        if is_communication_error(error):
            found = self.peers.culprit()
            where = self.position.describe()
            self.peers.fail(f"it lost its connection at {where}")
            return (f"{found or text}; this rank was at {where}", EXIT_LOST)
        self.peers.fail(text)
        return text, EXIT_DIVERGED if isinstance(error, TrainingDiverged) else _EXIT_FAULT

    def leave(self) -> None:
        """The end in order, after the last collective operation."""
        self.watchdog.stop()
        self.peers.leave()


def connect(
    address: str,
    rank: int,
    world_size: int,
    *,
    step_timeout_seconds: float,
    peer_timeout_seconds: float,
    streams: Sequence[TextIO],
) -> Lifelines:
    """Begin to watch this rank and the others.

    Args:
        address: Of rank 0's host, as the other ranks reach it.
        rank: This rank.
        world_size: Ranks.
        step_timeout_seconds: After which a step counts as hanging.
        peer_timeout_seconds: Without a sign of life, after which a rank counts as lost.
        streams: Where reports are written.

    Collective: All ranks.
    """
    position = Position()
    reporter = Reporter(rank, position, streams)
    peers = join_peers(address, rank, world_size, peer_timeout_seconds, reporter)
    watchdog = Watchdog(step_timeout_seconds, reporter, peers.suspect)
    watchdog.start()
    return Lifelines(position, reporter, peers, watchdog)
