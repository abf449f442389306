"""Train a small MoE language model, load it again, and generate text with it.

    python examples/train_and_generate.py [RUN_DIR] [STEPS]

The same lines train on GPUs and on many ranks: start the script with torchrun, deepspeed, mpirun or srun. Run it twice
with more steps, and the second run goes on from the checkpoint of the first one.
"""

import sys
from pathlib import Path

import moe_train

CONFIG = Path(__file__).with_name("tiny.yaml")


def main(run_dir: str = "runs/train_and_generate", steps: str = "100") -> None:
    # The file has the model and the data. What differs from run to run is given here, one mapping per section.
    config = moe_train.load_config(CONFIG, train={"run_dir": run_dir, "steps": int(steps)})

    result = moe_train.run_training(config)
    if result.validation is not None and result.validation.bits_per_byte is not None:
        print(f"\nheld-out text: {result.validation.bits_per_byte:.3f} bits per byte")

    run = moe_train.load_run(run_dir)
    print(f"loaded {type(run.model).__name__} of step {run.step} from {result.checkpoint}")

    prompts = ["def main(", "import "]
    for prompt, text in zip(prompts, run.generate(*prompts, max_new_tokens=60, temperature=0.7, seed=1), strict=True):
        print(f"--- {prompt!r} goes on with {text!r}")

    # The model itself: logits of the next byte after a text. [1, S, V] -> the three most probable.
    mark = run.tokenizer.end_of_document
    ids = [[mark, *run.tokenizer.encode_known("for i in ran")]]
    probabilities, bytes_ = run.logits(ids)[0, -1].softmax(0).topk(3)
    for probability, byte in zip(probabilities.tolist(), bytes_.tolist(), strict=True):
        print(f"after 'for i in ran': {run.tokenizer.decode([byte])!r} with probability {probability:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
