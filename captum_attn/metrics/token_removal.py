"""Text: what is left of a prediction while tokens are taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from captum.log import log_usage
from torch import Tensor

from captum_attn.metrics._engine import prepare
from captum_attn.metrics._model import Attributions, Inputs
from captum_attn.metrics.perturbation import TO_100, Steps, curve_of, perturbation_auc

__all__ = [
    "comprehensiveness",
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
    fill: Any = None,
    **options: Any,
) -> Tensor:
    r"""Area under the accuracy while tokens are taken out of the attention (GAE, Fig. 3).

    `perturbation_auc` with other defaults. GAE's own protocol is `steps="gae"`: its fractions, with
    tokens deleted so that the positions of the others close up (its code goes on until an LXMERT
    has no region at all; here one stays). For a model of text and image regions, `perturb=` says
    which of the two lose tokens, and `fill=Remove("visual_attention_mask")` where.

    Args:
        forward_func, inputs, ...: see `perturbation_curve`.
        order (str): "most" relevant first: lower is better; "least": higher is better.
        steps (int, sequence of float or "gae"): Default: `TO_100`.
        fill: Default: "remove"; "delete" with `steps="gae"`.

    Returns:
        Tensor: (B,), float64.

    Examples::

        >>> token_removal_auc(model, encoding, attributions, labels, removable=is_word)
    """
    if fill is None:
        fill = "delete" if isinstance(steps, str) else "remove"
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
