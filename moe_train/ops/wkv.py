"""The weighted average of RWKV-4, and its state, in chunks.

Each channel averages the values so far with weights e^k that fade by e^w a token; the own token has weight e^(u + k). A
state (a, b, p) is the sum of weighted values and that of weights, both divided by e^p, where p is a running maximum, so
that nothing overflows. States combine associatively: those of chunks by a scan in log2 steps, then all chunks go
through their tokens at once. The loop is over the tokens of a chunk, never over those of a sequence.

Source: Peng et al. 2023, arXiv 2305.13048, and github.com/BlinkDL/RWKV-LM, RWKV-v4.
Legend: B batch, S sequence, D channels, n chunks, c tokens of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16
EMPTY = -1e30  # exponent of an empty sum: not -inf, whose differences are not numbers; not at the end of fp32's range


@dataclass(frozen=True)
class Average:
    """A weighted sum of values, its sum of weights, and the exponent that both are relative to; all of one shape."""

    values: Tensor
    weights: Tensor
    exponent: Tensor

    @staticmethod
    def empty(like: Tensor) -> "Average":
        """Make empty sums of the shape of a tensor."""
        return Average(torch.zeros_like(like), torch.zeros_like(like), torch.full_like(like, EMPTY))

    def faded(self, log_decay: Tensor) -> "Average":
        """Multiply all weights by a factor, given by its logarithm; EMPTY forgets everything."""
        return Average(self.values, self.weights, self.exponent + log_decay)

    def __add__(self, other: "Average") -> "Average":
        # Any common exponent gives the same sums: it is a constant for the gradient.
        exponent = torch.maximum(self.exponent.detach(), other.exponent.detach())
        one, two = (self.exponent - exponent).exp(), (other.exponent - exponent).exp()
        return Average(one * self.values + two * other.values, one * self.weights + two * other.weights, exponent)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the values."""
        return self.values / self.weights

    def where(self, chosen: Tensor) -> "Average":
        """Keep the sums where `chosen`, and empty them elsewhere."""
        return Average(
            torch.where(chosen, self.values, 0.0),
            torch.where(chosen, self.weights, 0.0),
            torch.where(chosen, self.exponent, EMPTY),
        )


def wkv(
    k_BSD: Tensor,
    v_BSD: Tensor,
    w_D: Tensor,
    u_D: Tensor,
    before: Average,
    begins_BS: Tensor,
    valid_BS: Tensor | None = None,
) -> tuple[Tensor, Average]:
    """Average the values up to each token.

    Args:
        k_BSD: Logarithms of weights, at least fp32, as all that follows.
        v_BSD: Values.
        w_D: Logarithm of the decay of a token, negative.
        u_D: Logarithm of the factor of the own token.
        before: Sums before the first token, [B, D].
        begins_BS: bool, whether the token begins a document: it finds empty sums.
        valid_BS: bool; a token that is not valid changes no sum. None: all are valid.

    Returns:
        The averages [B, S, D], and the sums after the last token.
    """
    length = k_BSD.shape[1]
    size = min(CHUNK, length)
    valid_BS = torch.ones_like(begins_BS) if valid_BS is None else valid_BS
    # (B, S, D) -> (B, n, c, D); what fills the last chunk is not valid.
    k, v, begins, valid = (
        F.pad(part, (0, 0, 0, -length % size)).unflatten(1, (-1, size))
        for part in (k_BSD, v_BSD, begins_BS.unsqueeze(-1), valid_BS.unsqueeze(-1))
    )
    begins = begins & valid
    own = Average(v, torch.ones_like(v), k).where(valid)
    state = _entering(own, w_D, before, begins, valid)
    # What is forgotten before a token, where it begins a document, and how the sums before it fade behind it.
    resets, fading = (begins * EMPTY).unbind(2), (valid * w_D).unbind(2)
    tokens = [Average(*parts) for parts in zip(*(part.unbind(2) for part in _parts(own)), strict=True)]
    averages = []
    for token, reset, fade in zip(tokens, resets, fading, strict=True):
        state = state.faded(reset)
        averages.append((state + token.faded(u_D)).mean)
        state = state.faded(fade) + token
    y_BSD = torch.stack(averages, dim=2).flatten(1, 2)[:, :length]
    return y_BSD, Average(state.values[:, -1], state.weights[:, -1], state.exponent[:, -1])


