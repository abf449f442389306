"""Show which experts the tokens of a text go to, and how even the load of the experts became in training.

    python examples/expert_load.py [RUN_DIR] [TEXT]

RUN_DIR is the folder of any run; train_and_generate.py makes the default one. `moe-train load RUN_DIR` shows more of
the second table.
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import moe_train

BARS = " ▁▂▃▄▅▆▇█"


def main(run_dir: str = "runs/train_and_generate", text: str = "def main(): return 42") -> None:
    console = Console()
    run = moe_train.load_run(run_dir)

    # A router is a module that returns a Routing: experts_TK, gates_TK and sums. Hooks see it without another model.
    chosen = []
    hooks = [
        router.register_forward_hook(lambda *call: chosen.append(call[-1].experts_TK)) for router in run.model.routers
    ]
    ids = run.tokenizer.encode_known(text)
    run.logits([ids])
    for hook in hooks:
        hook.remove()

    layers = run.config.model.moe_layer_indices
    table = Table("token", *(f"layer {layer}" for layer in layers), title="Experts of each token, the best first")
    for place, token in enumerate(ids):
        experts = [" ".join(map(str, experts_TK[place].tolist())) for experts_TK in chosen]
        table.add_row(repr(run.tokenizer.decode([token])), *experts)
    console.print(table)

    # metrics.jsonl has one JSON object per recorded step, with the tokens that each expert got in it.
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    table = Table(
        "step", *(f"layer {layer}" for layer in layers), title="Load of each expert in training (4: the mean)"
    )
    for record in records[:: max(1, len(records) // 10)]:
        table.add_row(str(record["step"]), *(bars(record[f"moe/counts/layer_{layer:02d}"]) for layer in layers))
    console.print(table)


def bars(counts: list[int]) -> str:
    """One bar per expert; a bar of half height is the mean."""
    mean = sum(counts) / len(counts)
    return "".join(BARS[min(8, round(4 * count / mean))] for count in counts)


if __name__ == "__main__":
    main(*sys.argv[1:])
