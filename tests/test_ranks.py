"""The pool of ranks itself: order of results, exceptions, ended processes, hangs, and the state a run starts from."""

import os
import pickle
import signal
import time

import pytest
import torch
import torch.distributed

from tests.ranks import RankPool, RankTraceback


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def sum_of_ranks(rank: int, world_size: int, factor: float) -> tuple[int, int, torch.Tensor]:
    total = torch.tensor([factor * (rank + 1)], dtype=torch.bfloat16)
    torch.distributed.all_reduce(total)
    return rank, os.getpid(), total


def fail_on_one(rank: int, world_size: int, failing: int) -> None:
    if rank == failing:
        raise ZeroDivisionError(f"made by {failing}")
    torch.distributed.barrier()  # waits for the rank that failed


def fail_unpicklable(rank: int, world_size: int) -> None:
    raise Unpicklable("two", "arguments")


def leave(rank: int, world_size: int) -> None:
    raise SystemExit(2)


def die_on_one(rank: int, world_size: int, dying: int) -> None:
    if rank == dying:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def hang_on_one(rank: int, world_size: int, hanging: int) -> None:
    if rank == hanging:
        time.sleep(600)


def spoil_state(rank: int, world_size: int) -> None:
    os.environ["MOE_TRAIN_SPOILED"] = "1"
    torch.set_num_threads(2)
    torch.manual_seed(rank + 7)


def state(rank: int, world_size: int) -> tuple[bool, int, float, str]:
    spoiled = "MOE_TRAIN_SPOILED" in os.environ
    return spoiled, torch.get_num_threads(), float(torch.rand(())), os.environ["OMP_NUM_THREADS"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_rank_order_from_the_same_processes(pool4: RankPool) -> None:
    results = pool4.run(sum_of_ranks, 2.0)
    assert [rank for rank, _, _ in results] == [0, 1, 2, 3]
    assert all(torch.equal(total, torch.tensor([20.0], dtype=torch.bfloat16)) for _, _, total in results)
    pids = [pid for _, pid, _ in results]
    assert len({*pids, os.getpid()}) == 5
    assert [pid for _, pid, _ in pool4.run(sum_of_ranks, 1.0)] == pids


def test_exception_brings_rank_and_traceback_and_the_pool_recovers(pool2: RankPool) -> None:
    pids = [pid for _, pid, _ in pool2.run(sum_of_ranks, 1.0)]
    with pytest.raises(ZeroDivisionError, match="made by 1") as caught:
        pool2.run(fail_on_one, 1)
    assert "raised on rank 1 of 2" in caught.value.__notes__
    assert any("ranks [0] had not answered" in note for note in caught.value.__notes__)
    assert isinstance(caught.value.__cause__, RankTraceback)
    assert "in fail_on_one" in str(caught.value.__cause__)
    results = pool2.run(sum_of_ranks, 1.0)
    assert [float(total) for _, _, total in results] == [3.0, 3.0]
    assert not any(alive(pid) for pid in pids)


def test_unpicklable_exception_keeps_its_name_and_exit_is_reported(pool2: RankPool) -> None:
    with pytest.raises(RuntimeError, match="Unpicklable: two arguments"):
        pool2.run(fail_unpicklable)
    with pytest.raises(SystemExit, match="2"):
        pool2.run(leave)


def test_ended_process_is_named(pool2: RankPool) -> None:
    with pytest.raises(RuntimeError, match="process of rank 0 ended with exit code -9"):
        pool2.run(die_on_one, 0)


def test_hang_names_the_ranks_and_where_they_stand_and_the_pool_recovers(pool4: RankPool) -> None:
    pids = [pid for _, pid, _ in pool4.run(sum_of_ranks, 1.0)]
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer of ranks \[2\] of 4 within 1 s") as caught:
        pool4.run(hang_on_one, 2, timeout=1)
    assert time.monotonic() - start < 10  # seconds; far below the 600 of the hang, room for a busy machine
    assert "in hang_on_one" in str(caught.value)
    assert not any(alive(pid) for pid in pids)
    assert [float(total) for _, _, total in pool4.run(sum_of_ranks, 1.0)] == [10.0] * 4


def test_a_run_leaves_nothing_to_the_next(pool2: RankPool) -> None:
    pool2.run(spoil_state)
    results = pool2.run(state)
    assert [(spoiled, threads, omp) for spoiled, threads, _, omp in results] == [(False, 1, "1")] * 2
    assert results[0][2] == results[1][2]  # the same seed on all ranks


def test_closures_are_refused_and_the_workers_live_on(pool2: RankPool) -> None:
    pids = [pid for _, pid, _ in pool2.run(sum_of_ranks, 1.0)]
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match="pickle"):
        pool2.run(lambda rank, world_size: rank)
    assert [pid for _, pid, _ in pool2.run(sum_of_ranks, 1.0)] == pids
