"""The state of RWKV-7 in chunks: a decayed matrix that a delta rule corrects at every token.

With M the transposed state, M_t = diag(w_t) M_{t-1} + b_t (a_t^T M_{t-1}) + k_t v_t^T and y_t = M_t^T r_t. In a chunk
that M enters, with D_t the product of the decays up to t, u_t = M_{t-1}^T a_t solves a triangular system:
    u_t = (a_t D_{t-1})^T M + sum over s < t of a_t^T (D_{t-1} / D_s) (b_s u_s^T + k_s v_s^T).
So a whole chunk maps M affinely (the WY form), and only M goes from chunk to chunk one after the other.

Source: github.com/BlinkDL/RWKV-LM, RWKV-v7; the chunked form of delta rules: Yang et al. 2024, arXiv 2406.06484.
Legend: B batch, S sequence, H heads, d head size, n chunks, c tokens of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # a decay is at least 0.545, so that the inverse of a chunk's decays is at most 3e8


@dataclass(frozen=True)
class DeltaInputs:
    """Inputs of every token, [B, S, H, d], in at least fp32.

    Attributes:
        r: Vector that reads the state.
        log_decay: Logarithm of the decay of each row of M, between -0.61 and 0.
        k: Key that v is written under.
        v: Value.
        a: Vector that reads what is to be replaced.
        b: Vector under which what was read is added.
    """

    r: Tensor
    log_decay: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


def advance(inputs: DeltaInputs, state_BHdd: Tensor, begins_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Read the state at every token, and return the state after the last one.

    Args:
        inputs: Inputs of the tokens; one with decay 1, k = 0 and b = 0 does not change the state.
        state_BHdd: M^T before the first token.
        begins_BS: bool, whether the token begins a document; it finds an empty state.

    Returns:
        y [B, S, H, d] and M^T after the last token.
    """
    length = begins_BS.shape[1]
    size = min(CHUNK, length)
    r, log_decay, k, v, a, b = (
        _chunks(part, size) for part in (inputs.r, inputs.log_decay, inputs.k, inputs.v, inputs.a, inputs.b)
    )
    # Number of the document in the chunk: tokens of number 0 see what enters the chunk.
    document_Bnc = _chunks(begins_BS.long(), size).cumsum(-1)
    is_same_Bn1cc = (document_Bnc.unsqueeze(-1) == document_Bnc.unsqueeze(-2)).unsqueeze(2)
    enters_Bn1c1 = (document_Bnc == 0)[:, :, None, :, None]
    stays_Bn1c1 = (document_Bnc == document_Bnc[..., -1:])[:, :, None, :, None]
    # (B, n, H, c, d), each relative to the start of the chunk or document. A product with zeros, not a running sum over
    # the chunk: nothing of one document rounds off in another.
    logs = is_same_Bn1cc.tril().to(log_decay.dtype) @ log_decay
    reading, replacing = r * logs.exp(), a * (logs - log_decay).exp()
    inverse = (-logs).exp()
    written_k, written_b = (k * inverse).mT, (b * inverse).mT

    def scores(rows: Tensor, columns: Tensor, diagonal: int) -> Tensor:
        return ((rows @ columns) * is_same_Bn1cc).tril(diagonal)

    system = torch.eye(size, dtype=v.dtype, device=v.device) - scores(replacing, written_b, -1)
    known = torch.cat((replacing * enters_Bn1c1, scores(replacing, written_k, -1) @ v), dim=-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    of_entering, of_chunk = solved.split((a.shape[-1], v.shape[-1]), dim=-1)
    # What the chunk makes of the M that enters it: transfer @ M + added.
    left = (logs[..., -1:, :] - logs).exp() * stays_Bn1c1
    kept_b, kept_k = (b * left).mT, (k * left).mT
    decay_left = logs[..., -1, :].exp() * enters_Bn1c1[..., -1, :]
    transfer = torch.diag_embed(decay_left) + kept_b @ of_entering
    added = kept_b @ of_chunk + kept_k @ v
    entering, matrix = [], state_BHdd.mT
    for each_transfer, each_added in zip(transfer.unbind(1), added.unbind(1), strict=True):
        entering.append(matrix)
        matrix = each_transfer @ matrix + each_added
    entering_BnHdd = torch.stack(entering, dim=1)
    replaced = of_entering @ entering_BnHdd + of_chunk
    y = (reading * enters_Bn1c1) @ entering_BnHdd
    y = y + scores(reading, written_b, 0) @ replaced + scores(reading, written_k, 0) @ v
    return y.transpose(2, 3).flatten(1, 2)[:, :length], matrix.mT


def _chunks(x: Tensor, size: int) -> Tensor:
    """Cut tokens into chunks; the last is filled with zeros. (B, S, H, d) -> (B, n, H, c, d), (B, S) -> (B, n, c)."""
    missing = -x.shape[1] % size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    x = x.unflatten(1, (-1, size))
    return x.transpose(2, 3) if x.dim() > 3 else x
