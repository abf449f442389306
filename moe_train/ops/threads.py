"""Parallel execution of many small computations on a CPU, each in one thread, instead of one by one in all threads.

A matrix product with few rows is hardly faster in two threads than in one: they share its packing and wait for each
other.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def run_side_by_side(tasks: Sequence[Callable[[], None]], num_threads: int) -> None:
    """Run independent tasks in parallel, each in one thread, without gradients.

    Any thread may run any task. So the numbers of a task must not depend on the thread.

    Args:
        tasks: Tasks in the order in which they start; each is called without arguments.
        num_threads: Most tasks at once. 1 runs them one after the other, each with all of torch's threads.

    Raises:
        Exception: The first exception that a task raised; some tasks may not have run then.
    """
    if num_threads == 1 or len(tasks) <= 1:
        with torch.no_grad():
            for task in tasks:
                task()
        return
    waiting, lock = iter(tasks), threading.Lock()
    is_inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():  # each thread has its own modes
            while True:
                with lock:
                    task = next(waiting, None)
                if task is None:
                    return
                task()

    all_threads = torch.get_num_threads()
    others = [_pool(num_threads - 1).submit(work) for _ in range(min(num_threads, len(tasks)) - 1)]
    torch.set_num_threads(1)
    try:
        work()
    finally:
        torch.set_num_threads(all_threads)
        for other in others:
            other.exception()  # waits: they must end before the memory that they write to is freed
    for other in others:
        other.result()


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    """Make a pool of threads in which torch computes with one thread each."""
    all_threads, met = torch.get_num_threads(), threading.Barrier(size + 1)

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread sets its number to the global one, so it must come first
        torch.set_num_threads(1)
        met.wait()

    pool = ThreadPoolExecutor(size, "moe_train experts", begin)
    for _ in range(size):
        pool.submit(lambda: None)
    met.wait()  # setting the number in one thread also sets it for threads that start later; so all must have started
    torch.set_num_threads(all_threads)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of these threads
