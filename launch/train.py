"""What `deepspeed`, `torchrun`, `mpirun` and `srun` start: one process a device.

deepspeed launch/train.py --config configs/quickstart.yaml [--section.field value ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a checkout that is not installed

from moe_train.cli.main import run_command
from moe_train.cli.train import run

if __name__ == "__main__":
    sys.exit(run_command(lambda arguments: run(arguments, "train.py"), sys.argv[1:], "train.py"))
