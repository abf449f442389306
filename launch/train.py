"""What `deepspeed`, `torchrun`, `mpirun` and `srun` start: one process per device.

deepspeed launch/train.py --config configs/quickstart.yaml [--section.field value ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a checkout that is not installed

from moe_train.cli.main import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:], "train.py"))
