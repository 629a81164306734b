"""Gradient rules: relevance is value times a rewritten gradient.

A rule is (operation, g at its output) -> g at each operand. An operation that a table does not name
keeps its ordinary gradient, which is LRP-0 for a linear layer, and Taylor's expansion elsewhere.

Achtibat et al., "AttnLRP", ICML 2024; Ali et al., "XAI for Transformers: Better Explanations
through Conservative Propagation", ICML 2022; Montavon et al., "Layer-wise Relevance Propagation: An
Overview", 2019 (gamma).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_attn.attr._linear_form import linear_form
from captum_attn.errors import OptionError
from captum_attn.observe.operators.bridge import Operation, Rule, Shares, without_output

# Below this |x| the quotient (f(x) - f(0)) / x has lost too many digits, where f(0) is not 0.
_SMALL = {torch.float64: 1e-5}
_SMALL_ELSEWHERE = 1e-2


def identity(op: Operation, g: Tensor, eps: float = 0.0) -> tuple[Tensor]:
    """g_x = g (f(x) - f(0)) / x, and 0 at x = 0: f(x) less its bias f(0) is all x's doing.

    Args:
        eps (float): the authors' code has g f(x) / (x + eps) with 1e-10; 0: the exact rule.
    """
    (x,), y = op.operands, op.output
    if eps:
        return (g * (y / (x + eps)),)
    if isinstance(op.at_zero, float) and not math.isfinite(op.at_zero):
        return (op.vjp(g)[0],)  # log has no value at 0: its ordinary gradient
    zero = x == 0
    ratio = torch.where(zero, 0, (y - op.at_zero) / torch.where(zero, 1, x))
    if isinstance(op.at_zero, Tensor) or op.at_zero != 0.0:
        ratio = _near_zero(op, x, ratio)
    return (g * ratio,)


def _near_zero(op: Operation, x: Tensor, ratio: Tensor) -> Tensor:
    """The quotient where it is a difference of near numbers: f'(x / 2), to second order in x."""
    near = (x.abs() < _SMALL.get(x.dtype, _SMALL_ELSEWHERE)) & (x != 0)
    if op.kind != "activation" or not bool(near.any()):
        return ratio
    return torch.where(near, op.vjp(torch.ones_like(x), x / 2)[0], ratio)


@without_output
def constant_normaliser(op: Operation, g: Tensor, mean: bool = True) -> tuple[Tensor]:
    """Layer, group, instance and RMS norm with 1 / std held constant (Ali et al., LN rule).

    g_x = (h - mean(h)) / std with h = g w; RMS norm: h / rms.

    Args:
        mean (bool): False holds the mean constant, too: g_x = h / std, as in the authors' script.
    """
    (x,) = op.operands
    groups, weight, eps = _normalised_groups(op, x)
    h = g if weight is None else g * weight
    h, x = h.reshape(groups), x.reshape(groups)
    axes = tuple(range(_LEADING[op.name], len(groups)))
    if op.name == "rms_norm":
        return ((h / (x.square().mean(axes, keepdim=True) + eps).sqrt()).reshape(g.shape),)
    std = (x.var(axes, correction=0, keepdim=True) + eps).sqrt()
    if mean:
        h = h - h.mean(axes, keepdim=True)
    return ((h / std).reshape(g.shape),)


_LEADING = {"layer_norm": 1, "rms_norm": 1, "group_norm": 2, "instance_norm": 2, "batch_norm": 1}


def _normalised_groups(op: Operation, x: Tensor) -> tuple[list[int], Tensor | None, float]:
    """(shape with what is normalised together behind the leading axes, weight, eps)."""
    channels = [1, -1] + [1] * (x.ndim - 2)
    if op.name in ("layer_norm", "rms_norm"):
        shape = op.argument(1, "normalized_shape")
        size = 1 if isinstance(shape, int) else len(shape)
        weight = op.argument(2, "weight")
        if op.name == "rms_norm":
            eps = op.argument(3, "eps", torch.finfo(x.dtype).eps)
        else:
            eps = op.argument(4, "eps", 1e-5)
        return [math.prod(x.shape[:-size]), math.prod(x.shape[-size:])], weight, eps
    if op.name == "group_norm":
        weight, eps = op.argument(2, "weight"), op.argument(4, "eps", 1e-5)
        groups = [x.shape[0], int(op.argument(1, "num_groups")), -1]
    else:  # instance norm: each channel of each example
        weight, eps = op.argument(3, "weight"), op.argument(7, "eps", 1e-5)
        groups = [x.shape[0], x.shape[1], -1]
    return groups, None if weight is None else weight.view(channels), eps


