"""What generated texts are worth beside right ones, with intervals.

A metric gives terms of every row, which add up, and a value of their sums: a corpus
metric such as BLEU is resampled without reading any text again. Counts and scores of a
sentence are those of sacrebleu and rouge-score.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from lowrank.core.errors import BadInput
from lowrank.evaluate import stats

Terms = Float64[np.ndarray, "rows terms"]
_ORDERS = 4


@dataclasses.dataclass(frozen=True)
class TextMetric:
    """A number about texts; larger is better.

    Attributes:
      name: In tables.
      terms: (text, right texts) -> what a row adds.
      value: (sums, of resamples, and of the whole) -> values.
    """

    name: str
    terms: Callable[[str, Sequence[str]], Sequence[float]]
    value: Callable[[Any, Any], Any]


def bleu_value(sums: Float64[np.ndarray, "*resamples terms"], whole: Any) -> Any:
    r"""BLEU of summed counts, in percent, without smoothing.

    .. math:: 100\, \min(1, e^{1 - r / c}) \prod_{n=1}^4 (m_n / t_n)^{1/4}

    m_n of t_n n-grams of the texts are right, c and r are the lengths of the texts and
    of their nearest right ones. 0 where some m_n is 0.

    Source: Papineni et al., 2002, https://doi.org/10.3115/1073083.1073135
    """
    del whole
    right, total = sums[..., :_ORDERS], sums[..., _ORDERS : 2 * _ORDERS]
    length, wanted = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(right / total).mean(axis=-1)
        brevity = np.minimum(0.0, 1.0 - wanted / length)
        found = 100.0 * np.exp(logs + brevity)
    return np.where((right > 0).all(axis=-1) & (length > 0), found, 0.0)


def _mean(sums: Float64[np.ndarray, "*resamples 2"], whole: Any) -> Any:
    """The mean of the first term; the second counts rows."""
    del whole
    return sums[..., 0] / sums[..., 1]


def text_metrics() -> tuple[TextMetric, ...]:
    """BLEU, chrF, ROUGE-L and exact agreement.

    chrF and ROUGE-L are means over rows, each with its best right text. Case counts.

    Source: Popovic, 2015, https://doi.org/10.18653/v1/W15-3049; Lin, 2004,
    https://aclanthology.org/W04-1013

    Raises:
      BadInput: The libraries are missing.
    """
    try:
        sacrebleu = importlib.import_module("sacrebleu.metrics")
        rouge = importlib.import_module("rouge_score.rouge_scorer")
    except ImportError as error:
        raise BadInput(
            f"metrics of texts need the extra: pip install 'lowrank[text]' ({error})"
        ) from None
    bleu = sacrebleu.BLEU(effective_order=True)
    chrf = sacrebleu.CHRF()
    scorer = rouge.RougeScorer(["rougeL"])

    def counts(text: str, right: Sequence[str]) -> list[float]:
        found = bleu.sentence_score(text, list(right))
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def of_chrf(text: str, right: Sequence[str]) -> list[float]:
        return [chrf.sentence_score(text, list(right)).score, 1.0]

    def of_rouge(text: str, right: Sequence[str]) -> list[float]:
        best = scorer.score_multi(list(right), text)["rougeL"].fmeasure
        return [100.0 * best, 1.0]

    def of_agreement(text: str, right: Sequence[str]) -> list[float]:
        return [100.0 * (text.strip() in {one.strip() for one in right}), 1.0]

    return (
        TextMetric("bleu", counts, bleu_value),
        TextMetric("chrf", of_chrf, _mean),
        TextMetric("rouge_l", of_rouge, _mean),
        TextMetric("exact", of_agreement, _mean),
    )


def terms_of(
    metric: TextMetric, texts: Sequence[str], right: Sequence[Sequence[str]]
) -> Terms:
    """What all rows add.

    Raises:
      BadInput: There is not one set of right texts per text.
    """
    if len(texts) != len(right):
        raise BadInput(f"{len(texts)} texts have {len(right)} sets of right ones")
    rows = [metric.terms(text, own) for text, own in zip(texts, right, strict=True)]
    return np.asarray(rows, np.float64)


def report(
    texts: Sequence[str],
    right: Sequence[Sequence[str]],
    groups: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Every metric with its interval, as JSON types.

    Args:
      texts: What was said.
      right: What may be said, row by row.
      groups: Which rows are not independent of each other; None: all are.
      **options: `seed`, `resamples`, `level`, `method` of `stats.bootstrap`.
    """
    names = None if groups is None else np.asarray(groups)
    return {
        metric.name: stats.bootstrap(
            terms_of(metric, texts, right), metric.value, groups=names, **options
        ).json()
        for metric in text_metrics()
    }


def mean_score(
    scores: Sequence[float], groups: Sequence[str] | None = None, **options: Any
) -> dict[str, Any]:
    """The mean of scores from 0 to 1, in percent, with its interval; see `report`."""
    names = None if groups is None else np.asarray(groups)
    terms = np.array([(100.0 * score, 1.0) for score in scores], np.float64)
    return stats.bootstrap(terms, _mean, groups=names, **options).json()


def compare(
    first: Sequence[str],
    second: Sequence[str],
    right: Sequence[Sequence[str]],
    groups: Sequence[str] | None = None,
    **options: Any,
) -> Mapping[str, Any]:
    """Interval of the difference, first minus second, of every metric."""
    names = None if groups is None else np.asarray(groups)
    rows = np.arange(len(right))
    return {
        metric.name: stats.paired_bootstrap(
            terms_of(metric, first, right),
            terms_of(metric, second, right),
            metric.value,
            ids=(rows, rows),
            groups=names,
            **options,
        ).json()
        for metric in text_metrics()
    }
