"""The suite with libtpu (make rehearsals); it fails without it."""

import sys
from pathlib import Path

# What makes small configs belongs to the tests of runs.
sys.path.append(str(Path(__file__).parents[1] / "run"))
sys.path.append(str(Path(__file__).parents[1]))
