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


def ttt(mixer, x_SD: Tensor) -> Tensor:
    """TTT in its primal form: every token has inner weights of its own, from gradients that autograd takes."""
    size, batch = mixer.head_dim, mixer.mini_batch
    rates = (x_SD @ mixer.lr_weight.T + mixer.lr_bias).sigmoid() * mixer.inner_learning_rate / size
    if mixer.inner == "mlp":
        rates = rates * mixer.warm
    q, k = mixer.query(x_SD), mixer.query(x_SD) if mixer.key is None else mixer.key(x_SD)
    if mixer.key is None:
        q, k = (
            F.conv1d(F.pad(x.T, (3, 0)), weight.unsqueeze(1), bias, groups=len(bias)).T
            for x, weight, bias in ((q, mixer.conv_q, mixer.conv_q_bias), (k, mixer.conv_k, mixer.conv_k_bias))
        )
    slots = torch.arange(len(x_SD)) % batch
    angles = rotary_angles(slots[None], size, mixer.rope_theta, x_SD.dtype)
    q, k, v = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in (q, k, mixer.value(x_SD)))
    q, k = (apply_rotary(part[None], *angles)[0] for part in (q, k))
    heads = [_learn(mixer, head, q[head], k[head], v[head], rates[:, head], slots) for head in range(len(q))]
    y = mixer.post_norm(torch.cat(heads, dim=1))
    return mixer.output(y if mixer.gate is None else F.gelu(mixer.gate(x_SD), approximate="tanh") * y)


def _learn(mixer, head: int, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, slots: Tensor) -> Tensor:
    names = ("w1", "b1") if mixer.inner == "linear" else ("w1", "b1", "w2", "b2")
    start = [getattr(mixer, name)[head] for name in names]

    def model(weights, x):
        hidden = x @ weights[0] + weights[1]
        z = hidden if len(weights) == 2 else F.gelu(hidden, approximate="tanh") @ weights[2] + weights[3]
        return F.layer_norm(z, z.shape, mixer.inner_norm_weight[head], mixer.inner_norm_bias[head], 1e-6)

    outputs, sums = [], [torch.zeros_like(part) for part in start]
    for t, slot in enumerate(slots.tolist()):
        with torch.enable_grad():
            loss = (model(start, k[t]) - (v[t] - k[t])).square().sum() / 2
            gradients = torch.autograd.grad(loss, start, create_graph=True)
        sums = [total + rates[t] * gradient for total, gradient in zip(sums, gradients, strict=True)]
        row = (1 / (slot + 1) + mixer.row_delta[slot]).clamp(min=0)
        weights = [part - row * total for part, total in zip(start, sums, strict=True)]
        outputs.append(q[t] + model(weights, q[t]))
        if slot == mixer.mini_batch - 1:
            start, sums = weights, [torch.zeros_like(part) for part in start]
    return torch.stack(outputs)


def rwkv4(mixer, x_SD: Tensor) -> Tensor:
    """The time mix of RWKV-4: every average is a softmax over the tokens so far."""
    before = F.pad(x_SD, (0, 0, 1, 0))[:-1]
    k, v, r = (
        project(mix * x_SD + (1 - mix) * before)
        for project, mix in (
            (mixer.key, mixer.mix_k),
            (mixer.value, mixer.mix_v),
            (mixer.receptance, mixer.mix_r),
        )
    )
    return mixer.output(r.sigmoid() * rwkv4_average(k, v, -mixer.decay.exp(), mixer.first))


def rwkv4_average(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Average the values with weights e^(k + (t - 1 - i) w), and e^(k + u) for the own token; [S, D]."""
    outputs = []
    for t in range(len(k)):
        past = [k[i] + (t - 1 - i) * w for i in range(t)]
        outputs.append((torch.stack([*past, k[t] + u]).softmax(0) * v[: t + 1]).sum(0))
    return torch.stack(outputs)


def rwkv7(mixer, x_SD: Tensor) -> Tensor:
    """The time mix of the first RWKV-7 layer, token by token and head by head; see `rwkv7_state` for the state."""
    step = F.pad(x_SD, (0, 0, 1, 0))[:-1] - x_SD
    r, w, k, v, a, g = (x_SD + getattr(mixer, f"x_{letter}") * step for letter in "rwkvag")
    r, k, v = mixer.receptance(r), mixer.key(k), mixer.value(v)
    decay = torch.exp(-(torch.tensor(-0.5).double().exp()) * (mixer.w0 + torch.tanh(w @ mixer.w1) @ mixer.w2).sigmoid())
    rate = (mixer.a0 + a @ mixer.a1 @ mixer.a2).sigmoid()
    gate = (g @ mixer.g1).sigmoid() @ mixer.g2
    scaled, k = k * mixer.k_k, k * (1 + (rate - 1) * mixer.k_a)
    heads = []
    for head in range(mixer.num_heads):
        own = slice(head * mixer.head_dim, (head + 1) * mixer.head_dim)
        unit = scaled[:, own] / scaled[:, own].norm(dim=1, keepdim=True)
        y = rwkv7_state(r[:, own], decay[:, own], k[:, own], v[:, own], -unit, unit * rate[:, own])
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 64e-5).sqrt()
        bonus = (r[:, own] * k[:, own] * mixer.r_k[head]).sum(1, keepdim=True)
        heads.append(y * mixer.ln_weight[own] + mixer.ln_bias[own] + bonus * v[:, own])
    return mixer.output(torch.cat(heads, dim=1) * gate)


def rwkv7_state(r: Tensor, decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """S <- S diag(w) + (S a) b^T + v k^T, y = S r, for one head [S, d]."""
    state, outputs = torch.zeros(v.shape[1], k.shape[1], dtype=v.dtype), []
    for t in range(len(v)):
        state = state * decay[t] + torch.outer(state @ a[t], b[t]) + torch.outer(v[t], k[t])
        outputs.append(state @ r[t])
    return torch.stack(outputs)


def channel_mix(layer, x_SD: Tensor) -> Tensor:
    """The channel mix of RWKV-4."""
    before = F.pad(x_SD, (0, 0, 1, 0))[:-1]
    k, r = (mix * x_SD + (1 - mix) * before for mix in (layer.mix_k, layer.mix_r))
    return layer.receptance(r).sigmoid() * layer.value(layer.key(k).relu() ** 2)


def channel_mix7(layer, x_SD: Tensor) -> Tensor:
    """The channel mix of RWKV-7."""
    before = F.pad(x_SD, (0, 0, 1, 0))[:-1]
    return layer.value(layer.key(x_SD + layer.x_k * (before - x_SD)).relu() ** 2)
