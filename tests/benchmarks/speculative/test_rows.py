"""Rows and claims of the speculative benchmark, from figures that are worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import moe_train
from benchmarks.speculative.decode import Subject, Text, compare_in_fp64, first_difference
from benchmarks.speculative.formula import expected_speedup, expected_tokens
from benchmarks.speculative.rows import Difference, Measured, Setting, claims_of, result_row
from moe_train.data import ByteTokenizer
from moe_train.infer.draft import first_layers
from tests.model.small import small_config, small_model, tokens_of

# 100 plain steps of 20 ms; 40 rounds of 2 draft steps of 4 ms and a check of 24 ms.
PLAIN = Measured(2.0, 100, 100, 0, 0, 0.0, 2.0)
FAST = Measured(1.28, 100, 40, 75, 60, 0.32, 0.96)


def row_of(target="dense", draft="draft", temperature=0.0, fast=FAST):
    return result_row(Setting(target, draft, temperature, 2), [fast] * 3, [PLAIN] * 3)


def test_a_row():
    row = row_of()
    assert row.acceptance == 0.8 and row.tokens_per_round == 2.5
    assert row.expected_tokens == pytest.approx(1 + 0.8 + 0.64)
    assert (row.draft_cost, row.verify_cost) == (pytest.approx(0.2), pytest.approx(1.2))
    assert row.speedup == pytest.approx(2.0 / 1.28)
    assert row.formula == pytest.approx(2.44 / 1.6) and row.textbook == pytest.approx(2.44 / 1.4)


PARAMETERS = {"dense": 100_000_000, "draft": 25_000_000}
SAME = (0, 24)


def held(rows, differences=(), parameters=PARAMETERS, wide=SAME):
    return [claim["holds"] for claim in claims_of(rows, differences, 12, parameters, wide)]


def test_claims_hold_and_fail():
    rows = [row_of(), row_of("sparse"), row_of("sparse", "self:2", 0.7)]
    assert held(rows) == [True, True, True, True]
    slow = Measured(1.9, 100, 40, 75, 60, 0.32, 0.96)
    slower = [row_of(fast=slow), row_of("sparse", fast=slow)]
    part = [Difference(3, 1e-5), Difference(5, 2e-3)]
    assert held(slower, part, wide=(1, 24)) == [False, False, False, False]
    assert held(rows, part[:1])[2]  # a tie
    assert held(rows, wide=(0, 0)) == [True, True, True, False]  # nothing was compared


def test_a_small_target_does_not_show_the_speed():
    rows = [row_of(), row_of("sparse")]
    assert held(rows, parameters=PARAMETERS | {"dense": 99_999_999}) == [False, True, True, True]


def test_texts_in_fp64_are_counted_that_part(monkeypatch):
    shape = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "moe_every": 0, "init_std": 0.4}
    tokenizer = ByteTokenizer()
    model = moe_train.build_model(moe_train.load_config(None, model=shape), tokenizer.vocab_size).eval()
    run = SimpleNamespace(model=model, tokenizer=tokenizer)
    subject = Subject(run, {"self:2": (first_layers(model, 2), True)}, 8, 0)
    assert compare_in_fp64({"dense": subject}, 3) == (0, len(subject.prompts))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    original = Subject.decode

    def damaged(self, temperature, draft, draft_tokens):
        measured, texts = original(self, temperature, draft, draft_tokens)
        return measured, texts if draft is None else [replace(texts[0], tokens=(0,) * 8), *texts[1:]]

    monkeypatch.setattr(Subject, "decode", damaged)
    assert compare_in_fp64({"dense": subject}, 3) == (1, len(subject.prompts))


def test_the_first_difference_is_found_with_its_gap():
    model = small_model(small_config()).eval()
    assert first_difference(model, Text((1, 2), (3, 4, 5)), Text((1, 2), (3, 4, 5))) is None
    found = first_difference(model, Text((1, 2), (3, 4, 5)), Text((1, 2), (3, 7, 5)))
    with torch.no_grad():
        logits = model(tokens_of(torch.tensor([[1, 2, 3]]))).logits_BSV[0, -1]
    assert found == Difference(1, pytest.approx(abs(float(logits[4] - logits[7]))))


def test_expected_tokens_and_speed():
    for rate, number in ((0.0, 3), (0.5, 1), (0.8, 4)):
        assert expected_tokens(rate, number) == pytest.approx((1 - rate ** (number + 1)) / (1 - rate), rel=1e-14)
    assert expected_tokens(1.0, 4) == 5
    assert expected_speedup(0.8, 4, 0.1) == pytest.approx(expected_tokens(0.8, 4) / 1.4, rel=1e-14)
    assert expected_speedup(0.8, 4, 0.1, 1.6) == pytest.approx(expected_tokens(0.8, 4) / 2.0, rel=1e-14)
