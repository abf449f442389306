"""`moe-train doctor` on forked ranks in which something is wrong on purpose; what, is in the first argument, as JSON.

{"hang": rank}     this rank sleeps for ever before the products of numbers are checked
{"wrong": rank}    this rank gets wrong numbers from each all-to-all
{"code": rank}     this rank has other files of moe_train
{"pipe": rank}     nobody reads what this rank prints
{"version": rank}  this rank has another DeepSpeed
{"checkout": rank} this rank has another moe_train, whose facts have other fields
{"clock": rank}    this rank's clock is 100 s ahead
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from moe_train.distributed.bootstrap import local_rank_environments
from moe_train.launch.fork_server import RankResult, wait_for_all
from tests.train.runs import ROOT, fork_server

TIMEOUT = 90


def examine(
    world_size: int,
    *arguments: str,
    faults: Mapping[str, int] | None = None,
    environments: Sequence[Mapping[str, str]] | None = None,
    own: Sequence[Sequence[str]] | None = None,
    as_json: bool = True,
) -> list[RankResult]:
    """The end of each rank.

    Args:
        world_size: Ranks of this machine.
        arguments: Of the doctor, for all ranks.
        faults: See above.
        environments: More variables of each rank.
        own: More arguments of each rank.
        as_json: Whether rank 0 prints JSON; else tables.
    """
    server, given = fork_server(), local_rank_environments(world_size)
    ranks = []
    for rank, environment in enumerate(given):
        more = {} if environments is None else environments[rank]
        command = [json.dumps(dict(faults or {})), "doctor", "--quick", "--sizes=1K,64K", *arguments]
        command += ["--json"] if as_json else []
        command += [] if own is None else own[rank]
        ranks.append(server.start("tests.doctor.faulty:main", command, environment | more, ROOT))
    return wait_for_all(ranks, TIMEOUT)


def report_of(results: Sequence[RankResult]) -> dict[str, Any]:
    """What rank 0 printed last."""
    assert results[0].stdout.strip(), results[0].stderr
    return json.loads(results[0].stdout.strip().splitlines()[-1])


def main(arguments: list[str]) -> int:
    """What a forked rank runs."""
    from moe_train.cli.main import main as command

    for name, rank in json.loads(arguments[0]).items():
        if os.environ["RANK"] == str(rank):
            FAULTS[name]()
    return command(arguments[1:])


def hang() -> None:
    """In the middle of the collective operations."""
    from moe_train.doctor import examine as module

    module.check_collectives = lambda *_: time.sleep(3600)


def give_wrong_numbers() -> None:
    """After each all-to-all the first number is another."""
    right = dist.all_to_all_single

    def wrong(output, *arguments, **options):
        done = right(output, *arguments, **options)
        output.view(-1)[:1] += 1
        return done

    dist.all_to_all_single = wrong


def have_other_code() -> None:
    """Another digest."""
    from moe_train.doctor import facts

    digest = facts.package_digest
    facts.package_digest = lambda folder: digest(folder / "config")


def have_other_version() -> None:
    """Of DeepSpeed."""
    from moe_train.host import versions

    version = versions.version
    versions.version = lambda name: "0.0.1" if name == "deepspeed" else version(name)


def have_other_checkout() -> None:
    """Another digest, one field more and one less."""
    from moe_train.doctor.facts import Facts

    have_other_code()
    given = Facts.as_dict

    def as_dict(self):
        return {name: value for name, value in given(self).items() if name != "cores"} | {"of_another_checkout": 1}

    Facts.as_dict = as_dict


def have_closed_output() -> None:
    """The reading end is closed already."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, sys.stdout.fileno())


def set_clock_ahead() -> None:
    """By 100 s."""
    now = time.time
    time.time = lambda: now() + 100.0


FAULTS: dict[str, Callable[[], None]] = {
    "hang": hang,
    "wrong": give_wrong_numbers,
    "code": have_other_code,
    "pipe": have_closed_output,
    "version": have_other_version,
    "checkout": have_other_checkout,
    "clock": set_clock_ahead,
}
