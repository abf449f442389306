"""`moe-train doctor` on hosts made of network namespaces: a slow line, a cut link and a lost host are named."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from benchmarks.runner.slow_link import Node, SlowLinkUnavailable, slow_link
from tests.train.runs import CPU, ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
MBIT, SLOW_MBIT = 800, 40  # 20 times: far from what a busy machine does by itself
PORT = 29417  # free: the nodes have a network of their own
TIMEOUT_SECONDS = 120
COMMANDS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where tc is; not everyone's PATH has the latter two


@contextlib.contextmanager
def hosts(number: int) -> Iterator[list[Node]]:
    """Nodes; skips where they are not possible."""
    with contextlib.ExitStack() as stack:
        try:
            nodes = stack.enter_context(slow_link(number, MBIT))
        except SlowLinkUnavailable as reason:
            pytest.skip(str(reason))
        yield nodes


def slow_down(node: Node) -> None:
    """What a node sends, and what it is sent: the switch's end of its line is in a namespace of its own."""
    tc = shutil.which("tc", path=COMMANDS)
    assert tc is not None  # else there would be no nodes
    switch = node.namespace.rpartition("-")[0] + "-switch"
    for where, interface in ((node.namespace, node.interface), (switch, f"node{node.rank}")):
        rate = ["tbf", "rate", f"{SLOW_MBIT}mbit", "burst", "16kb", "limit", "4mb"]
        command = [tc, "-n", where, "qdisc", "replace", "dev", interface, "root", *rate]
        subprocess.run(command, check=True, capture_output=True)


def run_ip(*arguments: str) -> None:
    """Change a node's network."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def start(nodes: Sequence[Node], *arguments: str) -> list[subprocess.Popen[str]]:
    """The doctor, one rank a host."""
    ranks = []
    for node in nodes:
        place = {"RANK": str(node.rank), "WORLD_SIZE": str(len(nodes)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        place |= {"GROUP_RANK": str(node.rank), "GROUP_WORLD_SIZE": str(len(nodes))}
        place |= {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": str(PORT)}
        command = [*node.prefix, sys.executable, "-m", "moe_train", "doctor", "--quick", "--json", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(subprocess.Popen(command, env=os.environ | CPU | place, cwd=ROOT, text=True, **pipes))
    return ranks


def finish(ranks: Sequence[subprocess.Popen[str]]) -> tuple[list[int], dict[str, Any]]:
    """Exit codes, and rank 0's report."""
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    lines = outputs[0][0].strip().splitlines()
    assert lines, outputs
    return [rank.returncode for rank in ranks], json.loads(lines[-1])


def test_sound_lines_of_three_hosts() -> None:
    with hosts(3) as nodes:
        codes, report = finish(start(nodes))
    assert codes == [0, 0, 0], report["problems"]
    between = [link for link in report["links"] if link["scope"] == "hosts"]
    assert len(between) == 6
    assert all(link["bytes_per_second"] < 1.3 * MBIT * 1e6 / 8 for link in between)  # a burst and headers aside


@pytest.mark.parametrize("slow", [0, 2])
def test_slow_host_of_three_is_named(slow: int) -> None:
    with hosts(3) as nodes:
        slow_down(nodes[slow])
        codes, report = finish(start(nodes))
    assert codes == [1, 1, 1], report
    problems = report["problems"]
    assert [found["kind"] for found in problems] == ["link"], problems
    assert problems[0]["where"].endswith(f"#{slow}")
    assert "its line is" in problems[0]["message"]
    assert report["machine"]["inter_node"]["all_to_all"]["bytes_per_second"] < 2 * SLOW_MBIT * 1e6 / 8


def test_slow_line_of_two_hosts_is_a_warning_and_a_problem_where_more_is_expected() -> None:
    with hosts(2) as nodes:
        slow_down(nodes[1])
        codes, report = finish(start(nodes))
        warned = [found["message"] for found in report["warnings"] if found["kind"] == "link"]
        assert codes == [0, 0], report["problems"]
        assert len(warned) == 1 and "very little" in warned[0]
        codes, report = finish(start(nodes, "--expect-bandwidth=0.08"))
    assert codes == [1, 1]
    assert "less than expected (80 MB/s)" in report["problems"][0]["message"]


def test_cut_link_between_two_of_three_hosts_is_named() -> None:
    with hosts(3) as nodes:
        # What node 1 sends to node 2 goes to nobody, and is not refused either.
        neighbour = [nodes[2].address, "lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", nodes[1].interface]
        run_ip("-n", nodes[1].namespace, "neigh", "replace", *neighbour)
        began = time.monotonic()
        codes, report = finish(start(nodes, "--timeout=6"))
    assert codes == [1, 1, 1], report
    assert time.monotonic() - began < 60
    problem = report["problems"][0]
    assert problem["kind"] == "link" and len(report["problems"]) == 1
    assert "#1 <-> " in problem["where"] and problem["where"].endswith("#2")
    assert "broken" in problem["message"]


def test_network_that_drops_large_packets_is_named() -> None:
    with hosts(2) as nodes:
        for node in nodes:  # larger than the switch passes on
            run_ip("-n", node.namespace, "link", "set", node.interface, "mtu", "9000")
        codes, report = finish(start(nodes, "--timeout=6"))
    assert codes == [1, 1], report
    assert "packets of full size are dropped" in report["problems"][0]["message"]


def test_host_that_is_lost_on_the_way_is_named() -> None:
    with hosts(3) as nodes:
        ranks = start(nodes, "--timeout=6")
        assert ranks[0].stderr is not None
        for line in ranks[0].stderr:
            if "numbers of collective" in line:
                break
        switch = nodes[2].namespace.rpartition("-")[0] + "-switch"
        run_ip("-n", switch, "link", "set", "node2", "down")
        codes, report = finish(ranks)
    assert codes == [1, 1, 1], report
    problem = report["problems"][0]
    assert problem["kind"] == "unanswered"
    assert problem["where"].startswith("rank 2 (")
