"""Relevance rules: what arrives at an operation's output is shared out among its operands.

A rule is (operation, R at its output) -> R at each operand. Chefer, Gur & Wolf, "Transformer
Interpretability Beyond Attention Visualization", CVPR 2021, as the authors' code computes it, with
one common denominator in convolutions and sums per example.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_attn.attr._linear_form import linear_form, where_reached
from captum_attn.observe.capture.attention_call import attention_map, repeat_heads
from captum_attn.observe.operators.bridge import Operation, Rule, Shares, without_output
from captum_attn.observe.operators.examples import sums_per_example

Shared = tuple["Tensor | None", ...]


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """sd(a, b) = a / (b + 1e-9), as the authors have it; 0 where b is 0 or it is not finite."""
    made = a / torch.where(b == 0, 1, b + 1e-9)
    return torch.where((b == 0) | ~torch.isfinite(made), 0, made)


@without_output
def pass_on(op: Operation, relevance: Tensor) -> Shared:
    """R_x = R: nonlinearities, norms, softmax, scales."""
    return (relevance,)  # the bridge sums over axes that were broadcast


@without_output
def nothing(op: Operation, relevance: Tensor) -> Shared:
    """Statistics take no part."""
    return (None,) * len(op.operands)


@where_reached
def z_plus(op: Operation, relevance: Tensor) -> Shared:
    """Z = x+ w+ + x- w- without the bias, S = sd(R, Z), R_x = x+ (w+^T S) + x- (w-^T S).

    In three products instead of four: Z = (z + |x| |w|) / 2 with z = y less the bias, and
    R_x = (x (w^T S) + |x| (|w|^T S)) / 2.
    """
    (x,), y = op.operands, op.output
    layer = linear_form(op)
    magnitude, sizes = x.abs(), layer.weight.abs()
    z, largest = y if layer.bias is None else y - layer.bias, layer.forward(magnitude, sizes)
    z = (z + largest) / 2
    # Where no product is positive, Z is 0: what rounding has left must not be divided by.
    z = torch.where(z <= 8 * torch.finfo(z.dtype).eps * largest, 0, z)
    s = quotient(relevance, z)
    shared = x * layer.pull(s, x, layer.weight) + magnitude * layer.pull(s, x, sizes)
    return (shared / 2,)


def z_b(op: Operation, relevance: Tensor) -> Shared:
    """For bounded inputs: Z = z(x, w) - z(l, w+) - z(h, w-), l and h each example's extremes.

    R_x = x w^T S - l w+^T S - h w-^T S with S = R / (Z + 1e-9).
    """
    (x,) = op.operands
    layer, axes = linear_form(op), tuple(range(1, x.ndim))
    w, up, down = layer.weight, layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    low = x.amin(axes, keepdim=True).expand_as(x).contiguous()
    high = x.amax(axes, keepdim=True).expand_as(x).contiguous()
    z = layer.forward(x, w) - layer.forward(low, up) - layer.forward(high, down) + 1e-9
    s = relevance / z
    shared = x * layer.pull(s, x, w) - low * layer.pull(s, x, up)
    return (shared - high * layer.pull(s, x, down),)


def add(op: Operation, relevance: Tensor, normalize: bool = True) -> Shared:
    """a' = a sd(R, Z), b' likewise, Z = a + b; then, per example, each to its due of the whole.

    a' *= sd(sd(|Σa'|, |Σa'| + |Σb'|) ΣR, Σa'), b' likewise (`normalize`): two large shares of
    opposite sign do not blow each other up.
    """
    terms = _terms(op)
    share = quotient(relevance, op.output)
    parts = [torch.where(torch.isfinite(t), t * share, 0) for t in terms]
    if normalize:
        parts = _normalised(parts, relevance, op.batch)
    return tuple(parts[: len(op.operands)])


def _terms(op: Operation) -> list[Tensor]:
    """The summands with their signs, those that are activations first, in the output's shape."""
    names = ("input", "other")
    values: list[Any] = []
    for i, slot in enumerate(op.slots):
        values.append((slot, op.operands[i]))
    given = {slot[0] for slot in op.slots}
    for place, name in enumerate(names):
        if place not in given and name not in given:
            constant = op.argument(place, name)
            values.append(((place,), constant))
    sign = _signs(op)
    alpha = op.call.kwargs.get("alpha", 1)
    made = []
    for slot, value in values:
        second = slot[0] in (1, "other")
        factor = sign[second] * (alpha if second and op.name != "rsub" else 1)
        value = value if isinstance(value, Tensor) else op.output.new_tensor(value)
        made.append((value * factor).to(op.output.dtype).expand_as(op.output))
    return made


def _signs(op: Operation) -> tuple[int, int]:
    return {"add": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}[op.name]


