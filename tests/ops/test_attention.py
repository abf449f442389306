"""Grouped causal attention against an explicit softmax."""

import math

import pytest
import torch

from moe_train.ops import products
from moe_train.ops.attention import attend, visible_keys


def slow_attend(q, k, v, visible):
    """Head by head, query by query; visible(b, s, c) says what query s of row b may see."""
    batch, heads, length, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for s in range(length):
                seen = [c for c in range(keys) if visible(b, s, c)]
                scores = [math.exp((q[b, h, s] @ k[b, g, c]).item() / math.sqrt(size)) for c in seen]
                for weight, c in zip(scores, seen):
                    out[b, h, s] += weight / sum(scores) * v[b, g, c]
    return out


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_query_heads_read_contiguous_groups(groups):
    q, k, v = draw(2, 6, 5, 4), draw(2, groups, 5, 4), draw(3, groups, 5, 4)[:2]
    expected = slow_attend(q, k, v, lambda b, s, c: c <= s)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    # Sums of five products in fp64.
    torch.testing.assert_close(attend(q, k, v, None), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(attend(q, k, v, mask), expected, rtol=0, atol=1e-13)


def test_mask_with_documents_and_more_keys_than_queries():
    positions = torch.tensor([[3, 4], [7, 2]])
    key_positions = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 7, 9]])
    documents = torch.tensor([[1, 1], [0, 5]])
    key_documents = torch.tensor([[0, 0, 1, 1, 1], [0, 5, 5, 0, 0]])
    mask = visible_keys(positions, key_positions, documents, key_documents)
    assert mask.dtype == torch.bool
    assert mask[:, 0].int().tolist() == [[[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]]]
    q, k, v = draw(2, 4, 2, 3), draw(2, 2, 5, 3), draw(2, 2, 5, 3) * 2
    expected = slow_attend(q, k, v, lambda b, s, c: bool(mask[b, 0, s, c]))
    torch.testing.assert_close(attend(q, k, v, mask), expected, rtol=0, atol=1e-13)  # fp64


def test_mask_without_documents_is_causal():
    mask = visible_keys(torch.tensor([[2, 5]]), torch.tensor([[0, 2, 3, 5, 6]]), None, None)
    assert mask.int().tolist() == [[[[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]]]
    one_sided = visible_keys(torch.tensor([[2]]), torch.tensor([[0, 2]]), torch.tensor([[4]]), None)
    assert one_sided.int().tolist() == [[[[1, 1]]]]


def test_gradient():
    tensors = [t.requires_grad_() for t in (draw(1, 4, 3, 2), draw(1, 2, 3, 2), draw(1, 2, 3, 2) + 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, None), tensors)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_an_output_in_another_order_in_memory_is_taken(monkeypatch, kv_heads):
    """As the memory-efficient kernel of CUDA gives it: queries before heads."""
    q, k, v = draw(2, 4, 3, 8), draw(2, kv_heads, 5, 8), draw(2, kv_heads, 5, 8)
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    expected = attend(q, k, v, mask)
    original = torch.nn.functional.scaled_dot_product_attention

    def other_order(*args, **named):
        return original(*args, **named).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", other_order)
    assert torch.equal(attend(q, k, v, mask), expected)


@pytest.mark.parametrize("length", [2, 255, 256, 300])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("multiplies_faster", [False, True])
def test_bf16_computed_in_fp32_is_no_further_from_fp64(monkeypatch, length, is_masked, multiplies_faster):
    """Nor are its gradients, but for the rounding of one element: 2^-8."""
    monkeypatch.setattr(products, "_multiplies_bf16_faster", lambda: multiplies_faster)
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, heads, length, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    positions = torch.arange(length).unsqueeze(0)
    mask = visible_keys(positions, positions, None, None, window=17) if is_masked else None
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        tensors = [each.to(dtype).requires_grad_() for each in (q, k, v)]
        output = attend(*tensors, mask)
        assert output.dtype == dtype
        found[dtype] = [output, *torch.autograd.grad(output, tensors, torch.ones_like(output))]
    for ours, exact in zip(found[torch.bfloat16], found[torch.float64], strict=True):
        assert (ours.double() - exact).norm() <= 2.0**-8 * max(exact.norm(), 1.0)


def test_a_single_query_copies_no_cache(monkeypatch):
    """One step of decoding reads its keys and values as they are."""
    monkeypatch.setattr(products, "_multiplies_bf16_faster", lambda: False)
    q, k, v = (torch.randn(1, heads, length, 16).bfloat16() for heads, length in ((4, 1), (2, 64), (2, 64)))
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: pytest.fail(f"a copy of {tuple(tensor.shape)}"))
    assert attend(q, k, v, None).dtype == torch.bfloat16
