"""Counter-based random numbers: a hash of a key and counters gives the bits, the same on CPU and CUDA.

A draw depends only on its key and counters (such as seed, purpose and token), never on the rank.

Source: splitmix64's finaliser, Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_CHUNK = 1 << 22  # elements hashed at once; bounds the int64 and fp64 temporaries to about 100 MB


def make_key(*parts: int | str) -> int:
    """Make a 64-bit key from any parts, the same in every process and version of Python.

    Args:
        parts: Seed and purpose of the draw, such as (seed, "router_noise", layer).

    Returns:
        A signed 64-bit integer.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def combine(key: int | Tensor, counter: int | Tensor) -> Tensor:
    """Hash a key and a counter into a new key, with broadcasting.

    Args:
        key: 64-bit integer or int64 tensor.
        counter: 64-bit integer or int64 tensor; at least one of the two is a tensor.

    Returns:
        int64 tensor of the broadcast shape, with uniform bits.
    """
    # Integer overflow wraps in torch on every device, as the hash requires. A Python number is not made a tensor,
    # because that tensor would have to be copied to the device.
    if isinstance(counter, Tensor):
        bits = key + counter * _signed(_GOLDEN)
    else:
        assert isinstance(key, Tensor), "one of the two is a tensor"
        bits = key + _signed(counter * _GOLDEN % (1 << 64))
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_FACTORS[0])
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_FACTORS[1])
    return bits ^ _shift_right(bits, 31)


def uniform(bits: Tensor) -> Tensor:
    """Convert random bits to uniform numbers in the open interval (0, 1).

    Args:
        bits: int64, from `combine`.

    Returns:
        fp64 of the same shape. It uses 52 bits, because with 53 the largest value would round to 1.
    """
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def normal(bits: Tensor) -> Tensor:
    """Convert random bits to standard normal numbers, by the inverse of the cumulative distribution function.

    Args:
        bits: int64, from `combine`.

    Returns:
        fp64 of the same shape, always finite.
    """
    return torch.erfinv(2.0 * uniform(bits) - 1.0) * math.sqrt(2.0)


@torch.no_grad()
def fill_normal_(out: Tensor, key: int, start: int, std: float) -> None:
    """Fill a tensor with a part of an unbounded keyed sequence of normal numbers with mean 0.

    Args:
        out: Contiguous tensor of any floating dtype and shape; element i becomes number start + i of the sequence.
        key: Key from `make_key`.
        start: Place of the first element in the sequence.
        std: Standard deviation.
    """
    flat = out.view(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        end = min(begin + _CHUNK, flat.numel())
        counter = torch.arange(start + begin, start + end, dtype=torch.int64, device=out.device)
        flat[begin:end] = (normal(combine(key, counter)) * std).to(out.dtype)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(bits: Tensor, places: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes the shift logical.
    return (bits >> places) & ((1 << (64 - places)) - 1)
