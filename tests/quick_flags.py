"""XLA's flags that make programs cheap to compile: `python tests/quick_flags.py`.

Prints those that the installed XLA knows: it ends the process at any other one.
"""

import os
import subprocess
import sys

FLAGS = (
    # Machine code is not optimized, and written operation by operation: half of the
    # time of all tests was compilation of programs that run once or twice.
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
)
_PROBE = "import jax; jax.devices('cpu')"


def known(flag: str) -> bool:
    """Whether XLA starts with this flag."""
    tried = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env={**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        check=False,
    )
    return tried.returncode == 0


if __name__ == "__main__":
    print(*filter(known, FLAGS))
