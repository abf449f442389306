"""What differs between ranks, and what a host lacks: pure functions on facts."""

from dataclasses import replace

import pytest
import torch

from moe_train.distributed.world import World
from moe_train.doctor.facts import Facts, collect_facts
from moe_train.doctor.judge_ranks import can_be_measured, host_names, judge_clocks, judge_facts, judge_software
from moe_train.doctor.scopes import group_ranks


def facts(hosts: str = "aabb") -> list[Facts]:
    """Of ranks on hosts by name, all alike, without a fault."""
    world = World(0, 1, 0, 1, 1, 0, "127.0.0.1", 0, "single")
    own = collect_facts(world, torch.device("cpu"), 1, {"train.seed": "1"}, "", {"sizes": ""}, {"OMP_NUM_THREADS": "1"})
    own = replace(own, cores=8, host_cores=8, open_files=65536, shared_memory=2**33)
    names = sorted(set(hosts))
    return [
        replace(own, rank=rank, local_rank=hosts[:rank].count(host), node=names.index(host), hostname=host)
        for rank, host in enumerate(hosts)
    ]


def changed(rank: int, hosts: str = "aabb", **values) -> list[Facts]:
    return [replace(fact, **values) if fact.rank == rank else fact for fact in facts(hosts)]


GPU = {"kind": "cuda", "name": "H100", "memory": 80 * 2**30, "free": 79 * 2**30, "uuid": "GPU-1"}


def test_equal_ranks_are_well() -> None:
    assert judge_facts(facts()) == ([], [])
    assert can_be_measured(facts())


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"versions": {"torch": "2.11"}}, "versions", "torch differs"),
        ({"digest": "other"}, "code", "the code of moe_train differs"),
        (
            {"fields": {"train.seed": "2"}},
            "configuration",
            "train.seed differs: 1 on ranks 0-2 (a, b), 2 on rank 3",
        ),
        ({"fields": {}}, "configuration", "train.seed differs: 1 on ranks 0-2 (a, b), nothing on rank 3 (b)"),
        ({"failure": "no file"}, "configuration", "no file on rank 3 (b)"),
        ({"options": {"sizes": "1K"}}, "configuration", "--sizes differs"),
        (
            {"environment": {"OMP_NUM_THREADS": "1", "NCCL_ALGO": "Ring"}},
            "environment",
            "NCCL_ALGO differs: nothing",
        ),
        ({"device": GPU}, "device", "kind differs: cpu on ranks 0-2 (a, b), cuda on rank 3 (b)"),
    ],
)
def test_rank_that_differs(values: dict, kind: str, message: str) -> None:
    problems, _ = judge_facts(changed(3, **values))
    assert any(found.kind == kind and message in found.message for found in problems), problems
    assert {found.where for found in problems} == {"rank 3 (b)"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"busy_cores": 4.0}, "4.0 of 8 cores are at work for something else"),
        ({"shared_memory": 2**26}, "/dev/shm has 64 MiB"),
        ({"open_files": 256}, "a process may have 256 open files"),
        ({"cores": 1}, "2 ranks have 2 threads for 1 cores"),
        ({"environment": {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "x"}}, "GLOO_SOCKET_IFNAME differs"),
    ],
)
def test_host_that_lacks_something_is_a_warning(values: dict, message: str) -> None:
    problems, warnings = judge_facts(changed(2, **values))
    assert problems == []
    assert any(message in found.message for found in warnings), warnings
    assert all("b" in found.where for found in warnings)


def test_load_is_held_against_the_cores_of_the_host_and_not_of_a_quota() -> None:
    assert judge_facts(changed(2, cores=2, host_cores=64, busy_cores=4.0)) == ([], [])
    _, warnings = judge_facts(changed(2, cores=2, host_cores=64, busy_cores=20.0))
    assert [found.message for found in warnings] == ["20.0 of 64 cores are at work for something else"]


def test_two_ranks_on_one_gpu() -> None:
    ranks = [replace(fact, device=GPU | {"uuid": f"GPU-{min(fact.rank, 2)}"}) for fact in facts()]
    problems, _ = judge_facts(ranks)
    assert [(found.kind, found.where) for found in problems] == [("device", "ranks 2-3 (b)")]
    assert not can_be_measured(ranks)


def test_gpu_that_is_in_use() -> None:
    ranks = [
        replace(f, device=GPU | {"uuid": str(f.rank), "free": (40 if f.rank else 79) * 2**30}) for f in facts("aa")
    ]
    _, warnings = judge_facts(ranks)
    assert [found.where for found in warnings] == ["rank 1 (a)"]


def test_unequal_hosts() -> None:
    _, warnings = judge_facts(facts("aab"))
    assert "not all have as many ranks: 2 on a, 1 on b" in warnings[0].message


def test_software_is_compared_of_ranks_that_have_other_facts() -> None:
    given = [fact.as_dict() for fact in facts("abb")]
    assert judge_software(given) == []
    del given[1]["versions"], given[2]["hostname"]
    given[1] |= {"digest": "other", "a_field_of_another_checkout": 1}
    found = judge_software(given)
    assert {f.kind for f in found} == {"code", "versions"} and {f.where for f in found} == {"rank 1 (b)"}


def test_hosts_of_the_same_name_are_told_apart() -> None:
    assert host_names([replace(fact, hostname="vm") for fact in facts()]) == ["vm#0", "vm#0", "vm#1", "vm#1"]


def test_clocks() -> None:
    assert judge_clocks([("b", 0.9, 0.001), ("c", 30.0, 29.5)]) == []
    (found,) = judge_clocks([("b", -5.0, 0.001)])
    assert "5.00 s behind the first host's" in found.message


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([0], {}),
        ([0, 0], {"within": [(0, 1)]}),
        ([0, 1], {"across": [(0, 1)]}),
        ([0, 0, 1, 1], {"within": [(0, 1), (2, 3)], "across": [(0, 2), (1, 3)], "all": [(0, 1, 2, 3)]}),
        ([0, 0, 1], {"within": [(0, 1)], "across": [(0, 2)], "all": [(0, 1, 2)]}),
    ],
)
def test_groups(nodes: list[int], expected: dict) -> None:
    assert group_ranks(nodes) == expected


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"kernel_failure": "CalledProcessError: gcc"}, "device", ["Triton's kernels", "gcc", "python3-dev"]),
        ({"infiniband_obstacles": ["no libibverbs.so"]}, "host", ["TCP, not InfiniBand", "libibverbs1", "IPC_LOCK"]),
    ],
)
def test_what_makes_gpus_slow_without_a_word(values: dict, kind: str, words: list[str]) -> None:
    problems, (warning,) = judge_facts(changed(2, **values))
    assert problems == [] and warning.kind == kind
    assert all(word in f"{warning.message} {warning.remedy}" for word in words)