def epsilon(op: Operation, g: Tensor, eps: float = 1e-6) -> list[Tensor]:
    """LRP-epsilon of linear layers and convolutions: R / (y + eps) in place of R / y, R = g y.

    Args:
        eps (float): with the sign of y; 0 is LRP-0, the ordinary gradient.
    """
    y = op.output
    return op.vjp(g * y / (y + torch.where(y < 0, -eps, eps)))


def gamma(
    op: Operation, g: Tensor, value: float, attention: bool = True, stabiliser: float = 1e-6
) -> tuple[Tensor | None]:
    """The generalised gamma rule of a linear layer or a convolution.

    With x+ and x- the parts of x, w' = w + gamma w+, w" = w + gamma w-, R = g y, z(x, w) the layer:

    - y > 0: S = R / (z(x+, w', b') + z(x-, w")), R_x = x+ w'^T S + x- w"^T S;
    - y < 0: the same with w' and w" exchanged;

    and g_x = R_x / x.

    Args:
        attention (bool): False leaves projections of attention calls as they are.
    """
    if op.feeds_attention and not attention:
        return (op.vjp(g)[0],)
    (x,), y = op.operands, op.output
    layer, weight, bias = (form := linear_form(op)).forward, form.weight, form.bias
    total = torch.zeros_like(x)
    for positive in (True, False):
        up, down = _raised(weight, value, positive), _raised(weight, value, not positive)
        parts = ((x.clamp(min=0), up), (x.clamp(max=0), down))
        b = None if bias is None else _raised(bias, value, positive)
        with torch.enable_grad():
            at = [part.detach().requires_grad_() for part, _ in parts]
            one, other = (layer(p, w) for p, (_, w) in zip(at, parts, strict=True))
            z = one.detach() + other.detach()
            z = z if b is None else z + b
            here = y > 0 if positive else y < 0
            s = torch.where(here, g * y / (z + torch.where(z < 0, -stabiliser, stabiliser)), 0)
            pulled = torch.autograd.grad((one, other), at, (s, s))
        total += sum(p.detach() * grad for p, grad in zip(at, pulled, strict=True))
    return (total / (x + torch.where(x < 0, -1e-10, 1e-10)),)


def _raised(weight: Tensor, value: float, positive: bool) -> Tensor:
    part = weight.clamp(min=0) if positive else weight.clamp(max=0)
    return weight + value * part


HALVES = Shares((0.5, 0.5))
NOTHING = Shares((0.0,))


def attn_lrp(eps: float = 0.0) -> dict[str, Rule]:
    """Achtibat et al. 2024, as their code computes it."""
    exact = partial(identity, eps=eps)
    return {
        "map": HALVES,
        "product": HALVES,
        "gate": HALVES,
        "multiply": HALVES,
        "divide": Shares((1.0, 0.0)),
        "solve": Shares((1.0, 0.0)),
        "places": NOTHING,
        "composite": exact,
        "activation": exact,
        "norm": constant_normaliser,
        "statistic": NOTHING,
    }


def cp_lrp(eps: float = 0.0) -> dict[str, Rule]:
    """CP-LRP: attention maps and gates are constants."""
    return {
        **attn_lrp(eps),
        "map": Shares((0.0, 1.0), alone=(0.0, 1.0)),
        "gate": Shares((0.0, 1.0)),
    }


def conservative(norm: str = "mean") -> dict[str, Rule]:
    """Ali et al. 2022: attention maps (AH rule) and normalisers (LN rule) are constants."""
    return {
        "map": Shares((0.0, 1.0), alone=(0.0, 1.0)),
        "norm": partial(constant_normaliser, mean=norm == "mean")
        if norm != "mean"
        else (constant_normaliser),
        "statistic": NOTHING,
    }


def with_gamma(rules: dict[str, Rule], values: Any, attention: bool) -> dict[str, Rule]:
    """The rules with gamma for (convolutions, linear layers); 0: LRP-0."""
    if values is None:
        return rules
    made = dict(rules)
    for kind, value in zip(("convolution", "linear"), values, strict=True):
        if value:
            made[kind] = partial(gamma, value=value, attention=attention)
    return made


def check_numbers(eps: float, values: Any) -> None:
    """Refuses an `eps` below 0, and a `gamma` that is no pair of numbers >= 0."""
    if not eps >= 0:
        raise OptionError(f"eps: expected a number >= 0, got {eps!r}")
    fits = values is None or (
        isinstance(values, tuple)
        and len(values) == 2
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 0 for v in values)
    )
    if not fits:
        raise OptionError(
            "gamma: expected None or two numbers >= 0, for convolutions and linear layers; got "
            f"{values!r}"
        )
