"""torchrun with the exit code of the first rank that failed; torchrun itself returns 1 for every failure."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A rank that a signal killed has a negative exit code.
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)
