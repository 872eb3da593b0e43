"""What a trained pack is worth: scores, costs and the result of each trial."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank.core.arrays import Dials, Trained
from lowrank.core.errors import NonFinite
from lowrank.core.trees import fingerprint
from lowrank.io.record import Record
from lowrank.run.answering import Answering
from lowrank.run.costs import Ledgers
from lowrank.run.fit import Fit
from lowrank.run.language import LanguageProblem
from lowrank.run.prepare import PreparedPack
from lowrank.run.problem import Scored
from lowrank.run.saying import Said
from lowrank.sharding.processes import within_reach


class Results:
    """The results of a pack's trials; what they share is computed once."""

    def __init__(
        self,
        prepared: PreparedPack,
        fitted: Fit,
        alive: Callable[[str], None] = lambda doing: None,
    ):
        """Begins without any result.

        Args:
          prepared: The trials.
          fitted: What became of them.
          alive: Told of every batch; see `train.watchdog.Watchdog.alive`.
        """
        self._alive = alive
        self._prepared = prepared
        self._fitted = fitted
        self._ledgers = Ledgers(prepared.batches, fitted)
        self._scored: dict[str, Sequence[Scored]] = {}
        self._answers: dict[str, Sequence[Said]] = {}
        self._known: Sequence[Scored] | None = None

    def trees(self, trial: int) -> tuple[Trained, Dials]:
        """A trial's chosen tree and its dials, as it would have them alone."""
        fitted = self._fitted
        own = within_reach((fitted.trained(trial), fitted.dials(trial)))
        return self._prepared.variants.own(trial, *own)

    def judge(self, trial: int, record: Record) -> dict[str, Any]:
        """Scores a trial, saves predictions and costs, puts its result together.

        Raises:
          NonFinite: Training ended with numbers that were not finite, or the trained
            model gives some.
        """
        fitted, prepared = self._fitted, self._prepared.trials[trial]
        ended = fitted.ended[trial]
        if ended and ended["failed"]:
            raise NonFinite(ended["why"])
        settings, problem = prepared.settings, prepared.problem
        wanted = settings.evaluate
        options = {"resamples": wanted.resamples, "level": wanted.level}
        scores = {}
        for name in judged(problem.rows):
            sealed = name != "validation" and not settings.evaluate.test
            if not sealed:
                scored = self._score(name)[trial]
                ids = np.asarray(problem.ids(name))
                arrays, found = scored.arrays(), scored.report(**options)
                if isinstance(problem, Answering) and settings.evaluate.answers:
                    said = self._said(problem, name)[trial]
                    arrays["answer"] = np.asarray(said.texts)
                    if (own := problem.verified(name, said)) is not None:
                        arrays["verified"] = np.asarray(own)
                    found["metrics"] |= problem.compared(name, said, **options)
                record.save_predictions(name, id=ids, **arrays)
                scores[name] = found
        if isinstance(problem, LanguageProblem) and (kept := self._kept(problem)):
            scores["known"] = kept[trial].report(**options)
        costs = self._ledgers.of(prepared, *self.trees(trial))
        if fitted.pack is None and (earlier := record.read_json("costs.json")):
            # Training ended before this process began: its clock knows nothing of it.
            costs = earlier
        record.write_json("costs.json", costs)
        state = fitted.state
        row = lambda tree: jax.tree.map(lambda x: x[trial : trial + 1], tree)
        own = lambda tree: within_reach(row(tree))
        return {
            "trial": settings.trial_id,
            "base": {
                "name": prepared.base.name,
                "fingerprint": prepared.base.fingerprint,
            },
            "data": {
                "name": problem.name,
                "fingerprint": problem.fingerprint,
                **problem.facts,
                "rows": dict(problem.rows),
                "checks": problem.checks,
                "provenance": problem.provenance,
            },
            "scores": scores,
            "steps": ended["step"] if ended else int(state.step),
            "stopped_early": ended["why"] if ended else None,
            "best_step": int(state.best_step[trial]) if fitted.validated else None,
            "skipped_steps": int(state.skipped[trial]),
            "costs": costs,
            "state": fingerprint(
                own({"trained": state.trained, "opt": state.opt, "key": state.key})
            ),
        }

    def _score(self, name: str) -> Sequence[Scored]:
        """What every trial makes of a split, from one pass over it."""
        if name not in self._scored:
            first = self._prepared.trials[0]
            self._scored[name] = first.problem.score(
                name, self._predict, first.settings.run.progress
            )
        return self._scored[name]

    def _kept(self, problem: LanguageProblem) -> Sequence[Scored] | None:
        """How much of what the base knew every trial has kept."""
        if self._known is None and problem.known is not None:
            self._known = problem.kept(self._predict)
        return self._known

    def _predict(self, batch: Mapping[str, Any]) -> Any:
        self._alive("scoring")
        fitted = self._fitted
        return fitted.forward(fitted.chosen, fitted.state.dials, batch)

    def _said(self, problem: Answering, name: str) -> Sequence[Said]:
        """What every trial answers to the questions of a split."""
        if name not in self._answers:
            fitted, wanted = self._fitted, self._prepared.trials[0].settings.evaluate
            assert wanted.answers is not None
            # The keys of all trials are held at once.
            together = max(wanted.batch_size // len(fitted.ended), 1)
            self._answers[name] = problem.speaker(
                name,
                wanted.answers,
                together,
                choose=wanted.choose(),
                progress=self._prepared.trials[0].settings.run.progress,
                alive=lambda: self._alive("answering"),
            ).unmerged(fitted.adapted, fitted.frozen, fitted.chosen, fitted.state.dials)
        return self._answers[name]


def judged(splits: Iterable[str]) -> list[str]:
    """The splits that nothing is trained on, validation and test before all others."""
    first = [name for name in ("validation", "test") if name in splits]
    return [*first, *(name for name in splits if name not in ("train", *first))]


def flat_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The scores as flat numbers, for trackers."""
    found = {}
    for split, metrics in result["scores"].items():
        for name, value in metrics["metrics"].items():
            if value["estimate"] is not None:
                found[f"{split}/{name}"] = value["estimate"]
    return found
