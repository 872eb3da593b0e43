"""A sweep as read: the records of its trials in one frame, whatever became of them.

    trials = load_sweep("multirun/first").trials       # one row per trial
    history = load_sweep("multirun/first").history()   # one row per logged number

A trial that failed, still runs or is damaged has a row like any other, and a status
that says so. Scores on the test split are not in here: see `lowrank.sweeps.finalists`.
"""

import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lowrank.core.errors import BadInput, Corrupt
from lowrank.evaluate import tokens, values
from lowrank.evaluate.metrics import STANDARD
from lowrank.evaluate.stats import LEVEL
from lowrank.io.files import local_path, read_json
from lowrank.io.record import CONFIG, METRICS, RESULT, STATUS
from lowrank.io.view import RecordView, load_record
from lowrank.report.arms import arm_table
from lowrank.run.settings import SCIENTIFIC
from lowrank.sweeps.finalists import Score, best_arms, unseal
from lowrank.sweeps.rungs import RUNGS, Decision, decisions

#: What the launcher may leave in the directory: at least the trials it has planned.
PLAN = "sweep.json"
LOWER_IS_BETTER = (
    tokens.LOWER_IS_BETTER
    | values.LOWER_IS_BETTER
    | {m.name for m in STANDARD if not m.higher_is_better}
)
_FIRST = ("trial", "status", "reason", "best_step", "steps")
_VALIDATION = "validation/"
_OURS = (STATUS, CONFIG, METRICS, RESULT)
#: The settings, written before a trial has a record.
_MEANT = Path(".hydra", "config.yaml")
#: What is known of a trial: its record, why it has none, or what it is meant to be.
_View = RecordView | Corrupt | Mapping[str, Any]
#: Folders in which no trial is looked for, and records that a forced run moved aside.
_OTHERS = frozenset({"packs", RUNGS, "wandb", "tensorboard", "checkpoints", "figures"})
_ASIDE = re.compile(r"\.old-\d+$")
_log = logging.getLogger(__name__)


