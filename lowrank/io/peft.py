"""Adapters as Hugging Face PEFT folders: written for PEFT to open, read with suspicion.

Layout of PEFT 0.21: `adapter_model.safetensors` holds ``lora_A`` (r, d_in) and
``lora_B`` (d_out, r) per module and whole weights under their own names;
`adapter_config.json` holds ranks and alphas (see `peft_config`), and `lowrank.json` our
own facts, which PEFT would warn about in its config.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lowrank.core.errors import BadInput, Corrupt
from lowrank.io.adapter import Adapter, Correction
from lowrank.io.files import (
    cannot_write,
    jsonable,
    unfinished_folder,
    write_atomically,
)
from lowrank.io.peft_config import check_options, config_of, rank_and_scale
from lowrank.io.safetensors import FLOATS, MAX_TENSORS, read_json
from lowrank.io.seals import read_sealed, write_sealed

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NOTES = "lowrank.json"
PREFIX = "base_model.model."
#: Version of lowrank.json.
SCHEMA = 1
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")


def write_adapter(
    directory: str | Path,
    adapter: Adapter,
    *,
    base: str,
    card: str,
    task_type: str | None = None,
    dropout: float = 0.0,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a PEFT folder; an adapter that was there is replaced by a whole one.

    Args:
      directory: The folder.
      adapter: What to write; at least one correction.
      base: Name of the base, for `base_model_name_or_path`.
      card: Text of README.md.
      task_type: PEFT's, such as "SEQ_CLS"; None for a model that PEFT does not know.
      dropout: Rate on the input of the corrections, which PEFT resumes with.
      notes: Our own facts (base fingerprint, classes, ...), kept in lowrank.json.

    Raises:
      BadInput: There is nothing to write, a value is not finite, or `directory` holds
        something else than an adapter.
      CannotWrite: The file system refused; an adapter that was there still is.
    """
    directory = Path(directory).absolute()
    if not adapter.corrections:
        raise BadInput(
            "an adapter needs a correction of rank 1 or more; every gate of this run "
            "is zero, so its merged weights are the base's"
        )
    if directory.exists() and not _replaceable(directory):
        raise BadInput(
            f"{directory} exists and is no adapter, so it is not replaced; choose "
            "another folder"
        )
    tensors = _tensors(adapter)
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise BadInput(
                f"{name} holds values that are not finite in float32; nothing is "
                "written. The run diverged: take an earlier state."
            )
    weights = save(tensors, {"format": "pt"})
    settings = config_of(adapter, base, task_type, dropout)
    written = json.dumps(jsonable(settings, CONFIG), indent=2, allow_nan=False) + "\n"
    facts = {
        **(notes or {}),
        "schema": SCHEMA,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "config_sha256": hashlib.sha256(written.encode()).hexdigest(),
    }
    scratch = None
    try:
        scratch = unfinished_folder(directory)
        fresh = scratch / "new"
        write_atomically(fresh / MODEL, lambda file: file.write(weights))
        write_atomically(fresh / CONFIG, lambda file: file.write(written.encode()))
        write_sealed(fresh / NOTES, facts)
        write_atomically(fresh / "README.md", lambda file: file.write(card.encode()))
        _replace(fresh, directory, scratch / "old")
    except OSError as error:
        raise cannot_write(directory, error) from error
    finally:
        # Were the old adapter still in there, it would be the only one.
        if scratch and (directory.exists() or not (scratch / "old").exists()):
            shutil.rmtree(scratch, ignore_errors=True)


def _replaceable(directory: Path) -> bool:
    """Whether a folder is an adapter or empty: nothing else is ever removed."""
    if not directory.is_dir():
        return False
    return (directory / CONFIG).is_file() or not any(directory.iterdir())


def _replace(fresh: Path, directory: Path, aside: Path) -> None:
    if directory.exists():
        directory.rename(aside)
    try:
        fresh.rename(directory)
    except OSError:
        if aside.exists():
            aside.rename(directory)
        raise


def _tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    found = {}
    for module, one in adapter.corrections.items():
        kind, end = ("embedding_", "") if one.table else ("", ".weight")
        found[f"{PREFIX}{module}.lora_{kind}A{end}"] = one.a
        found[f"{PREFIX}{module}.lora_{kind}B{end}"] = one.b.T
    found |= {PREFIX + tensor: array for tensor, array in adapter.whole.items()}
    with np.errstate(over="ignore"):
        return {n: np.ascontiguousarray(a, np.float32) for n, a in found.items()}


