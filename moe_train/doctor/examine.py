"""The doctor's examination, from unconnected ranks to a report. What may hang comes after what can explain a hang."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.doctor.board import Board, Unanswered, join_ranks, open_stores
from moe_train.doctor.collectives import Timing, check_collectives, merge_timings, time_collectives
from moe_train.doctor.facts import Facts, measure_busy_cores
from moe_train.doctor.finding import Finding
from moe_train.doctor.folder import WAIT_SECONDS, check_folder
from moe_train.doctor.judge_links import LinkJudge, judge_reach, judge_silence
from moe_train.doctor.judge_ranks import (
    can_be_measured,
    host_names,
    judge_clocks,
    judge_facts,
    judge_software,
    place_ranks,
    rank_names,
)
from moe_train.doctor.links import Flow, better_flows, measure_links
from moe_train.doctor.machine import make_machine
from moe_train.doctor.reach import answering, own_address, reach_all
from moe_train.doctor.request import Request
from moe_train.doctor.scopes import create_scopes, host_ranks
from moe_train.doctor.speed import Speed, measure_speed
from moe_train.doctor.watch import Watch
from moe_train.host.peak import peak_flops

_MEET_FACTOR = 3  # ranks start at different times, because they import from a slow disk
_SPARE_SECONDS = 5.0  # grace after an operation's own timeout, before the watch ends a hang
_SAY_SECONDS = 3.0
_SHOWN_SECONDS = 12.0  # time for rank 0 to ask which rank hangs, and to show the report
_LEAVE_SECONDS = 5.0
_MEASUREMENTS = "collective operations, links and devices"
EXIT_PROBLEM = 1


class Examination:
    """One rank's part of the examination. Make one object per process.

    Args:
        request: What to examine.
        show: Called on rank 0 with the report, once: at the end, or when an operation hangs.
        say: Called on rank 0 with the name of each stage, before it starts.
    """

    def __init__(self, request: Request, show: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> None:
        self._request, self._show, self._say = request, show, say
        self._world = request.world
        self._began = time.monotonic()
        self._problems, self._warnings = list[Finding](), list[Finding]()
        self._parts: dict[str, Any] = {"ranks": [], "folder": None, "clocks": [], "collectives": [], "links": []}
        self._parts |= {"machine": None, "not_measured": []}
        self._names = [f"rank {rank}" for rank in range(request.world.world_size)]
        self._place = [0, 0]
        self._ending = threading.Lock()
        self._watch = Watch(lambda what: self._give_up(f"hangs: {what}"))

    def run(self) -> int:
        """Examine the ranks, hosts and links, and return the exit code, the same on all ranks.

        Raises:
            UsageError: On all ranks, if all ranks found the same error of usage.
            ConnectionError: If rank 0 cannot be reached.

        Collective: All ranks.
        """
        meet_seconds = _MEET_FACTOR * self._request.timeout_seconds
        first, second = open_stores(self._world, meet_seconds)
        self._board = Board(first, self._world.rank, self._world.world_size)
        self._spare = Board(second, self._world.rank, self._world.world_size)
        self._watch.start()
        try:
            code = self._examine(first, meet_seconds)
        except UsageError:
            self._board.leave(_LEAVE_SECONDS)
            raise
        except (Unanswered, ConnectionError, RuntimeError) as error:  # gloo and NCCL raise RuntimeErrors
            self._give_up(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", error)
            raise  # not reached: the line above ends the process
        self._watch.rest()
        self._board.leave(_LEAVE_SECONDS)
        return code

    def _examine(self, store: Any, meet_seconds: float) -> int:
        nodes, names, hosts, can_measure, have_folder = self._compare(meet_seconds)
        folder = self._request.folder
        if folder is not None and have_folder:
            self._stage("the shared folder")
            self._watch.expect("the shared folder", self._request.timeout_seconds + WAIT_SECONDS + _SPARE_SECONDS)
            *findings, self._parts["folder"] = check_folder(folder, self._board, self._request.timeout_seconds)
            self._add(*findings)
        if can_measure and len(host_ranks(nodes)) > 1:
            can_measure = self._reach(nodes, hosts)
            if not can_measure:
                self._skip(f"{_MEASUREMENTS}: put the problems right first")
        if can_measure:
            timings = self._measure_network(store, nodes, names, hosts)
            self._measure_machine(timings)
        self._watch.rest()
        return self._conclude()

    def _stage(self, name: str) -> None:
        """Begin a new stage of the examination."""
        self._place = [self._place[0] + 1, 0]
        if self._world.rank == 0:
            self._say(name)
        self._mark(name)

    def _mark(self, text: str) -> None:
        """Note an operation that may hang, before it starts."""
        self._place = [self._place[0], self._place[1] + 1]
        seconds = self._request.timeout_seconds
        self._watch.expect(text, seconds + _SPARE_SECONDS)
        self._board.mark(self._place, text)

    def _meet(self, step: str, value: Any, judge: Callable[[list[Any]], Any]) -> Any:
        self._watch.expect(f"waiting for all ranks ({step})", 2 * self._request.timeout_seconds + _SPARE_SECONDS)
        self._place = [self._place[0] + 1, 0]
        self._board.mark(self._place, f"waiting for all ranks ({step})")
        return self._board.meet(step, value, judge, self._request.timeout_seconds)

    def _add(self, problems: Sequence[Finding], warnings: Sequence[Finding]) -> None:
        self._problems += problems
        self._warnings += warnings

    def _skip(self, text: str) -> None:
        self._parts["not_measured"].append(text)

    def _compare(self, meet_seconds: float) -> tuple[list[int], list[str], list[str], bool, bool]:
        """Compare the facts of all ranks. All get host numbers, rank and host names, can_measure, have_folder."""
        if self._world.rank == 0:
            self._say("the ranks meet")
        self._board.meet("start", None, lambda given: None, meet_seconds)
        busy = measure_busy_cores() if self._world.local_rank == 0 else None  # other ranks sleep until all are done
        own = replace(self._request.facts, busy_cores=busy)

        def judge(given: list[Any]) -> list[Any]:
            return self._judge_facts([values for values, _ in given], all(has for _, has in given))

        value = [own.as_dict(), self._request.folder is not None]
        failure, *verdict = self._board.meet("facts", value, judge, meet_seconds)
        if failure:
            raise UsageError(failure)
        nodes, self._names, hosts, can_measure, have_folder = verdict
        return nodes, self._names, hosts, can_measure, have_folder

    def _judge_facts(self, given: list[dict[str, Any]], have_folder: bool) -> list[Any]:
        """Judge the facts on rank 0: why there is nothing to examine ("" if there is), then what `_compare` returns."""
        failures = [values.get("failure", "") for values in given]
        # A fault of rank 0's options alone, or the same fault on all ranks, is bad usage; otherwise the ranks differ.
        usage = self._request.unwritable or (failures[0] if len(set(failures)) == 1 else "")
        if usage:
            return [usage, [], [], [], False, False]
        own = self._request.facts.digest
        is_alike = all(values.get("digest") == own for values in given)
        # Another version of moe_train may have other fields.
        self._facts = facts = [Facts(**values) for values in given if values.get("digest") == own]
        hosts = host_names(facts)
        self._parts["ranks"] = [fact.summary(host) for fact, host in zip(facts, hosts, strict=True)]
        if not is_alike:
            self._add(judge_software(given), [])
            remedy = "bring the same checkout to all hosts first"
            self._skip(f"the shared folder: {remedy}")
            self._skip(f"{_MEASUREMENTS}: {remedy}")
            return ["", [values.get("node", 0) for values in given], self._names, [], False, False]
        self._names = rank_names(facts)
        self._add(*judge_facts(facts))
        can_measure = can_be_measured(facts) and not any(failures)
        if not have_folder:
            self._skip("the shared folder: give all ranks --config with train.run_dir, or --shared-dir")
        if not can_measure:
            self._skip(f"{_MEASUREMENTS}: put the problems right first")
        return ["", [fact.node for fact in facts], self._names, hosts, can_measure, have_folder]

    def _reach(self, nodes: list[int], hosts: list[str]) -> bool:
        """Return whether every host reaches every other one; rank 0 records clocks and broken links."""
        self._stage("links between hosts by TCP, and clocks")
        leaders = [ranks[0] for ranks in host_ranks(nodes)]
        is_leader = self._world.rank in leaders
        with answering(own_address(self._request.facts.interface, self._world.master_addr)) as port:
            offer = (own_address(self._request.facts.interface, self._world.master_addr), port) if is_leader else None
            addresses = self._meet("addresses", offer, lambda given: [given[rank] for rank in leaders])
            reached = []
            if is_leader:
                # A few at a time, each with half of the timeout: several dead hosts are waited for at the same time.
                own, half = leaders.index(self._world.rank), self._request.timeout_seconds / 2
                self._watch.expect("links between hosts by TCP", len(leaders) * half + _SPARE_SECONDS)
                reached = reach_all(own, [(address, port) for address, port in addresses], half)

            def judge(given: list[Any]) -> bool:
                names = [hosts[rank] for rank in leaders]
                broken = judge_reach([[(r["node"], r["failure"]) for r in given[rank]] for rank in leaders], names)
                clocks = []
                for rank in leaders[1:]:  # what this host found out about the first host's clock
                    for found in given[rank]:
                        if found["node"] == 0 and not found["failure"]:
                            clocks.append((hosts[rank], -found["clock_seconds"], found["clock_error_seconds"]))
                self._add(broken, judge_clocks(clocks))
                keys = ("host", "ahead_seconds", "error_seconds")
                self._parts["clocks"] = [dict(zip(keys, clock, strict=True)) for clock in clocks]
                return not broken

            return self._meet("reached", [vars(found) for found in reached], judge)

    def _measure_network(self, store: Any, nodes: list[int], names: list[str], hosts: list[str]) -> list[Timing]:
        """Measure collective operations and links; rank 0 gets the results of all ranks."""
        world, request = self._world, self._request
        if world.world_size == 1:
            self._skip("collective operations and links: there is one rank")
            return []
        self._stage("a process group of all ranks")
        join_ranks(store, world, request.device, request.timeout_seconds)
        scopes = create_scopes(nodes, request.timeout_seconds)
        wrong: list[str] = []
        for scope in scopes:
            self._stage(f"numbers of collective operations ({scope.name})")
            wrong += [f"{text} ({scope.name})" for text in check_collectives(scope, request.device, self._mark)]
        timings = list[Timing]()
        for scope in scopes:
            self._meet(f"time {scope.name}", None, lambda given: None)  # other groups must be idle during the timing
            self._stage(f"times of collective operations ({scope.name})")
            timings += time_collectives(scope, request.sizes, request.device, request.budget_seconds, self._mark)
        given = {"wrong": wrong, "timings": [vars(timing) for timing in timings]}
        merged = self._meet("collectives", given, lambda found: self._judge_collectives(found, hosts))
        self._stage("links between ranks")
        flows = measure_links(nodes, names, request.device, self._mark)
        given_flows = [vars(flow) for flow in flows]
        if self._meet("links", given_flows, lambda found: self._judge_links(found, nodes, hosts, is_last=False)):
            self._stage("links between ranks, again: some were slow")  # other work on the hosts may be the cause
            flows = better_flows(flows, measure_links(nodes, names, request.device, self._mark))
            given_flows = [vars(flow) for flow in flows]
            self._meet("links again", given_flows, lambda found: self._judge_links(found, nodes, hosts, is_last=True))
        return [Timing(**timing) for timing in merged]

    def _judge_collectives(self, given: list[dict[str, Any]], hosts: list[str]) -> list[dict[str, Any]]:
        merged = merge_timings([[Timing(**timing) for timing in each["timings"]] for each in given])
        self._parts["collectives"] = [timing.as_dict() for timing in merged]
        texts: dict[str, list[int]] = {}
        for rank, each in enumerate(given):
            sizes = [
                f"{t['operation']} of {t['bytes']} bytes ({t['scope']})" for t in each["timings"] if not t["correct"]
            ]
            for text in (*each["wrong"], *sizes):
                texts.setdefault(text, []).append(rank)
        remedy = "do not train: look at memory, drivers, the network's firmware, and versions of NCCL or gloo"
        self._add(
            [
                Finding("collective", place_ranks(r, hosts), f"{t} gives wrong numbers", remedy)
                for t, r in texts.items()
            ],
            [],
        )
        return [vars(timing) for timing in merged]

    def _judge_links(
        self, given: list[list[dict[str, Any]]], nodes: list[int], hosts: list[str], *, is_last: bool
    ) -> bool:
        """Return whether the links must be measured a second time before one is reported as slow."""
        flows = [Flow(**values) for each in given for values in each]
        on_cpu = self._request.device.type == "cpu"
        interface_mbit = [fact.interface_mbit for fact in self._facts]
        judge = LinkJudge(nodes, hosts, on_cpu, self._request.expected, interface_mbit)
        problems, warnings = judge.judge(flows)
        if (problems or warnings) and not is_last:
            return True
        self._add(problems, warnings)
        self._parts["links"] = judge.list_links(flows)
        return False

    def _measure_machine(self, timings: list[Timing]) -> None:
        request = self._request
        self._stage("the devices, all at work")
        self._meet("speed", None, lambda given: None)
        self._watch.expect("products and memory of the device", 60 + 4 * request.budget_seconds)
        speed = measure_speed(request.device, request.precisions, request.budget_seconds)
        on_cuda = request.device.type == "cuda"
        peaks: dict[str, float] = {
            p: peak_flops(request.device, p) for p in request.precisions if on_cuda and p != "fp32"
        }

        def judge(given: list[dict[str, Any]]) -> None:
            machine = make_machine(self._facts, timings, [Speed(**values) for values in given], peaks)
            self._parts["machine"] = machine.model_dump(mode="json")
            if machine.intra_node is None:
                self._skip("the network within a host: each has one rank")

        self._meet("speeds", speed.as_dict(), judge)

    def _report(self) -> dict[str, Any]:
        world = self._world
        return {
            "passed": not self._problems,
            "problems": [found.as_dict() for found in self._problems],
            "warnings": [found.as_dict() for found in self._warnings],
            "world": {"world_size": world.world_size, "num_nodes": world.num_nodes, "launcher": world.launcher},
            "seconds": time.monotonic() - self._began,
            **self._parts,
        }

    def _conclude(self) -> int:
        """Show the report on rank 0, and return the exit code on all ranks."""

        def judge(given: list[None]) -> int:
            report = self._report()
            self._show(report)
            return 0 if report["passed"] else EXIT_PROBLEM

        return self._board.meet("end", None, judge, self._request.timeout_seconds)

    def _give_up(self, message: str, error: BaseException | None = None) -> None:
        """End the process after a hang or an error. Rank 0 first names the ranks to blame, and shows what is known."""
        if not self._ending.acquire(blocking=False):
            time.sleep(3600)  # another thread ends the process
        self._watch.rest()
        if self._world.rank == 0:
            self._blame(message, error)
        else:
            is_told = threading.Event()

            def tell() -> None:  # in a thread: the connection to rank 0 may be what is broken, and block
                self._spare.report_failure(message)
                self._spare.wait_until_over(_SHOWN_SECONDS)
                is_told.set()

            thread = threading.Thread(target=tell, daemon=True)
            thread.start()
            if not is_told.wait(_SHOWN_SECONDS + _SAY_SECONDS):
                print(f"moe-train doctor: {self._names[self._world.rank]}: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_PROBLEM)

    def _blame(self, message: str, error: BaseException | None) -> None:
        unanswered: Sequence[int] = error.ranks if isinstance(error, Unanswered) else ()
        self._spare.report_failure(message)
        failures = self._spare.failures(_SPARE_SECONDS)
        self._add([judge_silence(self._spare.marks(), failures, self._names, unanswered)], [])
        self._skip("what comes after it")
        self._show(self._report())
        self._spare.say_over()
        time.sleep(0.5)  # for the other ranks to read it: the store ends with this process
