"""Drawing text from a model, one token at a time.

Legend: B batch (1 here), S prompt length, V vocab_size.
"""

import torch
from torch import Tensor

from moe_train.model.transformer import Tokens, Transformer
from moe_train.ops.keyed_random import combine, make_key, uniform


@torch.no_grad()
def generate(
    model: Transformer, prompt: list[int], num_tokens: int, *, temperature: float, seed: int, vocab_size: int
) -> list[int]:
    """Continue a prompt, keeping keys and values of what was read.

    Args:
        model: Put into evaluation mode: no router noise.
        prompt: Token ids, at least one.
        num_tokens: Tokens to draw.
        temperature: Divides the logits; 0 takes the likeliest token.
        seed: Of the draws.
        vocab_size: Tokens that exist; rows of the embedding beyond them are padding and never drawn.

    Returns:
        The new token ids.

    Collective: All ranks, with prompts of one length: the experts may be on other ranks.
    """
    model.eval()
    device = model.embedding.weight.device
    states, key = model.new_states(), make_key(seed, "generate")
    new, ids = [], torch.tensor([prompt], device=device)
    sequence = torch.zeros(1, dtype=torch.int64, device=device)
    start = 0
    for place in range(num_tokens):
        positions_BS = torch.arange(start, start + ids.shape[1], device=device).unsqueeze(0)
        logits_BSV = model(Tokens(ids, sequence, positions_BS=positions_BS), states).logits_BSV
        draw = uniform(combine(key, torch.tensor(place, device=device)))
        chosen = choose_token(logits_BSV[0, -1, :vocab_size], temperature, draw)
        new.append(int(chosen))  # host synchronisation: the text is wanted there
        start, ids = start + ids.shape[1], chosen.view(1, 1)
    return new


def choose_token(logits_V: Tensor, temperature: float, draw: Tensor) -> Tensor:
    """A token by the inverse of its distribution function; the likeliest where the temperature is 0.

    Args:
        logits_V: Of one position.
        temperature: Divides the logits.
        draw: Uniform number in (0, 1), fp64 scalar.

    Returns:
        int64 scalar.
    """
    if temperature == 0.0:
        return logits_V.argmax()
    cumulative_V = (logits_V.double() / temperature).softmax(0).cumsum(0)
    index = torch.searchsorted(cumulative_V, draw * cumulative_V[-1])
    return index.clamp(max=logits_V.shape[0] - 1)
