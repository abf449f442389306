"""Vectors of speculative decoding: the filtered distributions, what stays of a proposal, and tokens per round."""

from collections.abc import Iterator

import torch

from benchmarks.speculative.formula import expected_tokens
from moe_train.infer.rejection import residual
from moe_train.infer.sampling import Sampling, distribution
from tests.vectors.layers import Quantity, Vector, numbers


def check(vector: Vector) -> Iterator[Quantity]:
    """Yield what the rule makes of p and q, and that the sampler's filters leave them as they are."""
    if "vocab" not in vector:
        yield from _check_rate(vector)
        return
    p_1V, q_1V = (numbers(vector[name])[None] for name in ("p", "q"))
    if p_1V.shape != (1, vector["vocab"]) or q_1V.shape != p_1V.shape:
        raise ValueError(f"p and q do not have {vector['vocab']} tokens")
    yield "acceptance", acceptance(p_1V, q_1V)[0], numbers(vector["acceptance"])
    yield "residual", residual(p_1V, q_1V)[0], numbers(vector["residual"])
    options = dict(vector["options"])
    temperature = options.pop("temperature", 1.0)
    sampling = Sampling(temperature, **options)
    for name, whole_1V in (("p", p_1V), ("q", q_1V)):
        # Logits of which these are the probabilities; -inf is a token that a filter has taken out.
        logits_1V = whole_1V.log() * (temperature or 1.0)
        if options.keys() <= {"top_k"}:  # top_p of a filtered distribution may take out more
            yield name, distribution(logits_1V, sampling)[0], whole_1V[0]
    yield "first token", _first_token(p_1V[0], q_1V[0]), p_1V[0]


def acceptance(p_BV: torch.Tensor, q_BV: torch.Tensor) -> torch.Tensor:
    """The probability that a token drawn from q stays: the sum of min(p, q). fp64 [B]."""
    return torch.minimum(p_BV, q_BV).sum(1)


def _check_rate(vector: Vector) -> Iterator[Quantity]:
    """Yield the rate of acceptance of one pair, and the tokens per round by the number of proposed tokens."""
    p_1V, q_1V = (numbers(vector[name])[None] for name in ("p", "q"))
    rate = acceptance(p_1V, q_1V)[0]
    yield "alpha", rate, numbers(vector["alpha"])
    for number, expected in vector["expected_tokens"].items():
        yield f"expected_tokens {number}", numbers(expected_tokens(float(rate), int(number))), numbers(expected)


def _first_token(p_V: torch.Tensor, q_V: torch.Tensor) -> torch.Tensor:
    """The distribution of a round's first token, by the rule."""
    return torch.minimum(p_V, q_V) + (1 - acceptance(p_V[None], q_V[None])) * residual(p_V[None], q_V[None])[0]
