r"""From numbers per row to scores.

A language model's scores are ratios of sums over rows, so that a row counts by its tokens or its bytes:

    loss = nats / targets,    perplexity = exp(loss),    bits per byte = nats / (ln 2 bytes)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_bayes.data import Part, Rows
from mergekit_bayes.evaluate.encodings import Encoding
from mergekit_bayes.evaluate.measure import Measured
from mergekit_bayes.predict.choices import ChoicePrediction
from mergekit_bayes.predict.classes import ClassPrediction
from mergekit_bayes.predict.scores import Score, choice_scores, class_scores, selective_accuracy

__all__ = ["prediction_of", "row_scores"]


def row_scores(
    measured: Measured,
    encoding: Encoding,
    part: Part,
    *,
    metrics: Sequence[str],
    bins: int,
    coverage: Sequence[float],
) -> dict[str, Score]:
    """The scores of a model on one data set, by what tables call them.

    Args:
        measured: of all rows.
        encoding: of the rows.
        part: the data set.
        metrics: which of them.
        bins: of the calibration error.
        coverage: of the selective accuracy; each has a score of its own.
    """
    if encoding.rows.task == "causal_lm":
        found = _of_language(measured, encoding, part)
    else:
        prediction = prediction_of(measured, encoding.rows, part)
        if isinstance(prediction, ChoicePrediction):
            found = choice_scores(prediction, _sizes(encoding.rows, part), bins=bins)
        else:
            found = class_scores(prediction, bins=bins)
        for share in coverage:
            score = selective_accuracy(prediction.confidence, prediction.correct, share)
            found[score.name] = score
    return {name: score for name, score in found.items() if name.partition("@")[0] in metrics}


def prediction_of(measured: Measured, rows: Rows, part: Part) -> ClassPrediction:
    """What was predicted for one data set, as a classifier's; only the averages are known, not the samples."""
    places = range(part.start, part.stop)
    if rows.task == "multiple_choice":
        return _of_questions([measured[row] for row in places], rows, part)
    averaged = torch.tensor([measured[row] for row in places], dtype=torch.float64)
    labels = torch.tensor([rows[row]["labels"] for row in places])
    return ClassPrediction(averaged, torch.zeros(len(averaged), dtype=torch.float64), labels, 0, 0.0, 0)


def _of_questions(numbers: Sequence[Sequence[float]], rows: Rows, part: Part) -> ChoicePrediction:
    halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in numbers]
    averaged, likelihoods = (_padded([half[side] for half in halves], -math.inf) for side in (0, 1))
    answers = torch.tensor([row["answer"] for row in rows[part.start : part.stop]])
    uncertainty = torch.zeros(len(averaged), dtype=torch.float64)
    return ChoicePrediction(averaged, uncertainty, answers, 0, 0.0, 0, likelihoods)


def _sizes(rows: Rows, part: Part) -> Tensor:
    """Bytes of every choice, 1 where a question has no such choice."""
    return _padded([row["choice_bytes"] for row in rows[part.start : part.stop]], 1)


def _padded(lines: Sequence[Sequence[float]], filler: float) -> Tensor:
    """Lines of different lengths, filled up to the longest."""
    width = max(map(len, lines))
    return torch.tensor([[*line, *[filler] * (width - len(line))] for line in lines], dtype=torch.float64)


def _of_language(measured: Measured, encoding: Encoding, part: Part) -> dict[str, Score]:
    places = range(part.start, part.stop)
    nats = torch.tensor([measured[row][0] for row in places], dtype=torch.float64)
    units = torch.from_numpy(encoding.rows.units[part.start : part.stop]).double()
    loss = torch.stack([nats, units], -1)
    scores = [Score("loss", loss, _ratio), Score("perplexity", loss, _perplexity)]
    assert encoding.bytes is not None  # counted for every language model
    size = torch.tensor(encoding.bytes[part.start : part.stop], dtype=torch.float64)
    if size.sum() > 0:
        scores.append(Score("bits_per_byte", torch.stack([nats / math.log(2), size], -1), _ratio))
    return {score.name: score for score in scores}


def _ratio(averages: Tensor) -> Tensor:
    return averages[..., 0] / averages[..., 1]


def _perplexity(averages: Tensor) -> Tensor:
    return _ratio(averages).exp()


def nothing(score: Score) -> Score:
    """The score that is zero whatever the rows; the interval of a difference from it is that of a score itself."""
    return Score("nothing", torch.zeros(len(score.parts), 1, dtype=torch.float64), lambda averages: averages[..., 0])


def plain(scores: Mapping[str, Score]) -> dict[str, float]:
    """Values by name."""
    return {name: score.value for name, score in scores.items()}
