"""Tasks side by side: all run, errors come back, torch keeps its threads, forked processes have a pool of their own."""

import multiprocessing
import threading

import pytest
import torch

from moe_train.ops.threads import _pool, run_side_by_side


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_task_runs_once_in_one_thread_without_gradients():
    met = threading.Barrier(3)
    seen, weight = [], torch.ones(2, requires_grad=True)

    def task(number: int) -> None:
        if number < 3:
            met.wait(30)  # three at once
        seen.append((number, torch.get_num_threads(), (weight * 2).requires_grad))

    for _ in range(2):
        seen.clear()
        run_side_by_side([lambda number=number: task(number) for number in range(7)], 3)
        assert sorted(seen) == [(number, 1, False) for number in range(7)]
        assert torch.get_num_threads() == 3


def test_the_pools_threads_have_one_thread_whatever_the_number_of_all_is():
    _pool.cache_clear()
    met = threading.Barrier(2)

    def asked() -> int:
        met.wait(30)
        return torch.get_num_threads()

    # Nobody has set the number of all to one here, as `run_side_by_side` does meanwhile.
    assert [found.result() for found in [_pool(2).submit(asked) for _ in range(2)]] == [1, 1]


def test_one_thread_runs_in_order_with_all_of_torchs_threads():
    seen = []
    run_side_by_side([lambda number=number: seen.append((number, torch.get_num_threads())) for number in range(3)], 1)
    assert seen == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("bad", range(3))
def test_an_error_comes_back(bad):
    met = threading.Barrier(3)

    def task(number: int) -> None:
        met.wait(30)
        if number == bad:
            raise ZeroDivisionError(str(number))

    with pytest.raises(ZeroDivisionError, match=str(bad)):
        run_side_by_side([lambda number=number: task(number) for number in range(3)], 3)
    assert torch.get_num_threads() == 3


def in_child(queue) -> None:
    seen = []
    run_side_by_side([lambda number=number: seen.append(number) for number in range(4)], 3)
    queue.put(sorted(seen))


def test_after_a_fork():
    run_side_by_side([lambda: None] * 3, 3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == [0, 1, 2, 3]
    child.join(30)
    assert child.exitcode == 0
