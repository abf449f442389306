"""The page of the truth benchmark: who keeps the numbers where, and one row for failures of one kind."""

from benchmarks.train.rows import OURS
from benchmarks.truth.cases import AUTOEP, HF
from benchmarks.truth.report import failures, markdown_report, verdict_line
from benchmarks.truth.rows import FAILED, NOT_OFFERED, OTHER, SAME, Verdict, claims_of

AVERAGED = ("gradient norm", "weights")
VERDICTS = [
    Verdict(OURS, "2x2z1a1", "plain", SAME, 1e-7, 2e-7, 3e-7),
    Verdict(OURS, "2x2z0a1", "plain", NOT_OFFERED, reason="no ZeRO 0"),
    Verdict(OURS, "2x2z1a1-2x1z3a1", "plain", SAME, 1e-7, 5e-6, 3e-7),
    Verdict(AUTOEP, "2x2z1a1", "plain", SAME, 1e-7, 2e-7, 3e-7),
    Verdict(AUTOEP, "2x2z0a1", "plain", OTHER, 1e-5, 6e-2, 2e-3, AVERAGED),
    Verdict(AUTOEP, "4x2z0a2", "plain", OTHER, 1e-5, 7e-2, 2e-3, AVERAGED),
    Verdict(AUTOEP, "2x2z1a1-2x1z3a1", "plain", FAILED, reason="AssertionError: a | b"),
    Verdict(HF, "2x2z1a1", "plain", NOT_OFFERED, reason="no expert parallelism"),
]


def test_cells_count_what_is_offered() -> None:
    page = markdown_report(VERDICTS, claims_of(VERDICTS), ["On a machine."])
    assert "|  | moe_train | DeepSpeed AutoEP | Hugging Face under ZeRO |" in page
    assert "| layouts, cross-entropy | 1 of 1 | 1 of 3 | not offered |" in page
    assert "| ZeRO 0 | not offered | 0 of 2 | - |" in page
    assert "| saved and gone on in another layout | 1 of 1 | 0 of 1 | - |" in page
    assert "| largest difference, gradient norm | 5.0e-06 | 2.0e-07 | - |" in page  # of what is the same
    assert "- moe_train: no ZeRO 0" in page and "- Hugging Face under ZeRO: no expert parallelism" in page
    assert "with the balance loss" not in page  # nothing of it was run
    assert "- holds: moe_train keeps its numbers in 2 of 2 cases." in page


def test_failures_of_one_kind_are_one_row_with_a_command() -> None:
    averaged, crashed = failures(VERDICTS)
    assert averaged[2] == "2: 2x2z0a1, 4x2z0a2" and "issues/8475" in averaged[4]
    assert averaged[3] == "gradient norm by up to 7.0e-02, weights by up to 2.0e-03"
    assert averaged[5] == "`python -m benchmarks.truth --systems hf_autoep --terms plain --cases 2x2z0a1`"
    assert crashed[3] == "failed: AssertionError: a \\| b" and crashed[4] == "unknown"


def test_a_line_tells_figures_or_the_reason() -> None:
    assert verdict_line(VERDICTS[0]).endswith("same: loss 1.0e-07, gradient norm 2.0e-07, weights 3.0e-07")
    assert verdict_line(VERDICTS[1]).endswith("not offered: no ZeRO 0")