def chunk_sums(k_BcD: Tensor, v_BcD: Tensor, w_D: Tensor, begins_Bc: Tensor) -> Tensor:
    """Compute what a row that is a chunk of a longer one hands on, for `sums_before`. [4, B, D].

    Args:
        k_BcD: Logarithms of weights, at least fp32.
        v_BcD: Values.
        w_D: Logarithm of the decay of a token, negative.
        begins_Bc: bool, whether the token begins a document.
    """
    own = Average(v_BcD, torch.ones_like(v_BcD), k_BcD)
    each_token = Average(*(part.unsqueeze(1) for part in _parts(own)))
    begins = begins_Bc[:, None, :, None]
    added, passing = _added(each_token, w_D, begins, torch.ones_like(begins))
    return torch.stack((*_parts(added), passing)).squeeze(2)


def sums_before(chunks_B4nD: Tensor) -> Tensor:
    """Combine what the chunks of a row hand on: the sums before each of them, as three tensors in one. [B, 3, n, D].

    Args:
        chunks_B4nD: Results of `chunk_sums`, in the order of the row.
    """
    values, weights, exponent, passing = chunks_B4nD.unbind(1)
    empty = Average.empty(values[:, :1])
    sums = _scan(empty, Average(values[:, :-1], weights[:, :-1], exponent[:, :-1]), passing[:, :-1])
    return torch.stack(_parts(sums), dim=1)


def _entering(own: Average, w_D: Tensor, before: Average, begins: Tensor, valid: Tensor) -> Average:
    """Compute the sums that enter each chunk. [B, n, D].

    Args:
        own: Each token alone, [B, n, c, D].
        w_D: Logarithm of the decay of a token.
        before: Sums before the first chunk, [B, D].
        begins: bool [B, n, c, 1], whether the token begins a document.
        valid: bool [B, n, c, 1].
    """
    first = Average(before.values.unsqueeze(1), before.weights.unsqueeze(1), before.exponent.unsqueeze(1))
    if begins.shape[1] == 1:
        return first
    own = Average(own.values[:, :-1], own.weights[:, :-1], own.exponent[:, :-1])
    added, passing = _added(own, w_D, begins[:, :-1], valid[:, :-1])
    return _scan(first, added, passing)


def _added(own: Average, w_D: Tensor, begins: Tensor, valid: Tensor) -> tuple[Average, Tensor]:
    """Compute what chunks add, as seen from behind them: their tokens since the last one that begins a document.

    Args:
        own: Each token alone, [B, n, c, D].
        w_D: Logarithm of the decay of a token.
        begins: bool [B, n, c, 1], whether the token begins a document.
        valid: bool [B, n, c, 1].

    Returns:
        What is added, and the logarithm of the factor by which the sums before a chunk fade in it; all [B, n, D].
    """
    document = begins.cumsum(2)
    later = valid.sum(2, keepdim=True) - valid.cumsum(2)
    faded = own.faded(later * w_D).where((document == document[:, :, -1:]) & valid)
    exponent = faded.exponent.detach().amax(2)
    shares = (faded.exponent - exponent.unsqueeze(2)).exp()
    added = Average((shares * faded.values).sum(2), (shares * faded.weights).sum(2), exponent)
    return added, torch.where(begins.any(2), EMPTY, valid.sum(2) * w_D)


def _scan(first: Average, added: Average, passing: Tensor) -> Average:
    """Compute the sums that enter each chunk and, after the last given one, those that leave it. [B, n + 1, D].

    Args:
        first: Sums before the first chunk, [B, 1, D].
        added: What each chunk adds, [B, n, D].
        passing: Logarithm of the factor by which the sums before fade in each chunk, [B, n, D].
    """
    # Element 0 is what was before; then element i is the sum of all up to chunk i, faded by `passing`.
    sums = Average(*(torch.cat(pair, dim=1) for pair in zip(_parts(first), _parts(added), strict=True)))
    passing = F.pad(passing, (0, 0, 1, 0))
    step = 1
    while step < passing.shape[1]:
        left = Average(*(part[:, :-step] for part in _parts(sums)))
        right = Average(*(part[:, step:] for part in _parts(sums)))
        joined = left.faded(passing[:, step:]) + right
        sums = Average(
            *(torch.cat((old[:, :step], new), dim=1) for old, new in zip(_parts(sums), _parts(joined), strict=True))
        )
        passing = torch.cat((passing[:, :step], (passing[:, :-step] + passing[:, step:]).clamp(min=2 * EMPTY)), dim=1)
        step *= 2
    return sums


def _parts(average: Average) -> tuple[Tensor, Tensor, Tensor]:
    return average.values, average.weights, average.exponent
