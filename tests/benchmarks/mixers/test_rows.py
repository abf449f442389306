"""What the runs with each mixer come to, and the control whose mixers give zero."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moe_train
from benchmarks.mixers.report import draw_chart, markdown_report
from benchmarks.mixers.rows import (
    ATTENTION,
    CONFIG,
    CONTROL,
    FULL,
    HYBRIDS,
    MIXERS,
    PARTS,
    TRAINED,
    Run,
    RunResult,
    Size,
    difference,
    mean_curve,
    quality_claims,
    results_in,
    runs_of,
    sections_of,
)
from benchmarks.runner.results import describe_machine
from moe_train.config.registry import _outside, load_part
from moe_train.model.transformer import Tokens, Transformer

HYBRID = HYBRIDS[0]
VOCAB_SIZE = 50
SIZE = Size(60, 4, "bytes")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The zeroed mixer is found as that of an installed package is."""
    monkeypatch.setattr(sys, "path", [str(PARTS), *sys.path])
    _outside.cache_clear()
    yield
    _outside.cache_clear()
    load_part.cache_clear()


def results(hybrid: list[float], control: list[float]) -> list[RunResult]:
    both = ((HYBRID, hybrid), (CONTROL, control))
    return [RunResult(v.name, seed, ((512, 3.0), (1024, end))) for v, ends in both for seed, end in enumerate(ends)]


def test_differences_are_paired_by_seed() -> None:
    found = difference(results([2.0, 2.5, 3.1], [2.1, 2.6, 3.3, 9.0]), HYBRID, CONTROL)
    assert found is not None and found.seeds == 3  # the fourth seed has no hybrid
    assert found.mean == pytest.approx(-0.4 / 3)
    assert found.standard_error == pytest.approx(0.1 / 3)  # of -0.1, -0.1, -0.2
    assert difference(results([2.0], [2.1]), HYBRID, CONTROL) is None
    assert difference(results([2.0, 2.1], [2.1, 2.2]), HYBRID, ATTENTION) is None


@pytest.mark.parametrize(
    ("hybrid", "holds"),
    [
        ([2.0, 2.5, 3.1], True),  # four standard errors
        ([2.05, 2.55, 3.1], False),  # two
        ([2.2, 2.7, 3.5], False),  # worse by four
    ],
)
def test_a_hybrid_must_beat_its_control_by_three_standard_errors(hybrid: list[float], holds: bool) -> None:
    (claim,) = quality_claims(results(hybrid, [2.1, 2.6, 3.3]))
    assert claim["holds"] is holds and HYBRID.name in claim["claim"]


def test_every_mixer_is_trained_alone_and_in_a_hybrid_with_every_seed() -> None:
    runs = runs_of(range(3), SIZE)
    assert len(runs) == len(set(runs)) == 3 * (2 + 2 * len(MIXERS)) == 3 * len(TRAINED)
    assert {run.variant.mixers[-1] for run in runs if run.variant.is_hybrid} == {"attention"}
    assert len({run.path(Path("f")) for run in runs}) == len(runs)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("variant", TRAINED, ids=lambda variant: variant.name)
def test_every_run_has_a_configuration(variant, tmp_path: Path) -> None:
    config = moe_train.load_config(CONFIG, **sections_of(Run(variant, 1, SIZE), tmp_path))
    assert config.model.mixers == variant.mixers and config.model.num_layers % len(variant.mixers) == 0
    assert config.optim.learning_rate == pytest.approx(3e-3) and config.optim.warmup_steps == 10
    full = moe_train.load_config(CONFIG, **sections_of(Run(variant, 1, FULL), tmp_path))
    usual = moe_train.load_config(CONFIG)
    assert full.optim == usual.optim and full.train.steps == usual.train.steps
    assert full.data.tokenizer == usual.data.tokenizer and full.train.global_batch_size == usual.train.global_batch_size
    moe_train.build_model(config, VOCAB_SIZE)  # checks the settings of every part


def test_runs_are_read_only_when_they_have_ended(tmp_path: Path) -> None:
    ended, open_ = runs_of([0], SIZE)[:2]
    for run in (ended, open_):
        run.path(tmp_path).mkdir()
        records = [{"step": 10, "val/bits_per_byte": 3.5}, {"step": 11, "train/tokens": 2816}]  # val alone, train alone
        records.append({"step": 20, "train/tokens": 5120, "val/bits_per_byte": 3.25})
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (run.path(tmp_path) / "metrics.jsonl").write_text(lines)
    (ended.path(tmp_path) / "summary.json").write_text("{}")
    (found,) = results_in(tmp_path, [ended, open_])
    assert found == RunResult(ended.variant.name, 0, ((2560, 3.5), (5120, 3.25))) and found.bits_per_byte == 3.25


def test_the_curve_is_the_mean_of_the_seeds() -> None:
    assert mean_curve(results([2.0, 2.5], []), HYBRID) == ([512, 1024], [3.0, 2.25])
    assert mean_curve([], HYBRID) == ([], [])


@pytest.mark.usefixtures("parts")
def test_with_zero_all_hybrids_are_the_same_model() -> None:
    ids_BS = torch.randint(VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
    found = {}
    for name in MIXERS:
        model = zeroed_hybrid(name)
        logits_BSV = model(Tokens(ids_BS, torch.arange(2))).logits_BSV
        logits_BSV.logsumexp(-1).sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if ".inner." not in key}
        inside = [p.grad for key, p in model.named_parameters() if ".inner." in key]
        assert inside and all(grad is None or not grad.any() for grad in inside)
        found[name] = logits_BSV, gradients
    logits, gradients = found.pop("rwkv4")
    for other_logits, other_gradients in found.values():
        assert torch.equal(other_logits, logits) and other_gradients.keys() == gradients.keys()
        assert all(torch.equal(other_gradients[key], gradients[key]) for key in gradients)


def zeroed_hybrid(of: str) -> Transformer:
    shape = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "moe_layers": [], "num_layers": 4}
    sections = {"model": {**shape, "mixers": CONTROL.mixers, "zeroed": {"of": of}}}
    return moe_train.build_model(moe_train.load_config(None, **sections), VOCAB_SIZE)


def test_a_report_of_runs_alone_says_what_holds_and_what_does_not() -> None:
    pytest.importorskip("matplotlib")
    runs = results([2.0, 2.5, 3.1], [2.1, 2.6, 3.3])
    figures = {"machine": describe_machine(threads=1), "size": SIZE, "num_runs": 36, "claims": quality_claims(runs)}
    page = markdown_report(runs, [], [], figures)
    assert "- holds: ttt_linear x 3" in page and "(30,720 in all), seeds 0, 1, 2;" in page
    assert "6 of 36 runs have ended" in page
    assert "| -0.1333 ± 0.0333 |" in page and "Recall" not in page and "Speed" not in page
    assert draw_chart(runs, []).startswith(b"\x89PNG")
