"""What a rank needs to notice, and to say, that it or another rank cannot go on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from moe_train.config.errors import EXIT_LOST, exit_code_of
from moe_train.distributed.collectives import is_communication_error
from moe_train.distributed.flight_recorder import FlightRecorder
from moe_train.liveness.hang_report import Reporter
from moe_train.liveness.peers import PeerMonitor, join_peers
from moe_train.liveness.watchdog import Watchdog


@dataclass(frozen=True)
class Health:
    """Of one rank.

    Attributes:
        flight_recorder: Where it is.
        reporter: Writes that.
        peers: Know which rank is lost.
        watchdog: Ends a step that hangs.
    """

    flight_recorder: FlightRecorder
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
            where = self.flight_recorder.describe()
            self.peers.fail(f"it lost its connection at {where}")
            return (f"{found or text}; this rank was at {where}", EXIT_LOST)
        self.peers.fail(text)
        return text, exit_code_of(error)

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
) -> Health:
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
    flight_recorder = FlightRecorder()
    reporter = Reporter(rank, flight_recorder, streams)
    peers = join_peers(address, rank, world_size, peer_timeout_seconds, reporter)
    watchdog = Watchdog(step_timeout_seconds, reporter, peers.suspect)
    watchdog.start()
    return Health(flight_recorder, reporter, peers, watchdog)
