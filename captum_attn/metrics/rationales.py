"""Attributions held against human rationales: which tokens did people mark? (ERASER)"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.metrics._checks import marks, number
from captum_attn.metrics._model import Attributions, finite_attributions, one_map
from captum_attn.metrics._units import ranks

__all__ = ["Spans", "rationale_auprc", "rationale_f1", "rationale_iou_f1", "rationale_spans"]


def rationale_f1(
    attributions: Attributions,
    rationales: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float | None = None,
) -> Tensor:
    r"""Token-level F1 of the most relevant tokens against a human rationale (ERASER).

    Args:
        attributions (Tensor, or a container of one): (B, n), or (B, n, D) of embeddings, which
            are summed over D.
        rationales (Tensor): (B, n), 1 where a human marked the token.
        mask (Tensor, optional): (B, n), 0 for padding and special tokens, which count nowhere.
        fraction (float, optional): the share of its tokens that an example's prediction takes, at
            least one; ERASER takes the data set's mean length of a rationale. Default: as many
            tokens as the example's own rationale has.

    Returns:
        Tensor: (B,), float64; the mean over a data set is ERASER's macro-averaged F1.

    Examples::

        >>> rationale_f1(attributions["input_ids"], rationales, encoding["attention_mask"])
    """
    scores, truth, counted = _against(attributions, rationales, mask)
    chosen = _chosen(scores, truth, counted, fraction)
    hits = (chosen & truth).sum(1).double()
    return 2 * hits / (chosen.sum(1) + truth.sum(1))


@dataclass(frozen=True)
class Spans:
    """Spans found, per example; `+` joins data sets, indexing picks examples.

    Attributes:
        precision (Tensor): (B,), float64, the share of predicted spans that meet a marked one.
        recall (Tensor): (B,), float64, the share of marked spans that meet a predicted one.
    """

    precision: Tensor
    recall: Tensor

    def __add__(self, other: Spans) -> Spans:
        if not isinstance(other, Spans):
            return NotImplemented
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Spans(*(torch.cat(pair) for pair in pairs))

    def __getitem__(self, index: Tensor | slice) -> Spans:
        return Spans(self.precision[index], self.recall[index])

    def __len__(self) -> int:
        return len(self.precision)

    @property
    def f1s(self) -> Tensor:
        """F1 of every example alone, (B,)."""
        return _f1(self.precision, self.recall)

    @property
    def f1(self) -> float:
        """ERASER's number of a data set: F1 of the mean precision and the mean recall."""
        return float(_f1(self.precision.mean(), self.recall.mean()))


def _f1(precision: Tensor, recall: Tensor) -> Tensor:
    both = precision + recall
    return 2 * precision * recall / both.where(both > 0, 1.0)


def rationale_spans(
    attributions: Attributions,
    rationales: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float | None = None,
    min_iou: float = 0.5,
) -> Spans:
    r"""Whole spans: runs of chosen tokens against runs of marked ones (ERASER's IOU F1).

    Precision is the share of predicted spans whose intersection over union with a marked one is at
    least `min_iou`, recall that of the marked spans. (ERASER divides the former's count by the
    number of marked spans; above 0.5 a span has one partner at most, and the two agree.)

    Args:
        attributions, rationales, mask, fraction: see `rationale_f1`.
        min_iou (float): above 0 and up to 1. Default: 0.5.

    Returns:
        Spans: of every example; `.f1` is the number of the data set.

    Examples::

        >>> found = rationale_spans(first, marked) + rationale_spans(second, more_marked)
        >>> found.f1
    """
    number("min_iou", min_iou, 0, 1, above=True)
    scores, truth, counted = _against(attributions, rationales, mask)
    chosen = _chosen(scores, truth, counted, fraction)
    met = []
    for c, t in zip(chosen, truth, strict=True):
        predicted, marked = _spans(c), _spans(t)
        iou = np.array([[len(p & m) / len(p | m) for m in marked] for p in predicted]) >= min_iou
        met.append([iou.any(1).mean(), iou.any(0).mean()])
    return Spans(*torch.tensor(met, dtype=torch.float64, device="cpu").unbind(1))


def rationale_iou_f1(
    attributions: Attributions,
    rationales: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float | None = None,
    min_iou: float = 0.5,
) -> Tensor:
    r"""F1 of whole spans of every example alone, see `rationale_spans`.

    The mean over a data set is not ERASER's number, which is the F1 of the mean precision and the
    mean recall: `rationale_spans(...).f1`, and what `evaluate` gives as "rationale_iou_f1".

    Args:
        attributions, rationales, mask, fraction, min_iou: see `rationale_spans`.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> rationale_iou_f1(attributions["input_ids"], rationales, fraction=0.2)
    """
    return rationale_spans(attributions, rationales, mask, fraction=fraction, min_iou=min_iou).f1s


def rationale_auprc(
    attributions: Attributions, rationales: Tensor, mask: Tensor | None = None
) -> Tensor:
    r"""Area under the precision-recall curve of the scores against a human rationale (ERASER).

    By the trapezoid rule over scikit-learn's curve, as ERASER computes it.

    Args:
        attributions, rationales, mask: see `rationale_f1`.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> rationale_auprc(attributions["input_ids"], rationales, encoding["attention_mask"])
    """
    from sklearn.metrics import auc, precision_recall_curve

    scores, truth, counted = _against(attributions, rationales, mask)
    areas = []
    for s, t, c in zip(scores.cpu(), truth.cpu(), counted.cpu(), strict=True):
        precision, recall, _ = precision_recall_curve(t[c].numpy(), s[c].numpy())
        areas.append(auc(recall, precision))
    return torch.tensor(areas, dtype=torch.float64, device="cpu")


def _against(
    attributions: Attributions, rationales: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, marked tokens and tokens that count, (B, n) each."""
    scores = one_map(attributions)
    scores = scores.sum(-1) if scores.ndim == 3 else scores
    counted = torch.ones_like(marks("rationales", rationales)) if mask is None else mask
    for name, value in {"rationales": rationales, "mask": counted}.items():
        if (marks(name, value) < 0).any():
            raise InputError(f"{name}: expected 1 and 0 for every token, got {value.min().item()}")
        if scores.ndim != 2 or value.shape != scores.shape:
            raise InputError(
                f"{name}: expected one value per token, {tuple(scores.shape)} as the attributions "
                f"have, got {tuple(value.shape)}"
            )
    if not len(scores):
        raise InputError("the batch is empty: expected at least one example")
    counted = (counted != 0).to(scores.device)
    truth = (rationales != 0).to(scores.device) & counted
    empty = (~truth.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"example {empty[0]} has no marked token, so there is no rationale to find: leave "
            "such examples out"
        )
    return finite_attributions(scores.masked_fill(~counted, 0.0)), truth, counted


def _chosen(scores: Tensor, truth: Tensor, counted: Tensor, fraction: float | None) -> Tensor:
    """(B, n), the most relevant tokens; equal ones by their index."""
    if fraction is None:
        count = truth.sum(1)
    else:
        sizes = counted.sum(1)
        share = number("fraction", fraction, 0, 1, above=True)
        count = (share * sizes.double()).round().long().clamp(min=1).minimum(sizes)
    return ranks(scores, counted, "most") < count[:, None]


def _spans(marked: Tensor) -> list[set[int]]:
    """Runs of marked tokens, as sets of positions."""
    spans: list[set[int]] = []
    for position in marked.nonzero().flatten().tolist():
        if spans and position - 1 in spans[-1]:
            spans[-1].add(position)
        else:
            spans.append({position})
    return spans
