"""Train the model in a loop of your own, with torch's AdamW: no engine, no DeepSpeed, no run folder.

    python examples/own_training_loop.py [STEPS]

The model is an ordinary nn.Module that holds all experts. It returns logits and, for each MoE layer, sums over the
tokens, of which the balance losses are made. Use `run_training` instead for several ranks, checkpoints and telemetry.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import moe_train
from moe_train.model.moe.balance.build import make_balance_terms
from moe_train.model.objective import TrainingObjective
from moe_train.model.step_size import StepSize
from moe_train.model.transformer import Tokens

CONFIG = Path(__file__).with_name("tiny.yaml")
BATCH = 16


def main(steps: str = "100") -> None:
    config = moe_train.load_config(CONFIG)
    data = moe_train.open_data(config)
    model = moe_train.build_model(config, data.tokenizer.vocab_size)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(model.routers)} MoE layers")

    # The model, and the losses that the configuration asks for: cross-entropy and balance terms.
    objective = TrainingObjective(model, make_balance_terms(config.model.moe), balance_group=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.learning_rate, betas=(0.9, 0.95))

    for step in range(int(steps)):
        # Sequences are numbered from 0 without an end. The numbers key the order of the data and all routing noise.
        numbers = np.arange(step * BATCH, (step + 1) * BATCH)
        sequences = torch.from_numpy(data.train.batch(numbers))  # [B, S + 1]
        tokens = Tokens(sequences[:, :-1], torch.from_numpy(numbers), step)

        size = StepSize.of_one_part(tokens.ids_BS.numel())  # the step is one micro-batch of one process
        losses = objective(tokens, sequences[:, 1:], size)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        objective.after_step(losses.sums, step, size, skipped=False)  # balance losses look at the last step's load

        if (step + 1) % 10 == 0:
            counts_E = losses.sums.counts.sum(0)  # tokens per expert, (L, E) -> (E)
            busiest = counts_E.max() / counts_E.float().mean()
            print(f"step {step + 1:4d}  cross-entropy {losses.cross_entropy:.3f}  busiest expert {busiest:.2f} x mean")


if __name__ == "__main__":
    main(*sys.argv[1:])
