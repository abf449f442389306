"""Judgement of links: which host, rank or link is slow or broken, and which rank did not answer."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from moe_train.doctor.finding import Finding, name_ranks
from moe_train.doctor.links import Flow

SLOW_FACTOR = 3.0  # a rate this many times below the median counts as slow
LEAST_LANES = 3  # with two lanes, a median tells nothing
FLOOR_BYTES_PER_SECOND = 1e9 / 8  # between hosts; below it, training across hosts makes no sense
INTERFACE_SHARE = 0.25  # share of its interface's speed that a link should reach

End = TypeVar("End")


@dataclass(frozen=True)
class Slow(Generic[End]):
    """A single slow link, or an end whose links are all slow in one direction.

    Attributes:
        source: End that sends; None: any.
        target: End that receives; None: any.
        factor: How many times slower than the median.
        bytes_per_second: Best rate that was measured.
    """

    source: End | None
    target: End | None
    factor: float
    bytes_per_second: float


def find_slow(rates: Mapping[tuple[End, End], float]) -> list[Slow[End]]:
    """Find slow ends, and slow links between ends that are not slow.

    An end's best link shows how good its line is: a sound host has a good best link, even if most other hosts are slow.
    An end is slow if its best link is SLOW_FACTOR times slower than the median of the other ends' best links. A link is
    slow if it is SLOW_FACTOR times slower than the median of the best links of all ends that are not slow. Sending and
    receiving are judged separately.

    Args:
        rates: Bytes per second from one end to another. With two ends, the two directions are compared with each other.

    Returns:
        Slow ends, then slow links.
    """
    ends = list(dict.fromkeys(end for pair in rates for end in pair))
    if len(ends) < 3:
        best = max(rates.values(), default=0.0)
        return [Slow(*pair, best / rate, rate) for pair, rate in rates.items() if rate * SLOW_FACTOR < best]
    slow = list[Slow[End]]()
    sound = dict[int, float]()
    for way in (0, 1):
        best_of = {end: max((rate for pair, rate in rates.items() if pair[way] == end), default=0.0) for end in ends}
        best_of = {end: best for end, best in best_of.items() if best > 0}
        named = set()
        for end, best in best_of.items():
            median = statistics.median(other for name, other in best_of.items() if name != end)
            if best * SLOW_FACTOR < median:
                named.add(end)
                slow.append(Slow(end if way == 0 else None, end if way == 1 else None, median / best, best))
        sound[way] = statistics.median(best for end, best in best_of.items() if end not in named)
    senders, receivers = {each.source for each in slow}, {each.target for each in slow}
    median = statistics.median(sound.values())
    for (source, target), rate in rates.items():
        if rate * SLOW_FACTOR < median and source not in senders and target not in receivers:
            slow.append(Slow(source, target, median / rate, rate))
    return slow


def find_slow_lanes(rates: Mapping[tuple[int, int], float], nodes: Sequence[int]) -> list[Slow[int]]:
    """Find slow lanes between two hosts, each compared with the median of the lanes in the same direction.

    Each rank has one partner on the other host, so the rates do not show which of the two is slow.

    Args:
        rates: Bytes per second from rank to rank.
        nodes: Host number of each rank.
    """
    slow = list[Slow[int]]()
    for node in dict.fromkeys(nodes[source] for source, _ in rates):
        lanes = {pair: rate for pair, rate in rates.items() if nodes[pair[0]] == node}
        median = statistics.median(lanes.values())
        if len(lanes) >= LEAST_LANES:
            slow += [Slow(*pair, median / rate, rate) for pair, rate in lanes.items() if rate * SLOW_FACTOR < median]
    return slow


def describe_slow(kind: str, slow: Sequence[Slow[Any]], names: Mapping[Any, str], remedy: str) -> list[Finding]:
    """Describe slow ends and links as findings; both directions of one link or end make one finding.

    Args:
        kind: Kind of the findings.
        slow: Slow ends and links that `find_slow` found.
        names: Names of the ends.
        remedy: Remedy of each finding.
    """
    findings, done = list[Finding](), set()
    for each in slow:
        back = next((b for b in slow if (b.source, b.target) == (each.target, each.source)), None)
        if (each.target, each.source) in done:
            continue
        done.add((each.source, each.target))
        worst = max([each, back] if back else [each], key=lambda found: found.factor)
        rate = f"{worst.factor:.1f}x slower than the median ({_rate(worst.bytes_per_second)})"
        ends = [names[end] for end in (each.source, each.target) if end is not None]
        if len(ends) == 1:
            way = "its line is" if back else "it sends" if each.source is not None else "it receives"
            findings.append(Finding(kind, ends[0], f"{ends[0]}: {way} {rate}", remedy))
        else:
            where = f"{ends[0]} <-> {ends[1]}" if back else f"{ends[0]} -> {ends[1]}"
            rate = rate if len(names) > 2 else f"{worst.factor:.1f}x slower than back ({_rate(worst.bytes_per_second)})"
            findings.append(Finding(kind, where, f"{where}: this link is {rate}", remedy))
    return findings


@dataclass(frozen=True)
class LinkJudge:
    """Judge of measured links: finds slow ends, slow links and low rates.

    Attributes:
        nodes: Host number of each rank.
        hosts: Host name of each rank.
        on_cpu: Whether ranks run on CPUs; the scheduler then decides as much as the machine about rates within a host.
        expected: Bytes per second that the user expects between two hosts; None: no expectation.
        interface_mbit: Speed of the network interface of each rank's host, in megabits per second; None: not known.
    """

    nodes: Sequence[int]
    hosts: Sequence[str]
    on_cpu: bool
    expected: float | None
    interface_mbit: Sequence[int | None]

    def between_hosts(self, flows: Sequence[Flow]) -> dict[tuple[int, int], float]:
        """Add up the bytes per second from host to host, over all their ranks."""
        rates: dict[tuple[int, int], float] = {}
        for flow in flows:
            pair = (self.nodes[flow.source], self.nodes[flow.target])
            if pair[0] != pair[1]:
                rates[pair] = rates.get(pair, 0.0) + flow.bytes_per_second
        return rates

    def list_links(self, flows: Sequence[Flow]) -> list[dict[str, Any]]:
        """List the links for the report: first those between hosts, then those between ranks."""
        names = dict(zip(self.nodes, self.hosts, strict=True))
        links: list[dict[str, Any]] = []
        for (source, target), rate in self.between_hosts(flows).items():
            ends = {"scope": "hosts", "source": names[source], "target": names[target]}
            mine = [flow for flow in flows if (self.nodes[flow.source], self.nodes[flow.target]) == (source, target)]
            latency = statistics.median(flow.latency_seconds for flow in mine)
            links.append(ends | {"latency_seconds": latency, "bytes_per_second": rate})
        return links + [{"scope": "ranks", **flow.as_dict()} for flow in flows]

    def judge(self, flows: Sequence[Flow]) -> tuple[list[Finding], list[Finding]]:
        """Judge measured flows.

        Args:
            flows: Flows between all ranks.

        Returns:
            Problems and warnings.
        """
        between = self.between_hosts(flows)
        names = dict(zip(self.nodes, self.hosts, strict=True))
        slow = find_slow(between)
        remedy = "look at its cable, switch port and interface, and at what else uses them (ethtool, iperf3)"
        problems = describe_slow("link", slow, names, remedy)
        warnings = list[Finding]()
        found = warnings if self.on_cpu else problems
        slow_hosts = {end for each in slow for end in (each.source, each.target)}
        ranks = {rank: f"rank {rank} ({host})" for rank, host in enumerate(self.hosts)}
        remedy = "look at this rank's network adapter (NCCL_DEBUG=INFO shows which it takes)"
        if len(names) == 2:
            lanes = {(f.source, f.target): f.bytes_per_second for f in flows if self._crosses(f, set())}
            found += describe_slow("link", find_slow_lanes(lanes, self.nodes), ranks, remedy)
        elif len(self.nodes) > len(names) > 2:
            lanes = {(f.source, f.target): f.bytes_per_second for f in flows if self._crosses(f, slow_hosts)}
            found += describe_slow("link", find_slow(lanes), ranks, remedy)
        inner = {
            (f.source, f.target): f.bytes_per_second for f in flows if self.nodes[f.source] == self.nodes[f.target]
        }
        if len(inner) > 2:
            remedy = "look at the topology of the host (nvidia-smi topo -m) and at what else runs there"
            found += describe_slow("link", find_slow(inner), ranks, remedy)
        more_problems, more_warnings = self._judge_rates(between, names)
        return problems + more_problems, warnings + more_warnings

    def _crosses(self, flow: Flow, without: set[int | None]) -> bool:
        ends = (self.nodes[flow.source], self.nodes[flow.target])
        return ends[0] != ends[1] and not without.intersection(ends)

    def _judge_rates(
        self, between: Mapping[tuple[int, int], float], names: Mapping[int, str]
    ) -> tuple[list[Finding], list[Finding]]:
        problems, warnings = list[Finding](), list[Finding]()
        speeds = dict(zip(self.nodes, self.interface_mbit, strict=True))
        for (source, target), rate in between.items():
            if source > target and (target, source) in between:
                continue  # reported together with the opposite direction, at the lower rate of both
            rate = min(rate, between.get((target, source), rate))
            where = f"{names[source]} <-> {names[target]}"
            remedy = (
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the interface; NCCL_DEBUG=INFO shows NCCL's choice"
            )
            if self.expected is not None and rate < self.expected:
                message = f"{where}: {_rate(rate)} are less than expected ({_rate(self.expected)})"
                problems.append(Finding("link", where, message, remedy))
            elif rate < FLOOR_BYTES_PER_SECOND:
                message = f"{where}: {_rate(rate)} are very little (less than {_rate(FLOOR_BYTES_PER_SECOND)})"
                warnings.append(Finding("link", where, message, remedy))
            else:
                known = [speed for speed in (speeds[source], speeds[target]) if speed is not None]
                nominal = min(known) * 1e6 / 8 if len(known) == 2 else None
                if nominal is not None and rate < INTERFACE_SHARE * nominal:
                    message = f"{where}: {_rate(rate)} are little for an interface of {_rate(nominal)}"
                    warnings.append(Finding("link", where, message, remedy))
        return problems, warnings


def judge_reach(reached: Sequence[Sequence[tuple[int, str]]], names: Sequence[str]) -> list[Finding]:
    """Find the hosts and links that are cut off.

    Args:
        reached: For each host: pairs of another host's number and why it was not reached ("" if it was).
        names: Names of the hosts.

    Returns:
        Problems.
    """
    failed = {(node, other): text for node, found in enumerate(reached) for other, text in found if text}
    remedy = "look at cable, firewall, routes and MTU (ping -M do -s 8972); *_SOCKET_IFNAME chooses the interface"
    num_hosts, findings, told = len(names), list[Finding](), set()
    for node in range(num_hosts):
        inward = [text for (_, other), text in failed.items() if other == node]
        outward = [text for (other, _), text in failed.items() if other == node]
        is_cut = [num_hosts > 2 and len(texts) == num_hosts - 1 for texts in (inward, outward)]
        if any(is_cut):
            words = "no other host reaches it" if is_cut[0] else "it reaches no other host"
            words += ", and it reaches none" if all(is_cut) else ""
            text = (inward if is_cut[0] else outward)[0]
            findings.append(Finding("link", names[node], f"{names[node]}: {words}; {text}", remedy))
            told.add(node)
    for (node, other), text in failed.items():
        if told.intersection((node, other)) or (node > other and (other, node) in failed):
            continue
        where = f"{names[node]} <-> {names[other]}" if (other, node) in failed else f"{names[node]} -> {names[other]}"
        findings.append(Finding("link", where, f"{where}: the link is broken: {text}", remedy))
    return findings


def judge_silence(
    marks: Mapping[int, tuple[list[int], str]],
    failures: Mapping[int, str],
    names: Sequence[str],
    unanswered: Sequence[int] = (),
) -> Finding:
    """Name the ranks to blame for an operation that did not end.

    Ranks behind the others are to blame, and among them those that reported nothing. If all ranks are at the same
    point, those that reported nothing are to blame.

    Args:
        marks: For each rank: the place of its last mark, and a description of it.
        failures: Messages of the ranks that reported a failure.
        names: Names of the ranks, with their hosts.
        unanswered: Ranks that did not answer rank 0 in time.
    """
    ranks = range(len(names))
    places = {rank: marks[rank][0] if rank in marks else [] for rank in ranks}
    foremost = max(places.values(), default=[])
    behind = [rank for rank in ranks if places[rank] < foremost]
    silent = [rank for rank in ranks if rank not in failures]
    blamed = list(unanswered) or [r for r in behind if r in silent] or behind
    blamed = blamed or (silent if len(silent) < len(names) else [])
    texts = dict.fromkeys(marks[rank][1] for rank in blamed if rank in marks)
    where = ", ".join(names[rank] for rank in blamed[:8]) or name_ranks(list(ranks))
    at = f"; last at: {'; '.join(list(texts)[:3])}" if texts else ""
    if not blamed:
        reasons = dict.fromkeys(failures.values())
        at = f"; all of them at: {next(iter(marks.values()))[1]}" if marks else ""
        message = f"an operation of all did not end{at} ({'; '.join(list(reasons)[:2])})"
    else:
        has_said = next((failures[rank] for rank in blamed if rank in failures), "")
        message = f"{'does' if len(blamed) == 1 else 'do'} not answer{at}{f' ({has_said})' if has_said else ''}"
    remedy = "look whether the process lives and at its own output; a link may be cut between the hosts named"
    return Finding("unanswered", where, message, remedy)


def _rate(bytes_per_second: float) -> str:
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_second >= size:
            return f"{bytes_per_second / size:.3g} {unit}"
    return f"{bytes_per_second / 1e3:.3g} kB/s"
