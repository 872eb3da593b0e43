"""A composed config, turned into checked objects: what one trial is.

The *scientific part* of a config (what is adapted, how, on which data, from which
seed) gives the trial its id; where it runs and who watches it do not.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lowrank.adapt.rules import AnyRule
from lowrank.core.errors import BadInput, UnknownName, nearest
from lowrank.core.spec import (
    build,
    check_fields,
    digest,
    fields_of,
    refuse_targets,
    spec,
    without_later,
)
from lowrank.data.buckets import Batching
from lowrank.data.pictures import Pictures
from lowrank.data.sequences import Sequences
from lowrank.data.tasks import CATALOGUE as DATA
from lowrank.run.delta_group import make_rules
from lowrank.run.evaluation import LANGUAGE as LANGUAGE
from lowrank.run.evaluation import Evaluation as Evaluation
from lowrank.run.evaluation import check_evaluation as check_evaluation
from lowrank.run.profile import Profile
from lowrank.run.ranks_group import Ranks, chosen, filled
from lowrank.run.sweep import Halving, SweepSpec
from lowrank.sharding.mesh import MeshSpec
from lowrank.sharding.processes import Processes
from lowrank.track.trackers import Track
from lowrank.train.guard import NonFinitePolicy
from lowrank.train.loop import LoopSpec
from lowrank.train.optim import CATALOGUE as OPTIMIZERS
from lowrank.train.optim import AdamW
from lowrank.train.penalties import Penalties

#: Version of the trial id; raised when the meaning of a setting changes.
TRIAL_VERSION = 2
SCIENTIFIC = (
    "base",
    "data",
    "delta",
    "optim",
    "penalty",
    "ranks",
    "loop",
    "non_finite",
    "evaluate",
    "seed",
)
ASIDE = ("mesh", "processes", "track", "run", "plugins", "sweep", "profile")
#: Fields of scientific groups that change no result: a rehearsal that was stopped on
#: purpose is continued by the same command without the stop.
#: Ranks count, not where they were taken from.
NOT_IN_ID = {"loop": ("stop_after",), "base": ("name",), "ranks": ("from",)}


#: How rows become batches, by the `kind` of the data.
BATCHINGS: Mapping[str, type] = {
    "classes": Batching,
    "values": Batching,
    "answers": Sequences,
    "choices": Sequences,
    "text": Sequences,
    "images": Pictures,
}


@spec
class BaseSpec:
    """Which base, and how it is built.

    Attributes:
      name: What reports call it.
      source: `pypi:package==version`, a folder, a hub id, or `python:module:function`.
      pooling: How token vectors become one: "mean", "cls" or "pooler"; how those of an
        image do: "mean" over patches, "cls", or "both" side by side.
      scan: Whether layers are one scanned stack (compiles faster) or unrolled.
      remat: What the backward pass recomputes: "none", "dots" or "full".
      dtype: Compute dtype; weights stay float32.
      max_length: Longest input in tokens; the base's own limit if None.
    """

    name: str = "base"
    source: str
    pooling: Literal["mean", "cls", "pooler", "both"] = "mean"
    scan: bool = True
    remat: Literal["none", "full", "dots"] = "none"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    max_length: int | None = None


@spec
class RunSpec:
    """Where a run lives and what becomes of what is already there.

    Attributes:
      root: Parent of the run directories; None: `runs`, and of a packed sweep the
        sweep's own directory.
      directory: The run directory itself; `root/<trial id>` if None.
      force: Take a directory that another base, data, code or config has written; its
        content is moved aside. A run of the same identity is continued all the same,
        so that a preempted command may be given again as it stands.
      preview: Print sites, ranks, parameters, FLOPs and memory, and stop.
      cache: Folder for bases and prepared data; the user's cache if None.
      progress: Progress bar on a terminal.
      hang_seconds: After so long without a step the stacks of all threads are shown
        and the process ends with 76; None: never.
      pause_seconds: The same for compiling, restoring, evaluating and saving.
    """

    root: str | None = None
    directory: str | None = None
    force: bool = False
    preview: bool = False
    cache: str | None = None
    progress: bool = True
    hang_seconds: float | None = 1800.0
    pause_seconds: float | None = 7200.0

    def __post_init__(self) -> None:
        for name in ("hang_seconds", "pause_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"run.{name} must be positive, or null, not {value}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """One trial, checked."""

    base: BaseSpec
    data: Any
    batching: Batching | Sequences | Pictures
    delta: Mapping[str, Any]
    optim: AdamW
    penalty: Penalties
    ranks: Ranks
    loop: LoopSpec
    non_finite: NonFinitePolicy
    evaluate: Evaluation
    mesh: MeshSpec
    processes: Processes
    track: Track
    profile: Profile
    run: RunSpec
    sweep: SweepSpec
    seed: int
    config: Mapping[str, Any]

    @property
    def trial_id(self) -> str:
        """Twelve hexadecimal digits of a hash over the scientific part."""
        part = {name: _told(name, self.config[name]) for name in SCIENTIFIC}
        if self.ranks.usual:
            # Named as it was before there were others.
            del part["ranks"]
        return digest({"version": TRIAL_VERSION, **part}, 12)

    @property
    def ref_rank(self) -> int | None:
        """Divisor of every scale: the usual rank, which `delta.ranks` do not change."""
        return self.delta.get("rank")

    @property
    def start(self) -> str | None:
        """The earlier adapter that corrections start from."""
        return self.delta.get("start")

    def rules(self, head: str | None) -> list[AnyRule]:
        """The rules that the delta group stands for, given the head's pattern."""
        return make_rules(self.delta, head, self.ranks)


