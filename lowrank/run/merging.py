"""A finished run as one model: corrections added to the base, for transformers alone.

Only what a class of transformers computes from the folder by itself is written. Where a
head pools as none of them does, the adapter and its card are what there is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core.errors import BadInput
from lowrank.core.spec import refuse_targets, spec
from lowrank.io import vit
from lowrank.io.bert import BERT, family_of
from lowrank.io.folders import check_free, write_model
from lowrank.io.language import Language
from lowrank.io.sources import locate
from lowrank.models.encoder import EncoderSpec
from lowrank.models.vision import VisionSpec
from lowrank.run.judge import Where
from lowrank.run.pictured import TASK_POOLING
from lowrank.run.settings import check_groups, load_plugins, plain
from lowrank.run.stored import Run, load_run

_KEYS = ("run", "merged", "plugins")
_VISION = {"vit": "ViTForImageClassification", "dinov2": "Dinov2ForImageClassification"}
_CARD = """---
base_model: {base}
license: {license}
---

# {name}

{base} with the corrections of a lowrank run, `{name}`, added to its weights: trained on
{task}. It opens with `transformers.{opens}` and needs nothing else.

* Weights of the base: {fingerprint}
* License of the base: {license}
"""


@spec
class Merged:
    """Where the model goes.

    Attributes:
      directory: A new folder, or an empty one.
    """

    directory: str


def merge_run(config: Mapping[str, Any]) -> Path:
    """Writes a stored run as a whole model.

    Args:
      config: Composed from `conf/merge.yaml`: run.directory and merged.directory.

    Returns:
      The folder.

    Raises:
      BadInput: There is no finished run, transformers has no such model, or the folder
        has something in it.
    """
    refuse_targets(config)
    check_groups(config, _KEYS)
    load_plugins(config.get("plugins"))
    where = plain(Where, config.get("run"), "run")
    out = plain(Merged, config.get("merged"), "merged")
    # Before a base is loaded for nothing.
    check_free(Path(out.directory).absolute())
    return write_merged(load_run(where.directory, cache=where.cache), out.directory)


def write_merged(run: Run, directory: str | Path) -> Path:
    """Writes the model W + s b^T a of every corrected weight, and the head, as float32.

    Numbers that a run was taught in units of their spread come out in their own unit:
    mean and scale go into the head.

    Args:
      run: From `load_run`.
      directory: A new folder, or an empty one.

    Raises:
      BadInput: No class of transformers computes what the run does, or the folder has
        something in it.
      CannotWrite: The file system refused; nothing is there then.
    """
    directory = Path(directory).absolute()
    check_free(directory)
    task_model = task_model_of(run)
    settings, base = run.settings, run.base
    params = run.adapted.merge(run.adapted.frozen(), run.trained, run.dials)
    config = dict(base.hf_config or {})
    if task_model is not None:
        config["architectures"] = [task_model]
    tensors: Mapping[str, np.ndarray]
    if isinstance(base, Language):
        tensors = base.family.to_hf(params, prefix=None)
        opens = "AutoModelForCausalLM"
    elif isinstance(base.spec, VisionSpec):
        family = vit.KINDS[config["model_type"]]
        tensors = vit.tensors_of(family, params, base.spec)
        config |= _labels(run.classes)
        opens = "AutoModelForImageClassification"
    else:
        config |= _labels(run.classes)
        if settings.data.kind == "values":
            params = {**params, "head": in_its_unit(params["head"], run.facts)}
            config |= {"problem_type": "regression", **_labels(["LABEL_0"])}
        tensors = BERT.to_hf(params)
        opens = "AutoModelForSequenceClassification"
    return write_model(
        directory,
        tensors,
        config,
        locate(settings.base.source, settings.run.cache)[0],
        card=_CARD.format(
            name=settings.trial_id,
            base=settings.base.source,
            task=run.facts["name"],
            license=base.provenance.get("license", "not stated"),
            fingerprint=base.fingerprint,
            opens=opens,
        ),
    )


def task_model_of(run: Run) -> str | None:
    """The class of transformers that computes what a run does.

    Returns:
      None where the base's own config says it.

    Raises:
      BadInput: There is none, and what to do instead.
    """
    base, settings = run.base, run.settings
    if isinstance(base, Language):
        return None
    where = f"{run.record.directory} is no model of transformers: "
    instead = "; its adapter's README.md says how it is opened with PEFT"
    pooling, shape = settings.base.pooling, base.spec
    if isinstance(shape, VisionSpec):
        kind = str((base.hf_config or {})["model_type"])
        if pooling != TASK_POOLING[kind]:
            raise BadInput(
                f"{where}{_VISION[kind]} has base.pooling={TASK_POOLING[kind]}, and "
                f"the run has {pooling!r}{instead}"
            )
        if (side := run.facts["images"]["side"]) != shape.image_size:
            raise BadInput(
                f"{where}it reads images of {side} x {side} pixels, and a folder says "
                f"that its base reads {shape.image_size}{instead}"
            )
        return _VISION[kind]
    if not isinstance(shape, EncoderSpec):
        raise BadInput(f"{where}the base {base.name!r} is code of your own")
    if pooling != "pooler" or family_of(base.hf_config or {}, base.name) is not BERT:
        raise BadInput(
            f"{where}BertForSequenceClassification has base.pooling=pooler, and the "
            f"run has {pooling!r} of {base.name}{instead}"
        )
    return "BertForSequenceClassification"


def _labels(names: Sequence[str]) -> dict[str, Any]:
    """How a config names the classes."""
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def in_its_unit(head: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The head of z = (y - mean) / scale as that of y."""
    scale, mean = facts["scale"], facts["mean"]
    return {"kernel": head["kernel"] * scale, "bias": head["bias"] * scale + mean}