def read_adapter(
    directory: str | Path, *, base_fingerprint: str | None = None
) -> Adapter:
    """Reads a PEFT LoRA folder, ours or another's.

    Args:
      directory: The folder.
      base_fingerprint: Of the base it is for; compared where the folder names one.

    Raises:
      BadInput: A file is missing, damaged or not safetensors, an option changes the
        function in a way that is not computed here, a shape does not fit the config,
        a value is not finite, or the adapter was made for another base.
    """
    directory = Path(directory)
    if not (directory / MODEL).is_file():
        raise BadInput(
            f"{directory} has no {MODEL}; only safetensors adapters are read, since "
            "pickled ones (.bin, .pt) can run code: convert them with the safetensors "
            "package"
        )
    if not (directory / CONFIG).is_file():
        raise BadInput(f"{directory} has no {CONFIG}, which holds ranks and alphas")
    config = read_json(directory / CONFIG)
    check_options(config, directory / CONFIG)
    notes = _check_notes(directory, base_fingerprint)
    whole: dict[str, np.ndarray] = {}
    halves: dict[tuple[str, bool], dict[str, np.ndarray]] = {}
    for name, array in _read_tensors(directory / MODEL).items():
        found = _FACTOR.fullmatch(name)
        if found:
            own = halves.setdefault((found[1], found[3] is not None), {})
            own[found[2] or found[3]] = array
        else:
            whole[name] = array
    _check_names([module for module, _ in halves], whole, config, directory)
    corrections = {
        module: _correction(module, table, pair, config, directory)
        for (module, table), pair in halves.items()
    }
    return Adapter(corrections, whole, bool(config.get("use_rslora")), config, notes)


def _check_notes(directory: Path, base_fingerprint: str | None) -> dict[str, Any]:
    """Compares what lowrank.json says, where there is one: a folder of ours."""
    if not (directory / NOTES).exists():
        return {}
    notes = read_json(directory / NOTES)
    if notes.get("schema") != SCHEMA:
        raise BadInput(
            f"{directory / NOTES} has schema {notes.get('schema')!r}; this version "
            f"reads {SCHEMA}"
        )
    try:
        read_sealed(directory / NOTES)
    except Corrupt as error:
        raise BadInput(f"{error} Or remove {NOTES} if you changed it.") from None
    for name, field in ((MODEL, "weights_sha256"), (CONFIG, "config_sha256")):
        actual = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        if notes.get(field) == actual:
            continue
        raise BadInput(
            f"{directory / name} is not the file that {NOTES} was written with; get "
            f"the folder again, or remove {NOTES} if you changed it yourself"
        )
    made_for = notes.get("base_fingerprint")
    if base_fingerprint and made_for and made_for != base_fingerprint:
        raise BadInput(
            f"{directory} was made for the base {str(made_for)[:12]}, not for "
            f"{base_fingerprint[:12]}; give the base it was trained on"
        )
    return notes


def _check_names(
    modules: list[str],
    whole: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    directory: Path,
) -> None:
    """Config and weights name the same modules."""
    covers = lambda names, module: any(
        module == name or module.endswith("." + name) for name in names
    )
    if not modules:
        raise BadInput(f"{directory / MODEL} holds no LoRA factors")
    if twice := {module for module in modules if modules.count(module) > 1}:
        raise BadInput(f"{directory / MODEL} corrects {min(twice)} in two ways")
    targets = config.get("target_modules")
    for module in modules:
        if isinstance(targets, list) and not covers(targets, module):
            raise BadInput(
                f"{directory} holds factors of {module}, which its target_modules "
                f"{targets} do not name; file and {CONFIG} do not belong together"
            )
    kept = config.get("modules_to_save") or []
    for name in whole:
        if not covers(kept, name.rpartition(".")[0]):
            raise BadInput(
                f"{directory} holds {name}, which is neither a LoRA factor nor one of "
                f"modules_to_save {kept}"
            )


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise BadInput(f"{path} names more than {MAX_TENSORS} tensors; refused")
            for name in names:
                short = name.removeprefix(PREFIX)
                if short == name or not _NAME.fullmatch(short):
                    raise BadInput(
                        f"{path} holds a tensor with the odd name {name[:80]!r}"
                    )
                if (dtype := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise BadInput(
                        f"{name} in {path} is {dtype}; a factor is one of "
                        f"{', '.join(FLOATS)}"
                    )
                array = file.get_tensor(name).astype(np.float32)
                if not np.isfinite(array).all():
                    raise BadInput(f"{name} in {path} is not finite everywhere")
                found[short] = array
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {error}; get it again") from error
    return found


def _correction(
    module: str,
    table: bool,
    pair: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    directory: Path,
) -> Correction:
    rank, scale = rank_and_scale(config, module, directory / CONFIG)
    if set(pair) != {"A", "B"}:
        raise BadInput(f"{directory}: {module} has only factor {', '.join(pair)}")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank:
        raise BadInput(
            f"{directory}: {module} has factors {a.shape} and {b.shape}, but {CONFIG} "
            f"says (rank, d_in) and (d_out, rank) with rank {rank}"
        )
    return Correction(a, b.T.copy(), scale, table)
