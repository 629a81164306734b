"""Faithfulness: does the output depend on what the attributions say it depends on?

Every measure here removes (or inserts) units in the order of their relevance and reads the
output: `perturbation_curve` is the whole of it, and each measure is a number per example of such
curves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from captum.log import log_usage
from torch import Tensor

from captum_attn.errors import OptionError
from captum_attn.metrics._checks import flag, fractions_of
from captum_attn.metrics._engine import Perturbation, prepare
from captum_attn.metrics._model import Attributions, Inputs

__all__ = [
    "TO_90",
    "TO_100",
    "Curve",
    "abpc",
    "aopc",
    "log_odds",
    "perturbation_auc",
    "perturbation_curve",
]

Steps = int | Sequence[float] | str

# The papers' end points: Chefer et al. mask 10 to 90 %, others go on until nothing is left.
TO_90 = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TO_100 = (*TO_90, 1.0)


class Curve(NamedTuple):
    """The output while units are removed or inserted.

    Attributes:
        fractions (Tensor): (L,), float64, the fraction of the units that was removed (inserted).
        values (Tensor): (B, L), float64, the measure.
        intact (Tensor): (B,), float64, the measure of the intact inputs.
    """

    fractions: Tensor
    values: Tensor
    intact: Tensor

    def area(self, divide_by_width: bool = True) -> Tensor:
        """Area under the curve (B,) by the trapezoid rule.

        Args:
            divide_by_width (bool): divide by the width of the range of fractions, so that curves
                up to 90 % and up to 100 % are on one scale. Default: True.
        """
        flag("divide_by_width", divide_by_width)
        if len(self.fractions) < 2:
            raise OptionError(
                f"steps: an area needs at least two fractions, got {self.fractions.tolist()}"
            )
        area = torch.trapezoid(self.values, self.fractions, dim=1)
        return area / (self.fractions[-1] - self.fractions[0]) if divide_by_width else area


def curve_of(
    ready: Perturbation, order: str, steps: Steps, insert: bool = False, at_least: int = 0
) -> Curve:
    """The curve of a batch that is ready to be perturbed; fractions above 0 take `at_least`."""
    fractions = fractions_of(steps).to(ready.removable.device)
    counts = ready.counts(fractions, keep_whole=isinstance(steps, str))
    counts = torch.where(fractions > 0, counts.clamp(min=at_least), counts)
    first, last = torch.zeros_like(counts), ready.sizes[:, None].expand_as(counts)
    start, stop = (counts, last) if flag("insert", insert) else (first, counts)
    none = torch.zeros_like(counts[:, :1])
    found = ready.run(torch.cat([start, none], 1), torch.cat([stop, none], 1), order)
    return Curve(fractions, found[:, :-1], found[:, -1])


@log_usage()
def perturbation_curve(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    order: str = "most",
    steps: Steps = 10,
    insert: bool = False,
    **options: Any,
) -> Curve:
    r"""The output while the units of the inputs are removed in the order of their relevance.

    Args:
        forward_func (callable): the model, or any callable that runs one, as in Captum.
        inputs (Tensor, tuple of Tensor, or Mapping of str to Tensor): what was explained.
        attributions (Tensor, tuple of Tensor, or Mapping of str to Tensor): of any method, in the
            container of the inputs: of their shape, or a map summed over the channels, such as
            (B, H, W) of an image or (B, n) of embeddings.
        target (int, tuple, Tensor or list, optional): the class that is followed, in every form
            that Captum takes. Default: the class predicted for the intact inputs.
        additional_forward_args (any, optional): further positional arguments of the model.
        order (str): "most" relevant first (the positive perturbation test, MoRF) or "least" (the
            negative one, LeRF). Equal scores keep the order of their index. Default: "most".
        steps (int, sequence of float or "gae"): a number of equal steps from 0 to all units, or
            the rising fractions themselves. A fraction is rounded to the nearest number of units,
            half a unit to the even one. "gae" takes those of GAE's Fig. 3 (0, 25, 50, 75, 80, 85,
            90, 95, 100 %), of which its code rounds down what is kept. Default: 10.
        insert (bool): start from inputs without the units and put them in. Default: False.

    The options, which all measures on this engine share; those marked * may also be a Mapping by
    the names (or positions) of the inputs:

        * measure (str or callable): what is followed: "probability" (softmax over the last axis),
          "log_probability", "accuracy" (1 where the target has the highest output); "sigmoid",
          "log_sigmoid", "sigmoid_accuracy" (1 where the sigmoid is over one half) for independent
          classes; "logit", or (output, target) -> (B,). Default: "probability".
        * unit* (str): what is removed as one: "pixel" with all its channels, "patch", "token" (or
          row of features), "region" or "element". Default: "auto", by the input's shape and type.
        * patch_size* (int): side of a patch.
        * feature_mask* (LongTensor): ids of regions, broadcasting to the input, as in Captum; ids
          are counted per input.
        * fill* (str, number, Tensor or Fill): what stands where units were, see
          `captum_attn.metrics.fills`. Token ids need one: the mask or pad token's id, or "remove"
          to take them out of the attention ("delete": with positions that close up), or "hide",
          which needs no mask of the model's and takes patches, too. Default: "zero".
        * normalize* (callable): the model's normalisation, where the inputs come without it and
          `forward_func` does not do it; the fill comes before it, or after with
          `fill_after=True`. Without it the fill is put into what `forward_func` gets.
        * perturb (str, int or sequence): names (positions) of the inputs to perturb. Default: all
          that have attributions; their units are ranked together.
        * removable* (Tensor): (B, units), bool: which units may be removed at all; fractions are
          of these. Padding is never removed and never counted: what an entry "attention_mask"
          (B, n) marks of ids and of embeddings (or "visual_attention_mask" of "visual_feats", and
          so on), and "pixel_mask" (B, H, W) of images.
        * reduce (str): the score of a unit is the "mean" or the "sum" over its positions (of the
          sum over its channels). Units of one size are ranked alike by both; of unlike ones (super-
          pixels, patches that do not divide the image) the sum ranks large ones first, whatever
          they show, so that chance is no longer chance. Default: "mean".
        * perturbations_per_eval (int): perturbed copies of every example in one forward, as in
          Captum. Default: 1.
        * show_progress (bool): Default: False.

    Returns:
        Curve: of L fractions: the measure (B, L), and that of the intact inputs (B,).

    Raises:
        AttnError: one of its subclasses, for what does not fit together; NaN attributions name
            the example.

    Examples::

        >>> attributions = GenericAttention(model).attribute(images, target=labels)
        >>> curve = perturbation_curve(model, images, attributions, labels, measure="accuracy")
        >>> curve.values.mean(0)  # (11,), accuracy with 0, 10, ..., 100 % of the pixels removed
    """
    ready = prepare(forward_func, inputs, attributions, target, additional_forward_args, **options)
    return curve_of(ready, order, steps, insert)


@log_usage()
def perturbation_auc(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    order: str = "most",
    steps: Steps = TO_90,
    measure: Any = "accuracy",
    divide_by_width: bool = True,
    **options: Any,
) -> Tensor:
    r"""Area under the accuracy while units are removed: the positive and negative perturbation
    tests of Chefer, Gur & Wolf (CVPR and ICCV 2021).

    The accuracy of one example is 0 or 1; the mean of these areas over a data set is the area
    under the mean accuracy. With `target=None` the prediction has to stay what it was; with labels
    as target it has to stay right.

    Args:
        forward_func, inputs, attributions, target, additional_forward_args: see
            `perturbation_curve`.
        order (str): "most" relevant first: lower is better; "least": higher is better.
        steps (int or sequence of float): `TO_90` or `TO_100`, or others. Default: `TO_90`.
        measure (str or callable): Default: "accuracy".
        divide_by_width (bool): see `Curve.area`. Default: True.
        **options: see `perturbation_curve`.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> positive = perturbation_auc(model, images, attributions, labels)
        >>> negative = perturbation_auc(model, images, attributions, labels, order="least")
    """
    curve = perturbation_curve(
        forward_func, inputs, attributions, target, additional_forward_args,
        order=order, steps=steps, measure=measure, **options,
    )  # fmt: skip
    return curve.area(divide_by_width)


@log_usage()
def aopc(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    order: str = "most",
    steps: Steps = 20,
    **options: Any,
) -> Tensor:
    r"""Area over the perturbation curve: how far the probability falls, on average.

    1 / (T + 1) sum_t p(c | x) - p(c | x_t), with t = 0 ... T the fractions 0, 5, ..., 100 %
    (VTranM Eq. 21; Samek et al. 2017). Higher is better.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        steps (int or sequence of float): Default: 20, which is 0, 5, ..., 100 %.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> aopc(model, images, attributions).mean()
    """
    curve = perturbation_curve(
        forward_func, inputs, attributions, target, additional_forward_args,
        order=order, steps=steps, **options,
    )  # fmt: skip
    return (curve.intact[:, None] - curve.values).mean(1)


@log_usage()
def log_odds(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    order: str = "most",
    steps: Steps = 20,
    measure: Any = "log_probability",
    **options: Any,
) -> Tensor:
    r"""LOdds: the mean logarithm of p(c | x_t) / p(c | x) while units are removed.

    Over the fractions 0, 5, ..., 100 % (VTranM Eq. 22; Shrikumar et al. 2017). Lower is better.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        steps (int or sequence of float): Default: 20, which is 0, 5, ..., 100 %.
        measure (str or callable): a logarithm: "log_sigmoid" where classes are independent.
            Default: "log_probability".

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> log_odds(model, images, attributions).mean()
    """
    curve = perturbation_curve(
        forward_func, inputs, attributions, target, additional_forward_args,
        order=order, steps=steps, measure=measure, **options,
    )  # fmt: skip
    return (curve.values - curve.intact[:, None]).mean(1)


@log_usage()
def abpc(
    forward_func: Callable,
    inputs: Inputs,
    attributions: Attributions,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    steps: Steps = 20,
    **options: Any,
) -> Tensor:
    r"""Area between the curves of removing the least and the most relevant units first (Schulz et
    al. 2020). Higher is better; 0 is chance.

    Both areas are by the trapezoid rule, over what is removed from nothing to everything; the
    source takes the plain mean of the differences, in which the two ends, where both curves meet,
    count fully: of T steps it is T / (T + 1) times this.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        steps (int or sequence of float): Default: 20.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> abpc(model, images, attributions, perturbations_per_eval=10).mean()
    """
    _both_ways(options)
    ready = prepare(forward_func, inputs, attributions, target, additional_forward_args, **options)
    least, most = (curve_of(ready, order, steps) for order in ("least", "most"))
    return least.area() - most.area()


def _both_ways(options: dict[str, Any]) -> None:
    given = [name for name in ("order", "insert") if name in options]
    if given:
        raise OptionError(f"{given[0]}: abpc removes the most and the least relevant units anyway")
