"""Text: tokens removed, and attributions held against human rationales (ERASER)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.log import log_usage
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._engine import prepare
from captum_attn.metrics._inputs import (
    Attributions,
    Inputs,
    finite_attributions,
    one_map,
)
from captum_attn.metrics._units import ranks
from captum_attn.metrics.perturbation import TO_100, Steps, curve_of, perturbation_auc

__all__ = [
    "comprehensiveness",
    "rationale_auprc",
    "rationale_f1",
    "rationale_iou_f1",
    "sufficiency",
    "token_removal_auc",
]

# The empty rationale and the bins of ERASER, section 4.2
BINS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.5)


@log_usage()
def token_removal_auc(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    order: str = "most",
    steps: Steps = TO_100,
    fill: Any = "remove",
    **options: Any,
) -> Tensor:
    r"""Area under the accuracy while tokens are taken out of the attention (GAE, Fig. 3).

    `perturbation_auc` with other defaults. For a model of text and image regions, `perturb=` says
    which of the two lose tokens, and `fill=Remove("visual_attention_mask")` where.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        order (str): "most" relevant first: lower is better; "least": higher is better.
        steps (int or sequence of float): Default: `TO_100`.
        fill: Default: "remove".

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> token_removal_auc(model, encoding, attributions, labels, removable=is_word)
    """
    return perturbation_auc(
        forward_func, inputs, attributions, target, additional_forward_args,
        order=order, steps=steps, fill=fill, **options,
    )  # fmt: skip


@log_usage()
def comprehensiveness(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    steps: Steps = BINS,
    fill: Any = "remove",
    **options: Any,
) -> Tensor:
    r"""How far the probability falls without the rationale (ERASER, DeYoung et al. 2020, Eq. 1).

    The rationale is the most relevant 1, 5, 10, 20 and 50 % of the tokens, at least one of them;
    the result is the mean over these and the empty rationale, as in the paper (the authors' code
    leaves the empty one out: `steps=(0.01, 0.05, 0.1, 0.2, 0.5)`). Higher is better.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        steps (int or sequence of float): Default: `BINS`.
        fill: Default: "remove", out of the attention.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> comprehensiveness(model, encoding, attributions, fill=tokenizer.mask_token_id)
    """
    return _without(
        False, forward_func, inputs, attributions, target, additional_forward_args, steps,
        fill=fill, **options,
    )  # fmt: skip


@log_usage()
def sufficiency(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    steps: Steps = BINS,
    fill: Any = "remove",
    **options: Any,
) -> Tensor:
    r"""How far the probability falls with nothing but the rationale (ERASER, Eq. 2). Lower is
    better.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        steps, fill: see `comprehensiveness`.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> sufficiency(model, encoding, attributions, fill=tokenizer.mask_token_id)
    """
    return _without(
        True, forward_func, inputs, attributions, target, additional_forward_args, steps,
        fill=fill, **options,
    )  # fmt: skip


def _without(
    insert: bool,
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any,
    additional_forward_args: Any,
    steps: Steps,
    **options: Any,
) -> Tensor:
    ready = prepare(forward_func, inputs, attributions, target, additional_forward_args, **options)
    curve = curve_of(ready, "most", steps, insert, at_least=1)
    return (curve.intact[:, None] - curve.values).mean(1)


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


def rationale_iou_f1(
    attributions: Attributions,
    rationales: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float | None = None,
    min_iou: float = 0.5,
) -> Tensor:
    r"""F1 of whole spans: runs of chosen tokens against runs of marked ones (ERASER's IOU F1).

    Precision is the share of predicted spans whose intersection over union with a marked one is at
    least `min_iou`, recall that of the marked spans. (ERASER divides the former's count by the
    number of marked spans; above 0.5 a span has one partner at most, and the two agree.)

    Args:
        attributions, rationales, mask, fraction: see `rationale_f1`.
        min_iou (float): Default: 0.5.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> rationale_iou_f1(attributions["input_ids"], rationales, fraction=0.2)
    """
    scores, truth, counted = _against(attributions, rationales, mask)
    chosen = _chosen(scores, truth, counted, fraction)
    return torch.tensor(
        [_span_f1(_spans(c), _spans(t), min_iou) for c, t in zip(chosen, truth, strict=True)],
        dtype=torch.float64,
    )


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
    return torch.tensor(areas, dtype=torch.float64)


def _against(
    attributions: Attributions, rationales: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, marked tokens and tokens that count, (B, n) each."""
    scores = one_map(attributions)
    scores = scores.sum(-1) if scores.ndim == 3 else scores
    counted = torch.ones_like(rationales) if mask is None else mask
    for name, value in {"rationales": rationales, "mask": counted}.items():
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
    elif 0 < fraction <= 1:
        sizes = counted.sum(1)
        count = (fraction * sizes.double()).round().long().clamp(min=1).minimum(sizes)
    else:
        raise OptionError(f"fraction: expected one above 0 and up to 1, got {fraction}")
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


def _span_f1(predicted: list[set[int]], marked: list[set[int]], min_iou: float) -> float:
    iou = np.array([[len(p & m) / len(p | m) for m in marked] for p in predicted]) >= min_iou
    precision, recall = iou.any(1).mean(), iou.any(0).mean()
    return float(2 * precision * recall / (precision + recall)) if iou.any() else 0.0
