"""A language model taught to say meanings: python -m experiments.data_to_text

The base answers the questions of the test split, is adapted to those of the train
split, and answers again: loss on the right answers and BLEU of its own, before, after
and the difference, with intervals that resample whole meanings. The best of the states
by validation loss is kept; the adapter is a folder for PEFT, and the merged model one
for transformers, if it is asked for.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lowrank.adapt.attach import attach
from lowrank.adapt.rules import Rule
from lowrank.core.errors import BadInput
from lowrank.core.spec import check_fields, refuse_targets, spec
from lowrank.data.answers import Answers
from lowrank.data.packing import one_by_one, packed
from lowrank.data.questions import RnnlgData
from lowrank.data.sequences import SequencePipeline, eval_rows
from lowrank.deltas.lora import LoRA
from lowrank.evaluate import texts
from lowrank.evaluate.tokens import TokenSums, score_tokens
from lowrank.io.adapter import collect
from lowrank.io.files import write_json_atomically
from lowrank.io.folders import check_free, write_model
from lowrank.io.language import load
from lowrank.io.peft import write_adapter
from lowrank.io.sources import locate
from lowrank.run.answering import talk_of
from lowrank.run.door import command
from lowrank.run.fit import fit
from lowrank.run.judges import OF_TOKENS
from lowrank.run.language import INPUTS
from lowrank.run.saying import Speaker
from lowrank.train.guard import interruptible
from lowrank.train.loop import LoopSpec
from lowrank.train.losses import next_token
from lowrank.train.optim import AdamW


@spec
class Plan:
    """What is done; see `conf/data_to_text.yaml`."""

    base: str
    data: RnnlgData
    pattern: str
    rank: int
    alpha: float
    lr: float
    steps: int
    batch_size: int
    length: int
    evaluate_every: int
    answer_tokens: int
    together: int
    seed: int
    results: str
    adapter: str
    merged: str | None
    cache: str | None
    progress: bool


def study(plan: Plan) -> dict[str, Any]:
    """Before, training, after."""
    began = time.perf_counter()
    if plan.merged is not None:
        check_free(Path(plan.merged))
    task = plan.data.load()
    base = load(plan.base, cache=plan.cache)
    talk = talk_of(base)
    pad = base.spec.pad_id
    spoken = {
        name: talk.spoken(rows, plan.length) for name, rows in task.splits.items()
    }
    batches = SequencePipeline(
        packed(spoken["train"], plan.length, pad),
        batch_size=plan.batch_size,
        trial_seeds=[plan.seed],
        num_steps=plan.steps,
    )
    rows = {
        name: eval_rows(one_by_one(spoken[name], pad), 4 * plan.batch_size)
        for name in ("validation", "test")
    }
    inputs = lambda batch: {name: batch[name] for name in INPUTS}
    example = inputs({k: v[0] for k, v in batches.examples()[0].items()})
    rules = [Rule(plan.pattern, LoRA(alpha=plan.alpha), rank=plan.rank)]
    adapted = attach(base.scores, base.params, example, rules=rules)
    test = task.splits["test"]
    speaker = Speaker(
        base,
        talk,
        test.questions,
        tokens=plan.answer_tokens,
        together=plan.together,
    )
    scores = jax.jit(base.scores)

    def losses(params: Any) -> TokenSums:
        predict = lambda batch: {
            name: value[None] for name, value in scores(params, inputs(batch)).items()
        }
        return score_tokens(predict, rows["test"])[0]

    before, said_before = losses(base.params), speaker.merged(base.params).texts
    started = time.perf_counter()
    fitted = fit(
        adapted,
        batches,
        validation=rows["validation"],
        loss=next_token,
        judge=OF_TOKENS,
        optim=AdamW(lr=plan.lr),
        seeds=[plan.seed],
        loop=LoopSpec(
            evaluate_every=plan.evaluate_every,
            checkpoint_every=plan.steps,
            select="loss",
        ),
        inputs=inputs,
        progress=plan.progress,
    )
    trained_seconds = time.perf_counter() - started
    merged = adapted.merge(fitted.frozen, fitted.trained(), fitted.dials())
    after, answers = losses(merged), speaker.merged(merged)
    said_after = answers.texts
    write_adapter(
        plan.adapter,
        collect(fitted.trained(), fitted.dials(), base.family.module),
        base=plan.base,
        card=f"LoRA for {plan.base}, taught RNNLG's laptop meanings.\n",
        task_type="CAUSAL_LM",
        notes={"base_fingerprint": base.fingerprint},
    )
    if plan.merged is not None:
        write_model(
            plan.merged,
            base.family.to_hf(merged, prefix=None),
            base.hf_config,
            locate(plan.base, plan.cache)[0],
            card=f"{plan.base}, taught RNNLG's laptop meanings by LoRA and merged.\n",
        )
    return {
        "plan": json.loads(json.dumps(plan, default=vars)),
        "rows": {name: len(own) for name, own in task.splits.items()},
        "data": task.fingerprint,
        "base": base.fingerprint,
        "before": _judged(before, said_before, test),
        "after": _judged(after, said_after, test),
        "difference": texts.compare(said_after, said_before, test.answers, test.groups),
        "trained_parameters": sum(x.size for x in jax.tree.leaves(fitted.trained())),
        "tokens_per_second": answers.tokens_per_second,
        "step_seconds": fitted.timer.summary()["median_seconds"],
        "trained_seconds": trained_seconds,
        "seconds": time.perf_counter() - began,
        "examples": [
            {"question": q, "before": b, "after": a, "right": r[0]}
            for q, b, a, r in zip(
                test.questions[:5], said_before, said_after, test.answers, strict=False
            )
        ],
    }


def _judged(
    sums: TokenSums, said: Sequence[str], rows: Answers
) -> dict[str, Mapping[str, Any]]:
    return {
        **sums.report(rows.groups),
        **texts.report(said, rows.answers, rows.groups),
    }


def table(found: Mapping[str, Any]) -> str:
    """The study as Markdown."""
    lines = [
        "# A language model taught to say meanings",
        "",
        f"`python -m experiments.data_to_text`: {found['plan']['base']}, LoRA r="
        f"{found['plan']['rank']}, {found['plan']['steps']} steps, "
        f"{found['rows']['test']} test rows whose meanings were not seen; intervals "
        "resample meanings.",
        "",
        "| metric | base [95 %] | adapted [95 %] | difference [95 %] |",
        "|---|---|---|---|",
    ]
    for name, own in found["after"].items():
        cells = [found["before"][name], own, found["difference"].get(name)]
        lines.append(f"| {name} | {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, ""])


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None or value["estimate"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['estimate']:.3g}"
    return f"{value['estimate']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"


def read(config: Mapping[str, Any]) -> Plan:
    """The plan of a composed config.

    Raises:
      BadInput: A field is unknown, missing, or of another type.
    """
    refuse_targets(config)
    fields = dict(config)
    if not isinstance(fields.get("data"), Mapping):
        raise BadInput(f"data is a group of fields, not {fields.get('data')!r}")
    check_fields(RnnlgData, fields["data"])
    fields["data"] = RnnlgData(**fields["data"])
    check_fields(Plan, fields)
    return Plan(**fields)


def data_to_text(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Runs the study, writes and prints it."""
    del overrides
    plan = read(config)
    with interruptible():
        found = study(plan)
    path = Path(f"{plan.results}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, found)
    path.with_suffix(".md").write_text(table(found), "utf-8")
    print(table(found))
    Console(stderr=True).print(f"Written: {path}")


main = command(data_to_text, config_name="data_to_text")

if __name__ == "__main__":
    main()
