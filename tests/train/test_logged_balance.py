"""What is logged about balance is that of the whole step: held against a loop over its tokens, one process, in fp64."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moe_train.checkpoint.manifest import read_manifest
from moe_train.config.load import load_config
from moe_train.data import prepare_data
from moe_train.infer.loading import load_weights
from moe_train.model.build import build_model
from moe_train.model.moe.routers.base import expert_keys
from moe_train.model.moe.routers.noisy_topk import NoisyTopKRouter
from moe_train.ops.keyed_random import normal
from moe_train.train.batches import BatchPlan, micro_batches
from moe_train.train.progress import Progress
from tests.train.runs import SMALL, records, train_forked

CPU = torch.device("cpu")
BATCH, EXPERTS = 8, 4
WEIGHTS = {"importance_cv2_coef": 2.0, "load_cv2_coef": 4.0, "switch_aux_coef": 0.125}  # exact in binary
OPTIONS = (
    *SMALL,
    *(f"--model.moe.{name}={value}" for name, value in WEIGHTS.items()),
    "--data.source=synthetic",
    "--optim.learning_rate=1e-2",
    "--optim.router_lr_factor=1",  # so that an imbalance is there at the third step
    f"--train.global_batch_size={BATCH}",
    "--train.steps=3",
    "--checkpoint.every=2",
    "--telemetry.tensorboard=false",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of two ranks with two micro-batches; the second is saved."""
    folder = tmp_path_factory.mktemp("run")
    options = [option for option in OPTIONS if "validation_max_bytes" not in option]
    result = train_forked(2, *options, "--data.validation_fraction=0", f"--train.run_dir={folder}")
    assert result.returncode == 0, result
    return folder


def sums_by_token(router: NoisyTopKRouter, x_TD: torch.Tensor, keys_T: torch.Tensor) -> dict[str, list[float]]:
    """Importance, load, counts and probability of each expert, added up token by token (equations 3-9)."""
    found = {name: [0.0] * EXPERTS for name in ("importance", "load", "counts", "probability")}
    for x_D, key in zip(x_TD, keys_T, strict=True):
        clean = router.gate(x_D[None])[0].tolist()
        deviation = (F.softplus(router.noise(x_D[None]))[0] + router.noise_epsilon).tolist()
        draws = normal(expert_keys(key[None], router.layer_key, EXPERTS))[0].tolist()
        noisy = [c + d * s for c, d, s in zip(clean, draws, deviation, strict=True)]
        order = sorted(range(EXPERTS), key=lambda e: -noisy[e])
        chosen = order[:2]
        total = sum(math.exp(noisy[e]) for e in chosen)
        for expert in range(EXPERTS):
            others = sorted((noisy[e] for e in range(EXPERTS) if e != expert), reverse=True)
            boundary = others[1]  # K = 2: the second largest of the others
            z = (clean[expert] - boundary) / deviation[expert]
            found["load"][expert] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
            found["probability"][expert] += math.exp(clean[expert]) / sum(map(math.exp, clean))
            if expert in chosen:
                found["importance"][expert] += math.exp(noisy[expert]) / total
                found["counts"][expert] += 1
    return found


def cv2(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def step_by_loop(folder: Path, done: int) -> tuple[dict[str, float], float]:
    """Figures of the step after `done` steps, and its loss, from the weights before it and all its tokens."""
    options = [option for option in OPTIONS if "validation_max_bytes" not in option]
    config = load_config([*options, "--data.validation_fraction=0", "--train.run_dir=unused"], program="t")
    manifest = read_manifest(folder / "checkpoints" / f"step_{done:08d}")
    vocab_size = manifest.shapes["embedding.weight"][0]
    model = build_model(config.model, vocab_size, seed=config.train.seed).train()
    (router,) = model.routers
    load_weights(model, manifest, dtype=torch.float64, device=CPU)
    seen = []
    router.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    length = config.train.sequence_length
    data = prepare_data(config.data, sequence_length=length, seed=config.train.seed, min_sequences=BATCH).train
    batch = micro_batches(data, BatchPlan(BATCH, BATCH, 0, 1), Progress(done, done * BATCH), None, CPU)
    ((tokens, targets_BS),) = batch
    with torch.no_grad():
        logits_BSV = model(tokens).logits_BSV
        entropy = float(F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten()))
        x_TD, keys_T = seen[0][:2]
        assert len(x_TD) == BATCH * length
        sums = sums_by_token(router, x_TD, keys_T)
    figures = {"moe/importance_cv2": cv2(sums["importance"]), "moe/load_cv2": cv2(sums["load"])}
    shares = [count / (2 * len(x_TD)) for count in sums["counts"]]
    switch = EXPERTS * sum(f * p / len(x_TD) for f, p in zip(shares, sums["probability"], strict=True))
    terms = (*figures.values(), switch)
    return figures, entropy + sum(w * term for w, term in zip(WEIGHTS.values(), terms, strict=True))


def test_logged_figures_and_loss_are_those_of_all_tokens_of_the_step(run: Path) -> None:
    figures, loss = step_by_loop(run, done=2)
    logged = records(run)[2]
    assert logged["step"] == 3
    for (name, value), weight in zip(figures.items(), WEIGHTS.values()):
        assert logged[name] == pytest.approx(value, rel=1e-4), name  # fp32 in training
        assert weight * value > 2e-5 * loss  # so that a tenth of it is felt in the loss below
    assert logged["train/loss"] == pytest.approx(loss, rel=1e-6)
    assert logged["train/loss"] - logged["train/cross_entropy"] > 0.1