class Sweep:
    """The records below one directory.

    Attributes:
      directory: The absolute path.
      plan: The content of sweep.json, if there is one.
      trials: One row per trial: trial (its id), status, reason, best_step, steps;
        `best.<metric>`, the validation numbers of the state that was kept, and
        `last.<metric>`, those of the last validation; one dotted column per setting,
        where lists and patterns are JSON text; `costs.<name>`; `identity.<name>`, the
        fingerprints of base, data, code and config; and directory, relative to the
        sweep's. status is what the record says (running, done, failed, preempted, or
        cut: halving went on without it, so that its numbers are no final ones), or

        - "stopped": it says running, and its process is gone;
        - "damaged": a file of it cannot be trusted, and reason says which;
        - "planned": it has no record yet, only its settings in `.hydra`, or its name in
          sweep.json.
    """

    def __init__(self, directory: Path, views: Mapping[str, _View]):
        """For `load_sweep` only."""
        self.directory = directory
        self.plan = _read_plan(directory / PLAN)
        self._metrics: dict[str, pd.DataFrame] = {}
        self._configs: dict[str, dict[str, Any]] = {}
        rows = [self._row(name, view) for name, view in views.items()]
        known = {row["trial"] for row in rows}
        rows += [
            {"trial": trial, "status": "planned", "reason": None, "directory": None}
            for trial in _planned(self.plan)
            if trial not in known
        ]
        self.trials = _ordered(pd.DataFrame(rows))

    @cached_property
    def varied(self) -> list[str]:
        """Settings of the scientific part, beside seed, that differ between trials.

        A setting that some trials do not have, as `delta.rank` of delta=head, varies if
        those that have it differ.
        """
        seen: dict[str, set[Any]] = {}
        for config in self._configs.values():
            for name, value in config.items():
                seen.setdefault(name, set()).add((type(value) is bool, value))
        groups = {*SCIENTIFIC} - {"seed"}
        return [
            name
            for name, values in seen.items()
            if len(values) > 1 and name.partition(".")[0] in groups
        ]

    @cached_property
    def rungs(self) -> list[Decision]:
        """What halving has decided, see `lowrank.sweeps.rungs`; empty without it.

        Raises:
          Corrupt: A decision is damaged.
        """
        return decisions(self.directory)

    @property
    def metrics(self) -> list[str]:
        """Validation numbers that a trial has, such as accuracy."""
        columns = map(str, self.trials.columns)
        return [name[5:] for name in columns if name.startswith("best.")]

    @property
    def select(self) -> str:
        """The number by which every trial kept its best state, as `loop.select` says.

        Raises:
          BadInput: The trials disagree, so that one has to be named.
        """
        told = {config.get("loop.select") for config in self._configs.values()}
        chosen = sorted(str(name) for name in told if name is not None)
        if len(chosen) != 1:
            raise BadInput(
                f"the trials of {self.directory} kept their best states by "
                f"{' and '.join(chosen) or 'no number'}: say which one to rank by. "
                f"There are {', '.join(self.metrics) or 'none'}."
            )
        return chosen[0]

    def arms(self, by: str | None = None, level: float = LEVEL) -> pd.DataFrame:
        """One row per arm (trials that differ in their seed only), the best first.

        Args:
          by: The validation number that ranks; `select` if None.
          level: Confidence level of the intervals over seeds.

        Raises:
          UnknownName: No trial has such a number.
        """
        by = by or self.select
        return arm_table(
            self.trials,
            self.varied,
            f"best.{by}",
            higher_is_better=by not in LOWER_IS_BETTER,
            level=level,
        )

    def finalists(self, k: int = 1, by: str | None = None) -> pd.DataFrame:
        """The finished trials of the `k` best arms, chosen on validation alone.

        Args:
          k: How many arms.
          by: As in `arms`.

        Returns:
          Rows of `trials`, after the columns place and arm.

        Raises:
          BadInput: There are fewer arms with a finished trial.
        """
        by = by or self.select
        return best_arms(self.trials, self.arms(by), self.varied, f"best.{by}", k)

    def test(
        self, finalists: pd.DataFrame | Sequence[str], score: Score | None = None
    ) -> pd.DataFrame:
        """Test scores of the finalists, whose names are stored first and for good.

        See `lowrank.sweeps.finalists.unseal`.
        """
        return unseal(self.directory, self.trials, finalists, score)

    def history(self) -> pd.DataFrame:
        """What was logged, one row per number.

        Returns:
          Columns trial, step, time (seconds since 1970), name ("train/loss",
          "validation/accuracy"), value, and as keys for grouping seed and what varied.
          Numbers of the test split are left out.
        """
        parts = []
        for directory, frame in self._metrics.items():
            names = [n for n in frame if n not in ("step", "time")]
            names = [n for n in names if not str(n).startswith("test/")]
            part = frame.melt(["step", "time"], names, "name", "value")
            parts.append(part.dropna(subset="value").assign(directory=directory))
        columns = ["trial", "step", "time", "name", "value", "seed", *self.varied]
        if not parts:
            return pd.DataFrame(columns=columns)
        long = pd.concat(parts, ignore_index=True)
        keys = self.trials[["directory", "trial", "seed", *self.varied]]
        return long.merge(keys, on="directory", validate="many_to_one").reindex(
            columns=columns
        )

    def _row(self, name: str, view: _View) -> dict[str, Any]:
        row: dict[str, Any] = {"trial": Path(name).name, "directory": name}
        if isinstance(view, Corrupt):
            return row | {"status": "damaged", "reason": str(view)}
        if isinstance(view, Mapping):
            row |= {"status": "planned", "reason": None}
            return row | self._configs.setdefault(name, flatten(view))
        status = view.status
        row["trial"] = status["identity"].get("config", row["trial"])
        row |= {"status": status["status"], "reason": status.get("reason")}
        row |= {f"identity.{name}": mark for name, mark in status["identity"].items()}
        if row["status"] == "running" and _is_gone(status):
            row["status"] = "stopped"
            row["reason"] = "its process ended without a word; the same command resumes"
        damage = []
        for part in (self._settings, self._numbers, self._costs):
            try:
                row |= part(view, row)
            except Corrupt as error:
                damage.append(str(error))
        if damage:
            row |= {"status": "damaged", "reason": " ".join(damage)}
        return row

    def _settings(self, view: RecordView, row: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(view.config, Mapping):
            raise Corrupt(f"{view.directory / CONFIG} holds no settings")
        return self._configs.setdefault(row["directory"], flatten(view.config))

    def _costs(self, view: RecordView, row: Mapping[str, Any]) -> dict[str, Any]:
        costs = view.costs or {}
        scalars = {n: v for n, v in costs.items() if not isinstance(v, dict | list)}
        scalars.pop("version", None)
        return {f"costs.{name}": value for name, value in scalars.items()}

    def _numbers(self, view: RecordView, row: Mapping[str, Any]) -> dict[str, Any]:
        """Best and last validation numbers: of the result, or so far of the log."""
        metrics = view.metrics
        self._metrics[row["directory"]] = metrics
        names = [str(n) for n in metrics if str(n).startswith(_VALIDATION)]
        seen = metrics.dropna(subset=names, how="all") if names else metrics.iloc[:0]
        found: dict[str, Any] = {"steps": metrics["step"].max() if len(metrics) else 0}
        if len(seen):
            found |= _named("last", seen.iloc[-1], names)
            best = best_row(seen, row.get("loop.select"))
            if best is not None:
                found |= _named("best", best, names)
                found["best_step"] = best["step"]
        if view.result is not None:
            found["steps"] = view.result.get("steps", found["steps"])
            found["best_step"] = view.result.get("best_step", found.get("best_step"))
            judged = view.result.get("scores", {}).get("validation", {})
            for name, value in judged.get("metrics", {}).items():
                found[f"best.{name}"] = value["estimate"]
        return found


def load_sweep(directory: str | os.PathLike[str]) -> Sweep:
    """Reads the records below a directory, at any depth.

    Args:
      directory: Of the sweep. Folders called ``*.old-<n>``, which a forced run has
        moved aside, are left out.

    Raises:
      BadInput: It is no directory, is itself that of one run, or holds no trial.
    """
    path = local_path(directory)
    if not path.is_dir():
        raise BadInput(f"there is no sweep directory {path}")
    if (path / STATUS).exists():
        raise BadInput(
            f"{path} is the directory of one run, not of a sweep: read it with "
            "lowrank.io.load_record, or name the folder above it"
        )
    views = {
        folder.relative_to(path).as_posix(): _view(folder)
        for folder in _trial_folders(path)
    }
    sweep = Sweep(path, views)
    if not len(sweep.trials):
        raise BadInput(
            f"{path} holds no trial: none of its folders has a {STATUS}. Name the "
            "folder that the sweep was told to write to."
        )
    return sweep


def flatten(config: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Nested settings with dotted names; lists, and mappings of patterns, as JSON."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        own = f"{name}.{key}" if name else str(key)
        keys = value.keys() if isinstance(value, Mapping) else ()
        if isinstance(value, Mapping) and all(str(k).isidentifier() for k in keys):
            flat |= flatten(value, own)
        elif isinstance(value, Mapping | list):
            flat[own] = json.dumps(value)
        else:
            flat[own] = value
    return flat


def _trial_folders(path: Path) -> Iterator[Path]:
    """Folders below `path` in which a run began; none inside another one."""
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        if folder.name in _OTHERS or folder.name.startswith("."):
            continue
        if _ASIDE.search(folder.name):
            _log.info("left out %s, which a forced run has moved aside", folder)
        elif any(os.path.lexists(folder / name) for name in (*_OURS, _MEANT)):
            yield folder
        elif not folder.is_symlink():
            yield from _trial_folders(folder)


def _view(folder: Path) -> _View:
    try:
        if not any(os.path.lexists(folder / name) for name in _OURS):
            meant = yaml.safe_load((folder / _MEANT).read_bytes())
            return meant if isinstance(meant, Mapping) else {}
        return load_record(folder)
    except (OSError, yaml.YAMLError) as error:
        return Corrupt(f"{folder / _MEANT} cannot be read: {error}")
    except Corrupt as error:
        return error


def _is_gone(status: Mapping[str, Any]) -> bool:
    """Whether the process that says it runs does not; of another host, nobody knows.

    The lock would tell as well, but taking it, if only for a moment, could make the
    command fail that is just about to continue.
    """
    if status.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(status["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return True
    except PermissionError:
        pass
    return False


def best_row(seen: pd.DataFrame, select: str | None) -> pd.Series | None:
    """The row that training would have kept: the first of the best, in float32."""
    column = f"{_VALIDATION}{select}"
    if column not in seen:
        return None
    values = seen[column].to_numpy(np.float32)
    values = -values if select in LOWER_IS_BETTER else values
    return None if np.isnan(values).all() else seen.iloc[int(np.nanargmax(values))]


def _named(prefix: str, row: pd.Series, names: list[str]) -> dict[str, Any]:
    return {f"{prefix}.{name.removeprefix(_VALIDATION)}": row[name] for name in names}


def _read_plan(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        plan = read_json(path)
    except Corrupt as error:
        _log.warning("read without its plan: %s", error)
        return None
    return plan if isinstance(plan, dict) else None


def _planned(plan: Mapping[str, Any] | None) -> list[str]:
    """Ids of planned trials: a list, or a mapping by id, of ids or of {"trial": id}."""
    trials = (plan or {}).get("trials", [])
    listed = [t.get("trial") if isinstance(t, Mapping) else t for t in trials]
    return [trial for trial in listed if isinstance(trial, str)]


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns in a fixed order; `directory` last."""
    for name in (*_FIRST, "seed", "directory"):
        if name not in frame:
            frame[name] = None
    rank = {"best": 1, "last": 2, "costs": 4, "identity": 5}
    place = lambda name: (
        (0, _FIRST.index(name))
        if name in _FIRST
        else (6 if name == "directory" else rank.get(name.partition(".")[0], 3), 0)
    )
    return frame.reindex(columns=sorted(map(str, frame.columns), key=place))
