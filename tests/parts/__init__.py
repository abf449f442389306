"""A part of each kind, as a package outside would write it: one file each, and a line in the package's entry points.

The folder is also an installed package, as Python sees it: `moe_train_test_parts-1.0.dist-info` names the parts. It is
found where `tests/parts` is on the path.
"""

import os
from pathlib import Path

FOLDER = Path(__file__).parent
PATH = {"PYTHONPATH": os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])}
"""The environment of a process that is to find the parts."""
