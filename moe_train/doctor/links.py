"""How fast each two hosts, and each two ranks of a host, send to each other, both ways, one after the other.

Pairs meet as in a tournament (the circle method): n of them need n - 1 rounds, or n if n is odd, and in each round all
pairs are at work at once, none of them with two others. Between hosts each rank talks to the one in its own place on
the other host, all at the same time: that is how a line of a host is filled, and what expert parallelism does.
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

_SIZES = tuple(2**power for power in range(16, 27, 2))  # of a message: 64 KiB to 64 MiB
_PINGS = 7
_REPETITIONS = 3
_ALL_ROUNDS_SECONDS = 4.0  # for the largest messages of all rounds; of one round at most:
_LONGEST_SECONDS = 0.03
_STOP = 0


@dataclass(frozen=True)
class Flow:
    """From one rank to another.

    Attributes:
        source, target: Ranks.
        latency_seconds: Half of a round trip.
        bytes_per_second: Of the largest message.
    """

    source: int
    target: int
    latency_seconds: float
    bytes_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return asdict(self)


def tournament(size: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each meets each other once, and nobody two at a time.

    Args:
        size: Of the field.

    Returns:
        The pairs of each round, the lower one first.
    """
    places = list(range(size)) + ([-1] if size % 2 else [])  # -1: whoever meets it has a pause
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def plan_rounds(nodes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Pairs of ranks, round by round: first those of different hosts, then those of the same.

    Args:
        nodes: The host of each rank.
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
    """Meet every partner of this rank.

    Args:
        nodes: The host of each rank.
        names: Of each rank, in words.
        device: Of this rank.
        mark: Told what comes.

    Returns:
        What this rank sent.

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
    """Of two measurements of the same links, in the same order, the better latency and rate of each."""
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
    """Send larger and larger messages until one takes long enough; the receiver answers each with a word."""
    word = torch.zeros(1, dtype=torch.int64)  # on the host: of CUDA's ranks it travels by gloo
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
            middle = statistics.median(times[1:])  # the first one of a size sets up
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
    if message.is_cuda:  # in a batch: NCCL would else make a communicator for every two ranks
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, message, target)]):
            work.wait()
        torch.cuda.synchronize(message.device)
    else:
        dist.send(message, target)


def _receive(message: torch.Tensor, source: int) -> None:
    if message.is_cuda:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, message, source)]):
            work.wait()
        torch.cuda.synchronize(message.device)  # it has to have arrived before it is answered
    else:
        dist.recv(message, source)
