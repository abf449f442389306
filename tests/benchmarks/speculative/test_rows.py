"""Rows and claims of the speculative benchmark, from figures that are worked out by hand."""

import pytest
import torch

from benchmarks.speculative.decode import Text, first_difference
from benchmarks.speculative.rows import Difference, Measured, Setting, claims_of, result_row
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


def test_claims_hold_and_fail():
    parameters = {"dense": 100, "draft": 25}
    rows = [row_of(), row_of("sparse"), row_of("sparse", "self:2", 0.7)]
    assert [claim["holds"] for claim in claims_of(rows, [], 12, parameters)] == [True, True, True]
    slow = Measured(1.9, 100, 40, 75, 60, 0.32, 0.96)
    slower = [row_of(fast=slow), row_of("sparse", fast=slow)]
    part = [Difference(3, 1e-5), Difference(5, 2e-3)]
    assert [claim["holds"] for claim in claims_of(slower, part, 12, parameters)] == [False, False, False]
    assert claims_of(rows, part[:1], 12, parameters)[2]["holds"]  # a tie


def test_the_first_difference_is_found_with_its_gap():
    model = small_model(small_config()).eval()
    assert first_difference(model, Text((1, 2), (3, 4, 5)), Text((1, 2), (3, 4, 5))) is None
    found = first_difference(model, Text((1, 2), (3, 4, 5)), Text((1, 2), (3, 7, 5)))
    with torch.no_grad():
        logits = model(tokens_of(torch.tensor([[1, 2, 3]]))).logits_BSV[0, -1]
    assert found == Difference(1, pytest.approx(abs(float(logits[4] - logits[7]))))