def read(config: Mapping[str, Any]) -> Settings:
    """Checks a resolved config and builds what it names.

    Raises:
      BadInput: A key is unknown or missing, a value does not fit, or a `_target_`
        occurs anywhere.
    """
    refuse_targets(config)
    config = {**config, "ranks": filled(config.get("ranks"))}
    known = (*SCIENTIFIC, *ASIDE)
    check_groups(config, known)
    load_plugins(config.get("plugins"))
    data = dict(_group(config, "data"))
    batching = data.pop("batching", None)
    seed = config.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise BadInput(f"seed must be a whole number from 0 to 2**31 - 1, not {seed!r}")
    source = build(data, DATA, "data")
    _check_kind(source, data["name"])
    settings = Settings(
        base=plain(BaseSpec, _group(config, "base"), "base"),
        data=source,
        batching=plain(BATCHINGS[source.kind], batching, "data.batching"),
        delta=_group(config, "delta"),
        optim=build(_group(config, "optim"), OPTIMIZERS, "optim"),
        penalty=plain(Penalties, config.get("penalty"), "penalty"),
        ranks=chosen(config["ranks"]),
        loop=plain(LoopSpec, config.get("loop"), "loop"),
        non_finite=plain(NonFinitePolicy, config.get("non_finite"), "non_finite"),
        evaluate=plain(Evaluation, config.get("evaluate"), "evaluate"),
        mesh=plain(MeshSpec, config.get("mesh"), "mesh"),
        processes=plain(Processes, config.get("processes"), "processes"),
        track=plain(Track, config.get("track"), "track"),
        profile=plain(Profile, config.get("profile"), "profile"),
        run=plain(RunSpec, config.get("run"), "run"),
        sweep=_sweep(config.get("sweep")),
        seed=seed,
        config={key: config.get(key) for key in known},
    )
    encoded = source.kind not in LANGUAGE
    settings.rules("head/**" if encoded else None)
    check_evaluation(settings.evaluate, source.kind)
    if settings.optim.label_smoothing and source.kind not in ("classes", "images"):
        raise BadInput(
            f"optim.label_smoothing = {settings.optim.label_smoothing:g} smooths "
            f"classes, and data={data['name']} has {source.kind}: set it to 0"
        )
    if settings.start is not None:
        _check_start(settings)
    if settings.track.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise BadInput(
            "track.tensorboard=true needs the package tensorboardX: install "
            "lowrank[tensorboard], or set it to false"
        )
    if not settings.ranks.usual and settings.delta["name"] in ("head", "full"):
        raise BadInput(
            f"ranks={config['ranks']['name']} chooses ranks of corrections, and delta="
            f"{settings.delta['name']} makes none: set ranks=uniform"
        )
    if settings.penalty.named and settings.delta["name"] in ("head", "full"):
        raise BadInput(
            f"penalty.{settings.penalty.named[0]} weighs corrections, and delta="
            f"{settings.delta['name']} makes none: set penalty=none"
        )
    if settings.optim.b_ratio != 1 and settings.delta["name"] in ("head", "full"):
        raise BadInput(
            f"optim.b_ratio = {settings.optim.b_ratio:g} is for the factors of a "
            f"correction, and delta={settings.delta['name']} makes none: leave it at 1"
        )
    if settings.batching.batch_size % settings.optim.accumulate:
        raise BadInput(
            f"optim.accumulate = {settings.optim.accumulate} does not divide "
            f"data.batching.batch_size = {settings.batching.batch_size}"
        )
    return settings


