"""Parallel forms of the recurrent layers, and the loops over tokens that compute the same.

Legend: every form has 1,024 tokens; a TTT layer has mini-batches of 16 and heads of 32.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.ops import ttt
from moe_train.ops.rwkv7 import DeltaInputs, advance
from moe_train.ops.wkv import Average, wkv

LENGTH, MINI_BATCH, SIZE = 1024, 16, 32


@dataclass(frozen=True)
class Forms:
    """Two ways to compute the same.

    Attributes:
        parallel: Function that computes the parallel form.
        loop: Function that computes it a token at a time.
        aim: Times that the parallel form should be faster.
        tolerance: Largest difference of the outputs in fp32.
    """

    parallel: Callable[[], Tensor]
    loop: Callable[[], Tensor]
    aim: float
    tolerance: float


def seconds(run: Callable[[], Tensor], times: int) -> float:
    """Measure the least processor time of a forward and backward pass, which other work hardly changes."""
    found = []
    for _ in range(times):
        start = time.process_time()
        run().sum().backward()
        found.append(time.process_time() - start)
    return min(found)


def drawn(*shape: int) -> Tensor:
    """Draw a tensor that takes a gradient."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3).requires_grad_()


def ttt_forms(inner: str) -> Forms:
    """Make the dual form of TTT, and the loop over tokens, for an inner model (linear or mlp)."""
    heads, widest = 4, 4 * SIZE
    q, k, v = (drawn(2, heads, LENGTH + i, SIZE)[:, :, :LENGTH] for i in range(3))
    rates = torch.full((2, heads, LENGTH), 0.01)
    rows = (1 / torch.arange(1, MINI_BATCH + 1)).repeat(LENGTH // MINI_BATCH)
    norm = ttt.InnerNorm(torch.ones(heads, 1, SIZE), torch.zeros(heads, 1, SIZE), 1e-6)
    start = {
        "linear": (drawn(1, heads, SIZE + 1, SIZE),),
        "mlp": (drawn(1, heads, SIZE + 1, widest), drawn(1, heads, widest + 1, SIZE)),
    }[inner]
    step = {"linear": ttt.linear_step, "mlp": ttt.mlp_step}[inner]

    def run(size: int, carried: tuple[ttt.Weights, ttt.Weights] | None) -> Tensor:
        parts = (q, k, v - k, rates, rows.view(1, 1, -1))
        batches = ttt.MiniBatches(*(part.unflatten(2, (-1, size)).transpose(1, 2) for part in parts))
        firsts = torch.arange(0, LENGTH, size).unsqueeze(0)
        is_full = (firsts + size) % MINI_BATCH == 0
        found, _ = ttt.scan(step, start, batches, norm, firsts == 0, is_full, rows[-1], carried, carried is None)
        return found.transpose(1, 2).flatten(2, 3)

    empty = tuple(torch.zeros(2, *part.shape[1:]) for part in start)

    def by_token() -> Tensor:
        return run(1, (empty, empty))

    return Forms(lambda: run(MINI_BATCH, None), by_token, aim=5, tolerance=1e-4)


def rwkv4_forms() -> Forms:
    """Make the chunked form of RWKV-4's time mix, and the loop over tokens."""
    k, v, decay, u = drawn(1, LENGTH, 128), drawn(1, LENGTH, 128), drawn(128), drawn(128)
    begins = torch.zeros(1, LENGTH, dtype=torch.bool)

    def chunks() -> Tensor:
        return wkv(k, v, -decay.exp(), u, Average.empty(k[:, 0]), begins)[0]

    def loop() -> Tensor:
        state, outputs, w = Average.empty(k[:, 0].detach()), [], -decay.exp()
        for t in range(LENGTH):
            token = Average(v[:, t], torch.ones_like(v[:, t]), k[:, t])
            outputs.append((state + token.faded(u)).mean)
            state = state.faded(w) + token
        return torch.stack(outputs, dim=1)

    return Forms(chunks, loop, aim=20, tolerance=1e-5)


def rwkv7_forms() -> Forms:
    """Make the chunked form of RWKV-7's time mix, and the loop over tokens."""
    heads, size = 2, 64
    r, k, v, a = (drawn(1, LENGTH + i, heads, size)[:, :LENGTH] for i in range(4))
    kk = torch.nn.functional.normalize(a, dim=-1)
    inputs = DeltaInputs(r, -0.6 * drawn(1, LENGTH, heads, size).sigmoid(), k, v, -kk, 0.5 * kk)
    inputs = DeltaInputs(*(each.detach().requires_grad_() for each in vars(inputs).values()))
    begins = torch.zeros(1, LENGTH, dtype=torch.bool)

    def chunks() -> Tensor:
        return advance(inputs, torch.zeros(1, heads, size, size), begins)[0]

    def loop() -> Tensor:
        state, outputs = torch.zeros(1, heads, size, size), []
        decay = inputs.log_decay.exp()
        for t in range(LENGTH):
            columns = {name: part[:, t].unsqueeze(-1) for name, part in vars(inputs).items()}
            state = state * decay[:, t].unsqueeze(-2) + (state @ columns["a"]) @ columns["b"].mT
            state = state + columns["v"] @ columns["k"].mT
            outputs.append((state @ columns["r"]).squeeze(-1))
        return torch.stack(outputs, dim=1)

    return Forms(chunks, loop, aim=20, tolerance=1e-4)


FORMS: dict[str, Callable[[], Forms]] = {
    "ttt_linear": lambda: ttt_forms("linear"),
    "ttt_mlp": lambda: ttt_forms("mlp"),
    "rwkv4": rwkv4_forms,
    "rwkv7": rwkv7_forms,
}
