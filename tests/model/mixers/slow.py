"""Slow, obvious references of the mixers: a loop over the tokens of one document, with a mixer's own parameters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.ops.rotary import apply_rotary, rotary_angles


def by_document(one: Callable[[Tensor], Tensor], x_BSD: Tensor, documents_BS: Tensor) -> Tensor:
    """Run a reference of one document [S, D] on every document of every row."""
    rows = []
    for x_SD, documents_S in zip(x_BSD, documents_BS, strict=True):
        lengths = documents_S.unique_consecutive(return_counts=True)[1].tolist()
        rows.append(torch.cat([one(part) for part in x_SD.split(lengths)]))
    return torch.stack(rows)


def infini(mixer, x_SD: Tensor) -> Tensor:
    """Infini-attention, token by token and head by head."""
    size, per_group, segment = mixer.head_dim, mixer.num_heads // mixer.num_kv_heads, mixer.segment_length
    angles = rotary_angles(torch.arange(len(x_SD))[None], size, mixer.rope_theta, x_SD.dtype)
    q, k, v = (project(x_SD).unflatten(-1, (-1, size)) for project in (mixer.query, mixer.key, mixer.value))
    turned_q, turned_k = (apply_rotary(part.transpose(0, 1)[None], *angles)[0].transpose(0, 1) for part in (q, k))
    features_q, features_k = F.elu(q) + 1, F.elu(k) + 1
    outputs = []
    for t in range(len(x_SD)):
        start, heads = t // segment * segment, []
        for head in range(mixer.num_heads):
            group = head // per_group
            matrix, total = torch.zeros(size, size, dtype=x_SD.dtype), torch.zeros(size, dtype=x_SD.dtype)
            for begin in range(0, start, segment):
                added, old_matrix, old_total = matrix, matrix, total
                for i in range(begin, begin + segment):
                    key, value = features_k[i, group], v[i, group]
                    if mixer.is_delta and begin:
                        value = value - key @ old_matrix / (key @ old_total)
                    added, total = added + torch.outer(key, value), total + key
                matrix = added
            query = features_q[t, head]
            far = query @ matrix / (query @ total) if start else torch.zeros(size, dtype=x_SD.dtype)
            scores = turned_k[start : t + 1, group] @ turned_q[t, head] / size**0.5
            near = scores.softmax(0) @ v[start : t + 1, group]
            gate = mixer.beta[head].sigmoid()
            heads.append(gate * far + (1 - gate) * near)
        outputs.append(torch.cat(heads))
    return mixer.output(torch.stack(outputs))