def _check_kind(source: Any, name: str) -> None:
    if getattr(source, "kind", None) not in BATCHINGS:
        raise BadInput(
            f"data={name} is of the kind {getattr(source, 'kind', None)!r}: the class "
            f"{type(source).__name__} must say in `kind` which of "
            f"{', '.join(BATCHINGS)} it gives"
        )


def _check_start(settings: Settings) -> None:
    if not isinstance(settings.start, str) or not settings.start:
        raise BadInput(
            "delta.start names the folder of an adapter or of a finished run, not "
            f"{settings.start!r}"
        )
    if settings.delta["name"] != "lora" or settings.ranks.move:
        raise BadInput(
            f"delta.start = {settings.start!r} goes with LoRA at ranks that stay: set "
            "delta=lora and ranks=uniform or given"
        )


def _sweep(group: Any) -> SweepSpec:
    halving = group.get("halving") if isinstance(group, Mapping) else None
    if halving is not None:
        halving = plain(Halving, halving, "sweep.halving")
        group = {**group, "halving": halving}
    return plain(SweepSpec, group, "sweep")


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = config.get(name)
    if not isinstance(group, Mapping):
        raise BadInput(f"config group {name!r} is missing: choose one with {name}=NAME")
    return group


def _told(name: str, group: Any) -> Any:
    """A group without the fields that do not count for the trial's id."""
    left_out = NOT_IN_ID.get(name, ())
    if not isinstance(group, Mapping):
        return group
    told = {key: value for key, value in group.items() if key not in left_out}
    if name == "ranks":
        told.setdefault("max_rank", None)
        for later in ("bounds", "tied"):
            if told.get(later) is None:
                told.pop(later, None)
        if told.get("basis") == "own":
            # Named as it was before there was another.
            del told["basis"]
        if "bounds" in told:
            # Their order decides, as it does of `delta.ranks`.
            told["bounds"] = [list(pair) for pair in told["bounds"].items()]
    if name == "data" and told.get("pair") is None:
        # Named as it was before there were pairs.
        told.pop("pair", None)
    if name == "evaluate":
        # Rows that are looked at together: who lowers it for lack of memory after
        # training goes on with the same trial.
        told["batch_size"] = Evaluation.batch_size
        # Named as it was before models said anything.
        for later in ("answers", "known", "temperature", "top_k", "top_p"):
            if told.get(later) is None:
                told.pop(later, None)
    if name == "optim":
        told = without_later(told, OPTIMIZERS[told["name"]])
    if name == "delta":
        # Their order decides, and a hash of a mapping does not know it.
        ranks = told.pop("ranks", None)
        if told.get("start") is None:
            # Named as it was before there were others.
            told.pop("start", None)
        told |= {"ranks": [list(pair) for pair in ranks.items()]} if ranks else {}
    return told


def check_groups(config: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuses keys at the top of a config that mean nothing.

    Raises:
      UnknownName: A key is not in `known`.
    """
    for key in config:
        if key not in known:
            raise UnknownName(
                f"config has no group {key!r}. Nearest: {nearest(str(key), known)}."
            )


def plain(cls: type, fields: Any, where: str) -> Any:
    """Builds a group that has no catalogue, fields only; None means the defaults.

    Raises:
      BadInput: It is no group, or a field is unknown or does not fit.
    """
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise BadInput(
            f"{where} is a group of fields ({', '.join(fields_of(cls))}), not "
            f"{fields!r}"
        )
    try:
        check_fields(cls, fields)
        return cls(**fields)
    except BadInput as error:
        raise type(error)(f"{where}: {error}") from None


def load_plugins(modules: Any) -> None:
    """Imports the packages that a command line names, so that they can register.

    Raises:
      BadInput: It is no list of names, or one of them cannot be imported.
    """
    modules = [] if modules is None else modules
    if isinstance(modules, str) or not all(isinstance(m, str) for m in modules):
        raise BadInput(f"plugins is a list of packages, as [one,two], not {modules!r}")
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, ValueError) as error:
            raise BadInput(
                f"plugins: cannot import {module!r} ({error}); install it, or run from "
                "the folder it is in"
            ) from error
