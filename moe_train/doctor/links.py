"""Measurement of links between any two hosts, and any two ranks of one host, one direction after the other.

Pairs meet as in a tournament (the circle method): n members need n - 1 rounds, or n rounds if n is odd. In each round
all pairs work at once, and no member has two partners. Between two hosts, each rank talks to the rank in its own place
on the other host, all at the same time: this fills a host's line, and is what expert parallelism does.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_train.doctor.collectives import Mark
from moe_train.doctor.scopes import align, host_ranks

_SIZES = tuple(2**power for power in range(16, 27, 2))  # message sizes: 64 KiB to 64 MiB
_PINGS = 7
_REPETITIONS = 3
_ALL_ROUNDS_SECONDS = 4.0  # for the largest messages of all rounds together
_LONGEST_SECONDS = 0.03  # for the largest message of one round
_STOP = 0


@dataclass(frozen=True)
class Flow:
    """Measured latency and rate from one rank to another.

    Attributes:
        source, target: Rank that sends, and rank that receives.
        latency_seconds: Half of a round trip.
        bytes_per_second: Rate of the largest message.
    """

    source: int
    target: int
    latency_seconds: float
    bytes_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def tournament(size: int) -> list[list[tuple[int, int]]]:
    """Plan rounds in which each member meets every other member once, and has one partner at a time.

    Args:
        size: Number of members.

    Returns:
        Pairs of each round, the lower member first.
    """
    places = list(range(size)) + ([-1] if size % 2 else [])  # a member pauses in the round in which it meets -1
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def plan_rounds(nodes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Plan pairs of ranks by round: first pairs on different hosts, then pairs on the same host.

    Args:
        nodes: Host number of each rank.

    Returns:
        Pairs of ranks for each round, the lower rank first.
    """
    hosts = host_ranks(nodes)
    rounds = [
        [pair for first, second in pairs for pair in zip(hosts[first], hosts[second])]
        for pairs in tournament(len(hosts))
    ]
    inner = [tournament(len(ranks)) for ranks in hosts]
    for place in range(max(len(schedule) for schedule in inner)):
        pairs = [
            (ranks[first], ranks[second])
            for ranks, schedule in zip(hosts, inner, strict=True)
            if place < len(schedule)
            for first, second in schedule[place]
        ]
        rounds.append(pairs)
    return [[(min(pair), max(pair)) for pair in pairs] for pairs in rounds if pairs]


def measure_links(nodes: Sequence[int], names: Sequence[str], device: torch.device, mark: Mark) -> list[Flow]:
    """Measure the links from this rank to all its partners.

    Args:
        nodes: Host number of each rank.
        names: Name of each rank, for messages.
        device: Device of this rank.
        mark: Called with a description of each round, before it starts.

    Returns:
        One flow from this rank to each partner.

    Collective: All ranks.
    """
    rank, flows = dist.get_rank(), list[Flow]()
    rounds = plan_rounds(nodes)
    seconds = min(_LONGEST_SECONDS, _ALL_ROUNDS_SECONDS / max(1, len(rounds)))
    for number, pairs in enumerate(rounds):
        mine = next((pair for pair in pairs if rank in pair), None)
        mark(f"round {number + 1} of links" + ("" if mine is None else f": {names[mine[0]]} and {names[mine[1]]}"))
        if mine is not None:
            first, second = mine
            if rank == first:
                flows.append(_send_and_time(second, device, seconds))
                _answer(second, device)
            else:
                _answer(first, device)
                flows.append(_send_and_time(first, device, seconds))
        mark(f"the end of round {number + 1} of links")
        align(None)
    return flows


def better_flows(first: Sequence[Flow], second: Sequence[Flow]) -> list[Flow]:
    """Merge two measurements of the same links: the better latency and the better rate of each link.

    Args:
        first: Flows of the first measurement.
        second: Flows of the second, in the same order.
    """
    return [
        Flow(
            a.source,
            a.target,
            min(a.latency_seconds, b.latency_seconds),
            max(a.bytes_per_second, b.bytes_per_second),
        )
        for a, b in zip(first, second, strict=True)
    ]


def _send_and_time(target: int, device: torch.device, seconds: float) -> Flow:
    """Send larger and larger messages until one takes long enough; the receiver answers each one with one word."""
    word = torch.zeros(1, dtype=torch.int64)  # on the host: also between CUDA ranks, words travel by gloo
    pings = [_time_message(target, word.new_tensor([0]), word) for _ in range(_PINGS)]
    round_trip = statistics.median(pings)
    rate = 0.0
    for size in _SIZES:
        payload = torch.zeros(size, dtype=torch.uint8, device=device)
        dist.send(torch.tensor([size]), target)
        taken = _time_message(target, payload, word)
        if taken >= seconds or size == _SIZES[-1]:
            dist.send(torch.tensor([size]), target)
            times = [taken, _time_message(target, payload, word)]
            while len(times) < _REPETITIONS and sum(times) < 10 * seconds:
                dist.send(torch.tensor([size]), target)
                times.append(_time_message(target, payload, word))
            middle = statistics.median(times[1:])  # the first message of a size sets up
            rate = size / max(middle - round_trip, middle / 10)
            break
    dist.send(torch.tensor([_STOP]), target)
    return Flow(dist.get_rank(), target, round_trip / 2, rate)


def _time_message(target: int, message: torch.Tensor, word: torch.Tensor) -> float:
    began = time.perf_counter()
    _send(message, target)
    dist.recv(word, target)
    return time.perf_counter() - began


def _answer(source: int, device: torch.device) -> None:
    word, size = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for _ in range(_PINGS):
        dist.recv(word, source)
        dist.send(word, source)
    payload = torch.empty(0, dtype=torch.uint8, device=device)
    while True:
        dist.recv(size, source)
        num_bytes = int(size.item())
        if num_bytes == _STOP:
            return
        if len(payload) != num_bytes:
            payload = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        _receive(payload, source)
        dist.send(word, source)


def _send(message: torch.Tensor, target: int) -> None:
    if message.is_cuda:  # as a batch: otherwise NCCL creates a communicator for every two ranks
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, message, target)]):
            work.wait()
        torch.cuda.synchronize(message.device)
    else:
        dist.send(message, target)


def _receive(message: torch.Tensor, source: int) -> None:
    if message.is_cuda:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, message, source)]):
            work.wait()
        torch.cuda.synchronize(message.device)  # the message must be here before it is answered
    else:
        dist.recv(message, source)
