"""A rank for test_launchers.py: joins the world, adds up the ranks, and prints one JSON line.

With the argument fail-1, rank 1 ends with exit code 3 after the discovery, while the others wait for it.
"""

import json
import os
import sys
from dataclasses import asdict

from moe_train.config.errors import EXIT_USAGE, UsageError
from moe_train.distributed.bootstrap import (
    choose_device,
    discover_world,
    init_process_group,
    leave_process_group,
    set_threads,
)

EXPORTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


def main() -> int:
    try:
        world = discover_world()
    except UsageError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    torch_was_needed = "torch" in sys.modules
    device = choose_device("cpu", world)
    threads = set_threads("auto", world)
    if "fail-1" in sys.argv and world.rank == 1:
        return 3
    init_process_group(world, device, timeout_seconds=30)

    import torch
    import torch.distributed as dist

    total = torch.tensor(world.rank + 1)
    dist.all_reduce(total)
    record = {
        "world": asdict(world),
        "found_again": asdict(discover_world()),
        "sum": int(total),
        "backend": dist.get_backend(),
        "threads": threads,
        "torch_was_needed": torch_was_needed,
        "exported": {name: os.environ.get(name) for name in EXPORTED},
    }
    sys.stdout.write(json.dumps(record) + "\n")  # in one piece: the ranks share the stream
    sys.stdout.flush()
    dist.barrier()
    leave_process_group(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
