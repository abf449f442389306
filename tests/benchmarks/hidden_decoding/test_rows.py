"""Rows and claims of the hidden_decoding benchmark, from figures that are worked out by hand."""

import math

import pytest

from benchmarks.hidden_decoding import run
from benchmarks.hidden_decoding.report import draw_chart, markdown_report
from benchmarks.hidden_decoding.rows import (
    CSWA,
    PHD,
    PLAIN,
    ROWS,
    SWA,
    Copies,
    Timing,
    Trained,
    claims_of,
    paired_difference,
)
from benchmarks.runner.results import describe_machine
from moe_train.config.model import HiddenCopiesConfig

LENGTH = 1024
FLOPS = 1e6


def times(**ratios: float) -> dict[Copies, Timing]:
    """Times of all rows: those of plain, but for the rows that are named."""
    named = {"phd": PHD, "swa": SWA, "cswa": CSWA}
    return dict.fromkeys(ROWS, Timing(0.1, 1.0)) | {named[name]: Timing(0.1 * x, x) for name, x in ratios.items()}


def trained(row_losses: tuple[float, ...], plain_losses: tuple[float, ...]) -> dict[Copies, Trained]:
    def of(losses: tuple[float, ...]) -> Trained:
        return Trained(losses, ((100, 4.0), (200, 3.0)), FLOPS)

    return dict.fromkeys(ROWS, of(row_losses)) | {PLAIN: of(plain_losses)}


GOOD = {
    "attention": times(phd=2.1, swa=2.2, cswa=2.3),
    "prefill": times(cswa=1.15),
    "decode": times(cswa=1.25),
    "extra_bytes": dict.fromkeys(ROWS, (64, 64)),
    "trained": trained((2.9, 3.0, 3.1), (3.0, 3.1, 3.25)),
    "length": LENGTH,
}


def held(**changes) -> list[bool]:
    return [claim["holds"] for claim in claims_of(**(GOOD | changes))]


def test_claims_hold_at_their_bounds() -> None:
    assert held() == [True] * 5


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (0, {"attention": times(phd=2.1, swa=2.31, cswa=2.0)}),  # the worst of the three
        (1, {"decode": times(cswa=1.26)}),
        (2, {"prefill": times(cswa=1.16)}),
        (3, {"extra_bytes": dict.fromkeys(ROWS, (64, 64)) | {SWA: (65, 64)}}),
        (4, {"trained": trained((3.1, 3.2, 3.35), (3.0, 3.1, 3.25))}),  # worse by the same with every seed
    ],
    ids=["attention", "decode", "prefill", "bytes", "loss"],
)
def test_each_claim_fails_alone(number: int, changes) -> None:
    assert held(**changes) == [each != number for each in range(5)]


def test_what_was_not_measured_is_not_claimed() -> None:
    assert len(claims_of(**(GOOD | {"length": LENGTH - 1}))) == 4  # hidden positions are much of a short prompt
    assert len(claims_of(**(GOOD | {"trained": {}}))) == 4


def test_losses_are_paired_by_seed() -> None:
    row, plain = trained((2.9, 3.0, 3.1), (3.0, 3.1, 3.25))[PHD], trained((), (3.0, 3.1, 3.25))[PLAIN]
    mean, error = paired_difference(row, plain)
    assert mean == pytest.approx(-0.35 / 3) and error == pytest.approx(0.05 / 3)  # of -0.1, -0.1, -0.15
    assert paired_difference(trained((2.9,), (3.0,))[PHD], trained((2.9,), (3.0,))[PLAIN])[1] == math.inf


def test_the_rows_are_settings_of_a_model() -> None:
    assert [row.name for row in (PLAIN, PHD, SWA, CSWA)] == ["plain", "PHD 2", "PHD-SWA 2-16", "PHD-CSWA 2-16-32"]
    for row in ROWS:
        assert HiddenCopiesConfig.model_validate(row.settings).copies == row.copies
    assert len({row.name for row in ROWS}) == len(ROWS) and ROWS[0] == PLAIN


def test_the_report_says_what_holds_and_what_does_not() -> None:
    pytest.importorskip("matplotlib")
    changed = GOOD | {"decode": times(cswa=1.26)}
    timings = {name: changed[name] for name in ("attention", "prefill", "decode")}
    sizes = {"attention_length": 2048, "length": LENGTH, "hidden_size": 1024, "rounds": 9, "num_layers": 4}
    figures = {"machine": describe_machine(threads=1), **sizes, "steps": 400, "seeds": 3}
    page = markdown_report(ROWS, timings, dict.fromkeys(ROWS, 2**20), GOOD["trained"], claims_of(**changed), figures)
    assert page.count("- holds: ") == 4 and page.count("- DOES NOT HOLD: a token is decoded in 1.26 x") == 1
    assert draw_chart(ROWS, timings, GOOD["trained"]).startswith(b"\x89PNG")


@pytest.mark.parametrize(("ratio", "code"), [(1.0, 0), (1.3, 1)])
def test_the_exit_code_says_whether_all_claims_hold(monkeypatch, tmp_path, capsys, ratio: float, code: int) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run.torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(run, "measure_attention", lambda *_: times())
    sizes = {row: run._ring_bytes(row, run.DecodePlan(128, 1, LENGTH, 4, 9)) for row in ROWS}
    monkeypatch.setattr(run, "measure_decoding", lambda *_: (times(), times(cswa=ratio), sizes))
    options = ["--skip-training", f"--output={tmp_path}", "--hidden-size=128", "--num-layers=1"]
    assert run.main(options) == code
    assert (tmp_path / "hidden_decoding.md").read_text().count("DOES NOT HOLD") == code
