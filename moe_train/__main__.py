"""`python -m moe_train` is the command `moe-train`."""

import sys

from moe_train.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
