"""Trace of some steps by torch.profiler, for chrome://tracing or Perfetto: `train.profile_steps`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

_WARM_UP_STEPS = 2  # of this process: they allocate memory and load kernels
FIRST_TRACED_STEP = _WARM_UP_STEPS + 1  # of this process


class StepTracer:
    """Tracer of the first steps after the warm-up on this rank. The trace also has what happens between the steps."""

    def __init__(self, path: Path, num_steps: int, is_cuda: bool, say: Callable[[str], object]) -> None:
        """Prepare a trace.

        Args:
            path: JSON file of the trace.
            num_steps: Number of steps to trace; 0: none.
            is_cuda: Whether the kernels of a CUDA device are traced.
            say: Function that gets a message with the place of the trace.
        """
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        self._path, self._num_steps, self._activities, self._say = path, num_steps, activities, say
        self._taken = 0
        self._profile: profile | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run the block as a training step, and trace it if it is due."""
        if self._num_steps and self._taken == _WARM_UP_STEPS:
            self._profile = profile(activities=self._activities)
            self._profile.start()
        yield
        self._taken += 1
        if self._taken == _WARM_UP_STEPS + self._num_steps:
            self.close()

    def close(self) -> None:
        """End the trace under way, if there is one, and write it."""
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        self._say(f"trace of {self._taken - _WARM_UP_STEPS} steps: {self._path.parent}, one file per rank")
