"""Measurements of the moe_layer benchmark: times in turn, peak memory, and whether the layers compute the same."""

import time
from collections.abc import Sequence
from dataclasses import astuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.moe_layer.peers import Layer, Problem, check_shapes, counts_of, make_layer, make_problem
from benchmarks.moe_layer.rows import BOUND, OURS, ROUTINGS, Case, Measured, dropped_share
from benchmarks.runner.rounds import run_rounds

WARM_UP_ROUNDS = 1
SAME_WITHIN = 1e-5  # of the norm, in fp32: sums of a hundred products in different orders


def measure(problem: Problem, names: Sequence[str], rounds: int) -> dict[str, Measured]:
    """Measure every layer in one case, the layers in turn in every round."""
    layers = {name: make_layer(name, problem) for name in names}
    seconds = run_rounds(names, rounds, lambda name, _: _seconds(layers[name]), warm_ups=WARM_UP_ROUNDS)
    dropped = {"deepspeed_capacity": dropped_share(counts_of(problem), problem.case.shape.capacity)}
    return {
        name: Measured(tuple(seconds[name]), peak_bytes(layer), dropped.get(name, 0.0))
        for name, layer in layers.items()
    }


def peak_bytes(layer: Layer) -> int:
    """Most bytes of tensors at once in a forward and backward pass, over weights and input, which are there before.

    On CUDA as the allocator counts them, on CPU from the allocator's events in a profile, which knows of one thread: so
    torch has only one meanwhile. What libraries keep for themselves (packed copies in a matrix product) is not in it.
    """
    _clear(layer)
    if layer.x_ND.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _pass(layer)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            _pass(layer)
        torch.set_num_threads(threads)
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    _clear(layer)
    return peak


def differences(names: Sequence[str]) -> dict[str, float]:
    """Largest difference of each layer's output and gradients from moe_train's, as a share of the norm.

    In fp32 on small shapes, with both routings; dense_bound, which computes something else, is left out.
    """
    largest = {name: 0.0 for name in names if name not in (OURS, BOUND)}
    for case in (Case(shape, routing) for shape in check_shapes() for routing in ROUTINGS):
        problem = make_problem(case, torch.float32, torch.device("cpu"))
        ours = _results(make_layer(OURS, problem))
        for name in largest:
            theirs = _results(make_layer(name, problem))
            found = [float((a - b).norm() / b.norm()) for a, b in zip(theirs, ours, strict=True)]
            largest[name] = max(largest[name], *found)
    return largest


def _results(layer: Layer) -> tuple[Tensor, ...]:
    """Output, the input's gradient and the weights' gradients."""
    output = _pass(layer)
    assert layer.gradients is not None and layer.x_ND.grad is not None
    return output.detach(), layer.x_ND.grad, *astuple(layer.gradients())


def _seconds(layer: Layer) -> float:
    """Time of one forward and backward pass, beginning without gradients."""
    _clear(layer)
    is_cuda = layer.x_ND.device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    _pass(layer)
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    _clear(layer)
    return seconds


def _pass(layer: Layer) -> Tensor:
    output = layer.run(layer.x_ND)
    output.backward(layer.grad_ND)
    return output


def _clear(layer: Layer) -> None:
    for tensor in (layer.x_ND, *layer.parameters):
        tensor.grad = None
