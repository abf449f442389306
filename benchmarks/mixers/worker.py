"""A process of the mixers benchmark that trains runs after one another.

python -m benchmarks.mixers.worker FOLDER --steps N --sequences N --tokenizer NAME SEED/VARIANT ...
"""

import argparse
import sys
from pathlib import Path

import moe_train
from benchmarks.mixers.rows import CONFIG, TRAINED, Run, Size, sections_of


def main() -> None:
    """Train every run that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("runs", nargs="+")
    options = parser.parse_args()
    size = Size(options.steps, options.sequences, options.tokenizer)
    variants = {variant.name: variant for variant in TRAINED}
    for word in options.runs:
        seed, _, name = word.partition("/")
        run = Run(variants[name], int(seed), size)
        result = moe_train.run_training(moe_train.load_config(CONFIG, **sections_of(run, options.folder)))
        if result.stopped is not None:  # a signal is for all runs
            sys.exit(f"{word}: stopped by {result.stopped}")


if __name__ == "__main__":
    main()
