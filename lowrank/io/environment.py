"""What a run ran on and with: the part of a record that no config says."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lowrank.core.secrets import REDACTED, is_secret_name, redact_text

#: The sources of this package.
PACKAGE = Path(__file__).parents[1]
_PACKAGES = (
    "lowrank",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "array_record",
    "grain",
    "hydra-core",
    "wandb",
    "numpy",
    "jaxtyping",
    "beartype",
    "safetensors",
    "tokenizers",
    "pyarrow",
    "pandas",
    "scikit-learn",
)
_GIT_SECONDS = 10
_FLAGS = (
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
)


def describe_environment(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Versions, machine, devices, source revision and the redacted command line.

    Args:
      argv: The command line; that of this process if left out.
    """
    return {
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "num_cpus": os.cpu_count(),
        "backend": jax.default_backend(),
        "num_processes": jax.process_count(),
        "devices": [
            f"{one.platform}:{one.id} {one.device_kind}" for one in jax.devices()
        ],
        "flags": {name: os.environ[name] for name in _FLAGS if name in os.environ},
        "git": describe_source(Path(__file__).resolve().parent),
        "command": redact_command(sys.argv if argv is None else argv),
    }


def describe_source(directory: Path) -> dict[str, Any] | None:
    """Commit of the git work tree that holds `directory`, and a hash of what differs.

    Returns:
      None outside a work tree or without git. `dirty` is None if nothing differs, else
      a sha256 over the changes of tracked files and the content of untracked ones.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    root = _git(directory, "rev-parse", "--show-toplevel")
    if commit is None or root is None:
        return None
    top = Path(os.fsdecode(root.strip()))
    changes = _git(top, "diff", "HEAD", "--no-ext-diff", "--binary")
    others = _git(top, "ls-files", "--others", "--exclude-standard", "-z")
    if changes is None or others is None:
        return {"commit": commit.decode().strip(), "dirty": "unknown"}
    digest = hashlib.sha256(changes)
    for name in filter(None, others.split(b"\0")):
        digest.update(b"\0" + name + b"\0")
        path = top / os.fsdecode(name)
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    dirty = digest.hexdigest() if changes or others else None
    return {"commit": commit.decode().strip(), "dirty": dirty}


def code_fingerprint(folder: Path = PACKAGE) -> str:
    """sha256 over the source files of this package."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(
            str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes()
        )
    return digest.hexdigest()


def redact_command(argv: Sequence[str]) -> list[str]:
    """`argv` without secrets, be they written ``--token=x`` or ``--token x``."""
    safe, hide = [], False
    for word in argv:
        name = re.match(r"-{1,2}([A-Za-z][\w.\-]*)$", word)
        safe.append(REDACTED if hide and name is None else redact_text(word))
        hide = name is not None and is_secret_name(name[1])
    return safe


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(directory: Path, *command: str) -> bytes | None:
    try:
        return subprocess.run(
            ["git", "-C", os.fspath(directory), *command],
            capture_output=True,
            check=True,
            timeout=_GIT_SECONDS,
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
