"""What speculative decoding gives by the formula, if every proposed token stays with the same probability.

Source: Leviathan et al. 2023, arXiv 2211.17192.
"""


def expected_tokens(rate: float, number: int) -> float:
    """Compute the mean tokens per round if every proposed token stays with the same probability.

    Args:
        rate: a, probability that a token stays.
        number: N, proposed tokens per round.

    Returns:
        (1 - a^(N+1)) / (1 - a): from 1 to N + 1.
    """
    return sum(rate**place for place in range(number + 1))  # the same sum; it holds for a = 1 too


def expected_speedup(rate: float, number: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Compute the speed over plain decoding, in tokens per second.

    Args:
        rate: a, probability that a proposed token stays.
        number: N, proposed tokens per round.
        draft_cost: c, seconds of one draft step over those of a plain step of the target.
        verify_cost: v, seconds of a target's forward pass over N + 1 tokens over those of a plain step.

    Returns:
        (1 - a^(N+1)) / ((1 - a) (N c + v)).
    """
    return expected_tokens(rate, number) / (number * draft_cost + verify_cost)
