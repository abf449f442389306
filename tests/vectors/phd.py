"""Vectors of hidden copies: attention with the mask of who sees whom, and whole models with their prefill.

The models have no norms and a tanh MLP, which are written here; expand, attention and contract are the project's own.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.model.build import mixer_of
from moe_train.model.decode_state import CacheSpec
from moe_train.model.mixers.base import MixerContext, Shared
from moe_train.model.stream.hidden_copies import HiddenCopies
from moe_train.model.token_index import TokenIndex
from moe_train.model.transformer import Tokens
from moe_train.ops.attention import attend
from moe_train.ops.hidden_attention import hidden_attention, hidden_blocks
from tests.vectors.layers import Quantity, Vector, numbers, splits, with_weights

HEADS, KV_HEADS = 2, 1  # of the models, which do not name them
NAMES = {"q": "query.weight", "k": "key.weight", "v": "value.weight", "o": "output.weight"}


def check(vector: Vector) -> Iterator[Quantity]:
    """Yield the mask and the output of attention, or the logits of a model, whole and decoded."""
    yield from _attention(vector) if "visible" in vector else _model(vector)


def _attention(vector: Vector) -> Iterator[Quantity]:
    if vector["order"] != "regrouped":
        raise ValueError(f"order is {vector['order']!r}, not regrouped")
    q, k, v = (numbers(vector[name])[None] for name in "qkv")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        copies, positions = vector["copies"], torch.arange(vector["length"])[None]
        if copies == 1:
            return attend(q, k, v, None)
        blocks = hidden_blocks(positions, copies, vector["window"], vector["chunk"])
        return hidden_attention(q, k, v, blocks, None)

    length = q.shape[2]
    # With keys of zero all visible keys have the same weight, which values of an identity show.
    shown = run(torch.zeros(1, 1, length, length).double(), torch.zeros(1, 1, length, length).double(), _eye(length))
    yield "visible", (shown[0, 0] > 0).double(), numbers(vector["visible"])
    yield "y", run(q, k, v)[0], numbers(vector["y"])


def _eye(length: int) -> Tensor:
    return torch.eye(length, dtype=torch.float64)[None, None]


class _Model(nn.Module):
    """Layers of x += Attn(x) Wo^T; x += tanh(x A^T) B^T, between an embedding and a head."""

    def __init__(self, vector: Vector) -> None:
        super().__init__()
        settings = {"copies": vector["copies"]}
        if vector["window"]:
            settings |= {"window_positions": vector["window"], "chunk": vector["chunk"]}
        config = ModelConfig.model_validate(
            {
                "hidden_size": len(vector["embedding"][0]),
                "num_layers": vector["layers"],
                "num_heads": HEADS,
                "num_kv_heads": KV_HEADS,
                "moe_every": 0,
                "hidden_copies": settings,
            }
        )
        self.embedding, self.head, self.layers = numbers(vector["embedding"]), numbers(vector["head"]), []
        for layer, weights in enumerate(vector["weights"]):
            kind, spec = mixer_of(config, layer)
            with torch.device("meta"):
                mixer = kind.build(spec)
            own = {name: weights[name] for name in NAMES}
            self.layers.append((with_weights(mixer, own, NAMES), numbers(weights["a"]), numbers(weights["b"])))
        self.hook = HiddenCopies.of(config)

    def new_states(self, length: int) -> list[Any]:
        spec = CacheSpec(1, length, torch.float64, torch.device("cpu"))
        return [mixer.new_state(spec) for mixer, _, _ in self.layers]

    def forward(self, ids: Tensor, start: int, states: list[Any] | None, hidden_from: int | None = None) -> Tensor:
        positions = torch.arange(start, start + len(ids))[None]
        index = TokenIndex(positions, positions, None, positions, hidden_from=hidden_from, first_position=start)
        x, context = self.hook.expand(self.embedding[ids][None], MixerContext(0, index))
        shared: Shared = {}
        for layer, (mixer, a, b) in enumerate(self.layers):
            own = replace(context, layer=layer, shared=shared, state=None if states is None else states[layer])
            y, shared = mixer(x, own)
            x = x + y
            x = x + torch.tanh(x @ a.T) @ b.T
        return self.hook.contract(x, context)[0] @ self.head.T


@torch.no_grad()
def _model(vector: Vector) -> Iterator[Quantity]:
    model, ids, expected = _Model(vector), torch.tensor(vector["ids"]), numbers(vector["logits_last_copy"])
    length, name = len(ids), "logits_last_copy"
    yield f"{name} (whole)", model(ids, 0, None), expected
    for ends in splits(length):
        states, parts, start = model.new_states(length), [], 0
        for end in ends:
            parts.append(model(ids[start:end], start, states))
            start = end
        yield f"{name} (parts)", torch.cat(parts), expected
    first = model.hook.hidden_from(Tokens(ids[None], torch.zeros(1, dtype=torch.int64)), 1)
    yield "prefill_positions", numbers(length - first), numbers(vector["prefill_positions"])
    yield "last logits of the prefill", model(ids, 0, model.new_states(length), first)[-1], expected[-1]
    if first + 1 < length:
        fewer = model(ids, 0, model.new_states(length), first + 1)[-1]
        changes = bool((fewer - expected[-1]).abs().max() > 1e-9)
        yield "one_fewer_changes_the_logits", numbers(changes), numbers(vector["one_fewer_changes_the_logits"])
