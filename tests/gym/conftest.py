"""The suite with the package reasoning-gym itself (make gym); it fails without it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
