"""Which host, link or rank is to blame: pure functions on rates, failures and marks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.doctor.judge_links import LinkJudge, describe_slow, find_slow, judge_reach, judge_silence
from moe_train.doctor.links import Flow, better_flows, plan_rounds, tournament

GOOD = 10e9


def rates(size: int, slow: dict[tuple[int, int], float] | None = None, lines: dict[int, float] | None = None):
    """All links among ends: good ones, but those of slow lines and slow links, which are so many times slower."""
    lines = lines or {}
    found = {(a, b): GOOD / max(lines.get(a, 1), lines.get(b, 1)) for a in range(size) for b in range(size) if a != b}
    return found | {pair: GOOD / factor for pair, factor in (slow or {}).items()}


def told(found) -> list[str]:
    names = {end: f"host{end}" for pair in found for end in pair}
    return [finding.message for finding in describe_slow("link", find_slow(found), names, "remedy")]


@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_equal_links_are_sound(size: int) -> None:
    assert told(rates(size)) == []


@pytest.mark.parametrize("size", [3, 4, 9])
def test_slow_line_is_its_hosts(size: int) -> None:
    assert told(rates(size, lines={2: 9.6})) == ["host2: its line is 9.6x slower than the median (1.04 GB/s)"]


def test_two_slow_lines_of_five() -> None:
    messages = told(rates(5, lines={0: 10, 3: 5}))
    assert [message.partition(":")[0] for message in messages] == ["host0", "host3"]


def test_single_slow_link_is_told_once_for_both_ways() -> None:
    messages = told(rates(4, slow={(1, 3): 8, (3, 1): 5}))
    assert messages == ["host1 <-> host3: this link is 8.0x slower than the median (1.25 GB/s)"]


def test_slow_one_way_only() -> None:
    assert told(rates(4, slow={(1, 3): 8})) == ["host1 -> host3: this link is 8.0x slower than the median (1.25 GB/s)"]
    out = {(2, other): 10.0 for other in (0, 1, 3)}
    assert told(rates(4, slow=out)) == ["host2: it sends 10.0x slower than the median (1 GB/s)"]
    into = {(other, 2): 10.0 for other in (0, 1, 3)}
    assert told(rates(4, slow=into)) == ["host2: it receives 10.0x slower than the median (1 GB/s)"]


def test_two_hosts_are_held_against_the_way_back() -> None:
    assert told(rates(2, slow={(0, 1): 10})) == ["host0 -> host1: this link is 10.0x slower than back (1 GB/s)"]


@given(st.integers(3, 8), st.floats(1.0, 2.5), st.randoms(use_true_random=False))
def test_deviations_below_the_factor_are_never_told(size: int, spread: float, random) -> None:
    found = {pair: rate / random.uniform(1, spread) for pair, rate in rates(size).items()}
    assert find_slow(found) == []


@given(st.integers(3, 8), st.integers(0, 7), st.floats(4.0, 100.0))
def test_a_slow_line_is_always_told(size: int, slow: int, factor: float) -> None:
    assert [m.partition(":")[0] for m in told(rates(size, lines={slow % size: factor}))] == [f"host{slow % size}"]


def judge(rate: float, expected: float | None = None, mbit: int | None = None):
    judged = LinkJudge([0, 1], ["a", "b"], True, expected, [mbit, mbit])
    return judged.judge([Flow(0, 1, 1e-4, rate), Flow(1, 0, 1e-4, rate)])


def test_absolute_rates() -> None:
    assert judge(1e9) == ([], [])
    problems, warnings = judge(5e6)
    assert problems == [] and "5 MB/s are very little" in warnings[0].message
    problems, warnings = judge(1e9, expected=2e9)
    assert warnings == [] and "1 GB/s are less than expected (2 GB/s)" in problems[0].message
    problems, warnings = judge(1e9, mbit=100_000)
    assert problems == [] and "are little for an interface of 12.5 GB/s" in warnings[0].message
    assert judge(1e9, mbit=10_000) == ([], [])


def test_slow_adapter_of_one_rank_is_named() -> None:
    nodes, hosts = [0, 0, 1, 1, 2, 2], ["a", "a", "b", "b", "c", "c"]
    flows = []
    for pairs in plan_rounds(nodes):
        for pair in pairs:
            for a, b in (pair, pair[::-1]):
                is_slow = 3 in pair and nodes[a] != nodes[b]
                flows.append(Flow(a, b, 1e-5, GOOD / (20 if is_slow else 1)))
    problems, _ = LinkJudge(nodes, hosts, False, None, [None] * 6).judge(flows)
    assert [found.where for found in problems] == ["rank 3 (b)"]


def two_hosts(lanes: int, factors: dict[tuple[int, int], float]):
    """Judged links of two hosts, whose lanes are so many times slower than others."""
    pairs = [pair for lane in range(lanes) for pair in ((lane, lane + lanes), (lane + lanes, lane))]
    flows = [Flow(*pair, 1e-5, GOOD / factors.get(pair, 1)) for pair in pairs]
    hosts = ["a"] * lanes + ["b"] * lanes
    return LinkJudge([0] * lanes + [1] * lanes, hosts, False, None, [None] * 2 * lanes).judge(flows)


def test_slow_lane_of_two_hosts_is_named() -> None:
    assert two_hosts(4, {}) == ([], [])
    problems, _ = two_hosts(4, {(1, 5): 20, (5, 1): 10})
    assert [found.message for found in problems] == [
        "rank 1 (a) <-> rank 5 (b): this link is 20.0x slower than the median (500 MB/s)"
    ]
    problems, _ = two_hosts(3, {(3, 0): 5})
    assert [found.where for found in problems] == ["rank 3 (b) -> rank 0 (a)"]
    problems, _ = two_hosts(3, dict.fromkeys([(0, 3), (1, 4), (2, 5)], 10))  # one way between the hosts, and no lane
    assert [found.where for found in problems] == ["a -> b"]
    assert two_hosts(2, {(0, 2): 5}) == ([], [])  # of two lanes none is the median


def test_two_hosts_with_different_numbers_of_ranks() -> None:
    nodes, hosts = [0, 0, 1], ["a", "a", "b"]
    flows = [Flow(*pair, 1e-5, GOOD) for pair in ((0, 2), (2, 0), (0, 1), (1, 0))]
    assert LinkJudge(nodes, hosts, False, None, [None] * 3).judge(flows) == ([], [])


@pytest.mark.parametrize("size", range(1, 12))
def test_tournament_lets_each_meet_each_once(size: int) -> None:
    rounds = tournament(size)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(size) for b in range(a + 1, size)]
    assert all(len({end for pair in pairs for end in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) <= size - 1 + size % 2


def test_rounds_of_hosts_with_different_numbers_of_ranks() -> None:
    rounds = plan_rounds([0, 0, 1])
    assert rounds == [[(0, 2)], [(0, 1)]]


def reached(size: int, broken: set[tuple[int, int]]):
    ends = range(size)
    return [[(b, "no answer in time" if (a, b) in broken else "") for b in ends if a != b] for a in ends]


def test_broken_links() -> None:
    names = ["a", "b", "c", "d"]
    assert judge_reach(reached(4, set()), names) == []
    both = judge_reach(reached(4, {(1, 2), (2, 1)}), names)
    assert [found.where for found in both] == ["b <-> c"]
    one_way = judge_reach(reached(4, {(2, 1)}), names)
    assert [found.where for found in one_way] == ["c -> b"]
    lost = judge_reach(reached(4, {(a, b) for a in range(4) for b in range(4) if 3 in (a, b)}), names)
    assert [found.where for found in lost] == ["d"]
    pair = judge_reach(reached(2, {(0, 1), (1, 0)}), names[:2])
    assert [found.where for found in pair] == ["a <-> b"]


def test_broken_links_of_one_host_keep_their_direction() -> None:
    names = ["a", "b", "c", "d"]
    (found,) = judge_reach(reached(4, {(3, other) for other in range(3)}), names)
    assert found.message == "d: it reaches no other host; no answer in time"
    (found,) = judge_reach(reached(4, {(other, 3) for other in range(3)}), names)
    assert found.message == "d: no other host reaches it; no answer in time"
    both = {pair for other in range(3) for pair in ((3, other), (other, 3))}
    (found,) = judge_reach(reached(4, both), names)
    assert found.message == "d: no other host reaches it, and it reaches none; no answer in time"
    mixed = judge_reach(reached(4, {(3, 0), (1, 3), (3, 2)}), names)
    assert sorted(found.where for found in mixed) == ["b -> d", "d -> a", "d -> c"]


def silence(places: list[int], failed: list[int], unanswered: tuple[int, ...] = ()) -> str:
    marks = {rank: ([place, 1], f"step {place}") for rank, place in enumerate(places)}
    failures = dict.fromkeys(failed, "timed out")
    return judge_silence(marks, failures, [f"r{rank}" for rank in range(len(places))], unanswered).where


def test_rank_to_blame() -> None:
    assert silence([3, 3, 2], [0, 1]) == "r2"  # behind, and silent
    assert silence([3, 2, 3], [0, 1, 2]) == "r1"  # behind
    assert silence([3, 3, 3], [0, 2]) == "r1"  # at the same point, and silent
    assert silence([2, 3, 4, 4], [0, 1]) == "r0, r1"  # both ends of a link; the others wait for them
    assert silence([3, 3, 3], [0, 1, 2]) == "ranks 0-2"  # nobody in particular
    assert silence([3, 3, 3], [0], (1, 2)) == "r1, r2"


def test_of_two_measurements_the_better_counts() -> None:
    first = [Flow(0, 1, 2e-6, 1e9), Flow(0, 2, 1e-6, 5e9)]
    second = [Flow(0, 1, 1e-6, 4e9), Flow(0, 2, 3e-6, 2e9)]
    assert better_flows(first, second) == [Flow(0, 1, 1e-6, 4e9), Flow(0, 2, 1e-6, 5e9)]
