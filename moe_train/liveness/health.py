"""Health of one rank: everything with which it notices, and reports, that it or another rank cannot continue."""

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
    """Health monitors of one rank.

    Attributes:
        flight_recorder: Recorder of where this rank is.
        reporter: Writer of this rank's report.
        peers: Monitor of all ranks; knows which rank is lost.
        watchdog: Thread that ends a hanging step.
    """

    flight_recorder: FlightRecorder
    reporter: Reporter
    peers: PeerMonitor
    watchdog: Watchdog

    def explain(self, error: BaseException) -> tuple[str, int]:
        """Explain an error that ends this rank, and tell the other ranks.

        It does not return if another thread is ending the process.

        Args:
            error: Error that this rank met.

        Returns:
            Cause of the error, for a message, and the exit code.
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
        """Stop the monitors after the last collective operation, when this rank ends as planned."""
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
    """Start to monitor this rank and the others.

    Args:
        address: Address of rank 0's host, as the other ranks reach it.
        rank: Rank of this process.
        world_size: Number of ranks.
        step_timeout_seconds: Time after which a step counts as hanging.
        peer_timeout_seconds: Time without a heartbeat after which a rank counts as lost.
        streams: Files to which reports are written.

    Collective: All ranks.
    """
    flight_recorder = FlightRecorder()
    reporter = Reporter(rank, flight_recorder, streams)
    peers = join_peers(address, rank, world_size, peer_timeout_seconds, reporter)
    watchdog = Watchdog(step_timeout_seconds, reporter, peers.suspect)
    watchdog.start()
    return Health(flight_recorder, reporter, peers, watchdog)
