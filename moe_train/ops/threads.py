"""Many small computations on a CPU, each in one thread, in place of one after the other in all threads.

Of a matrix product with few rows two threads make little more than one: they share its packing and wait for each other.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def run_side_by_side(tasks: Sequence[Callable[[], None]], num_threads: int) -> None:
    """Run tasks that do not depend on each other, without gradients, each in one thread.

    Which thread runs a task is a matter of chance, so that no task's numbers may depend on it.

    Args:
        tasks: In the order in which they are begun.
        num_threads: Most at once; 1: in this thread, one after the other, and in all of torch's.

    Raises:
        Exception: The first that a task raised; then some tasks may not have run.
    """
    if num_threads == 1 or len(tasks) <= 1:
        with torch.no_grad():
            for task in tasks:
                task()
        return
    waiting, lock = iter(tasks), threading.Lock()
    is_inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():  # a thread has modes of its own
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
            other.exception()  # they have to end before anything that they write to is let go
    for other in others:
        other.result()


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    """Threads for which torch computes in one thread."""
    all_threads, met = torch.get_num_threads(), threading.Barrier(size + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread takes the number of all threads when it first asks, also after it was set
        torch.set_num_threads(1)
        met.wait()

    pool = ThreadPoolExecutor(size, "moe_train experts", begin)
    for _ in range(size):
        pool.submit(lambda: None)
    met.wait()  # setting the number in a thread sets that of threads to come: not before all have begun
    torch.set_num_threads(all_threads)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