def _normalised(parts: list[Tensor], relevance: Tensor, batch: int) -> list[Tensor]:
    sums = [sums_per_example(part, batch) for part in parts]
    whole = sums_per_example(relevance, batch)
    sizes = torch.stack([total.abs() for total in sums]).sum(0)
    return [
        part * quotient(quotient(total.abs(), sizes) * whole, total)
        for part, total in zip(parts, sums, strict=True)
    ]


def halves(op: Operation, relevance: Tensor) -> Shared:
    """Of a product of two activations half to each: S = sd(R, Z), R_a = a (dZ/da)^T S / 2."""
    s = quotient(relevance, op.output)
    pulled = op.vjp(s)
    return tuple(x * p / len(pulled) for x, p in zip(op.operands, pulled, strict=True))


def proportion(op: Operation, relevance: Tensor) -> Shared:
    """Sums, means, pooling, interpolation: R_x = x (df/dx)^T sd(R, y)."""
    pulled = op.vjp(quotient(relevance, op.output))
    return tuple(x * p for x, p in zip(op.operands, pulled, strict=True))


@without_output
def to_numerator(op: Operation, relevance: Tensor) -> Shared:
    """a / b: everything to a."""
    return relevance, None


def to_right_side(op: Operation, relevance: Tensor) -> Shared:
    """A^-1 B, as a quotient: everything to B, R_B = B (A^-T sd(R, y))."""
    pulled = op.vjp(quotient(relevance, op.output))
    return (op.operands[0] * pulled[0], None)[: len(op.operands)]


def attention(op: Operation, relevance: Tensor) -> Shared:
    """The fused kernel as its two products, the softmax between them passing R on.

    R_A = c A (sd(R, O) V^T), R_V = c V (A^T sd(R, O)), c = 1/2, or 1 where only one of
    the two is an activation; then Q K^T as a product with R_A. The scale is outside of Z.
    """
    roles = op.settings["roles"]
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given = dict(zip(names, op.call.args, strict=False)) | op.call.kwargs
    given |= dict(zip(roles, op.operands, strict=True))
    q, k, v = (given[name] for name in names[:3])
    keys, values = repeat_heads(k, q), repeat_heads(v, q)
    mask, causal = given.get("attn_mask"), given.get("is_causal", False)
    a = attention_map(q, k, mask, causal, given.get("scale"))  # (..., n_q, n_k)
    s = quotient(relevance, op.output)
    scored = "query" in roles or "key" in roles
    c = 0.5 if scored and "value" in roles else 1.0
    found: dict[str, Tensor] = {}
    if "value" in roles:
        found["value"] = _per_head(c * values * (a.mT @ s), v)
    if scored:
        scores = q @ keys.mT
        t = quotient(c * a * (s @ values.mT), scores)
        c = 0.5 if "query" in roles and "key" in roles else 1.0
        found["query"] = c * q * (t @ keys)
        found["key"] = _per_head(c * keys * (t.mT @ q), k)
    return tuple(found.get(role) for role in roles)


def _per_head(tensor: Tensor, like: Tensor) -> Tensor:
    """Grouped keys or values: what their queries' heads got, added up."""
    if tensor.shape == like.shape or tensor.ndim < 3 or like.shape[-3] == 1:
        return tensor
    return tensor.unflatten(-3, (like.shape[-3], -1)).sum(-3)


def transformer_lrp(renorm: bool = True, joint: bool = True) -> dict[str, Rule]:
    """Chefer, Gur & Wolf 2021.

    Args:
        renorm (bool): False leaves out the normalisation of sums.
        joint (bool): False divides the positive and the negative part of linear layers apart.
    """
    linear = z_plus if joint else z_apart
    return {
        "linear": linear,
        "convolution": z_plus,
        "image": z_b,
        "map": halves,
        "product": halves,
        "attention": attention,
        "gate": halves,
        "multiply": halves,
        "divide": to_numerator,
        "solve": to_right_side,
        "composite": pass_on,
        "activation": pass_on,
        "norm": pass_on,
        "batch_norm": pass_on,
        "softmax": pass_on,
        "scale": pass_on,
        "centre": pass_on,
        "add": add if renorm else partial(add, normalize=False),
        "reduce": proportion,
        "accumulate": proportion,
        "statistic": nothing,
        "places": Shares((0.0,)),
    }


@where_reached
def z_apart(op: Operation, relevance: Tensor) -> Shared:
    """The authors' older baseline: R_x = x+ (w+^T sd(R, Z+)) + x- (w-^T sd(R, Z-)), Z± apart."""
    (x,) = op.operands
    layer, shared = linear_form(op), torch.zeros_like(x)
    for clamp in ({"min": 0}, {"max": 0}):
        part, weight = x.clamp(**clamp), layer.weight.clamp(**clamp)
        s = quotient(relevance, layer.forward(part, weight))
        shared = shared + part * layer.pull(s, x, weight)
    return (shared,)
