"""What a detector says of its images: logits and boxes, probabilities, the images' real sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_attn._checks import (
    FAILURES,
    finite,
    flag,
    listed,
    mapping_of,
    number,
    one_of,
    scalar,
    shown,
    suggested,
    whole,
)
from captum_attn.errors import InputError, OptionError, TargetError
from captum_attn.observe.capture.attention_call import working_dtype
from captum_attn.observe.capture.restore import modules_of

ACTIVATIONS = ("auto", "softmax", "sigmoid")
MAX_SIDE = 2**16  # of an image, in pixels
Size = tuple[int, int]  # height, width


def logits_and_boxes(output: Any, batch: int) -> tuple[Tensor, Tensor]:
    """(B, Q, classes) and (B, Q, 4), from an output object, a dict or a tuple."""
    if isinstance(output, (tuple, list)):
        logits, boxes = (*output, None, None)[:2]
    elif isinstance(output, Mapping):
        logits, boxes = output.get("logits"), output.get("pred_boxes")
    else:
        logits, boxes = getattr(output, "logits", None), getattr(output, "pred_boxes", None)
    if not _fit(logits, boxes, batch):
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else None for v in (logits, boxes)]
        raise InputError(
            f"expected a detector with logits ({batch}, queries, classes) and boxes ({batch}, "
            "queries, 4), as `.logits` and `.pred_boxes`, a dict with these names or a tuple in "
            f"this order; got {type(output).__name__} with {shapes[0]} and {shapes[1]}"
        )
    for name, values in {"logits": logits.detach().softmax(-1), "boxes": boxes.detach()}.items():
        finite(f"the detector's {name}", values, "look at its weights and inputs")
    return logits, boxes.detach()


def _fit(logits: Any, boxes: Any, batch: int) -> bool:
    if not isinstance(logits, Tensor) or not isinstance(boxes, Tensor) or logits.ndim != 3:
        return False
    numbers = all(t.is_floating_point() and t.layout == torch.strided for t in (logits, boxes))
    some = logits.shape[0] == batch and logits.numel() > 0
    return numbers and some and boxes.shape == (batch, logits.shape[1], 4)


def config_of(forward_func: Any) -> Any:
    """The configuration of the outermost module that has one with a number of labels; or None."""
    modules = (module for root in modules_of(forward_func) for module in root.modules())
    configs = (getattr(module, "config", None) for module in modules)
    return next((c for c in configs if getattr(c, "num_labels", None) is not None), None)


def probabilities(logits: Tensor, activation: str, config: Any, reads_text: bool) -> Tensor:
    """Probability of every class, (B, Q, classes); "no object" is left out.

    Args:
        activation (str): "softmax", "sigmoid", or "auto": what the number of logits says.
        config: the model's configuration, or None.
        reads_text (bool): whether the classes are texts among the inputs, so that `config` does
            not tell their number.
    """
    width, labels = logits.shape[-1], getattr(config, "num_labels", None)
    if activation == "auto":
        told = {} if labels is None or reads_text else {labels + 1: "softmax", labels: "sigmoid"}
        if width not in told or getattr(config, "use_focal_loss", None) is False:
            raise OptionError(
                f"activation: what turns the {width} logits of a query into probabilities could "
                f"not be observed (config.num_labels: {labels}); expected 'softmax' where the "
                "last class is 'no object', else 'sigmoid'"
            )
        activation = told[width]
    logits = logits.detach().to(working_dtype(logits.dtype))
    if activation == "sigmoid":
        return logits.sigmoid()
    if width < 2:
        raise OptionError("activation: expected 'sigmoid' for a single logit, got 'softmax'")
    return logits.softmax(-1)[..., :-1]


def names_of_classes(config: Any, id2label: Mapping[int, str] | None) -> dict[int, str]:
    """Class -> name, as given or as the model's configuration has it.

    The stand-ins of transformers, "LABEL_6", are no names.
    """
    known = (getattr(config, "id2label", None) if id2label is None else id2label) or {}
    return {
        number: str(name)
        for number, name in known.items()
        if id2label is not None or str(name) != f"LABEL_{number}"
    }


def classes_of(given: Any, known: Mapping[int, str], count: int, boxes: int) -> list[int]:
    """The classes of so many boxes, by their numbers or names."""
    several = isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) > 0
    each = listed("label", given, "classes") if several else [given] * boxes
    if len(each) != boxes:
        raise TargetError(
            f"label: expected a class, or one for each of {boxes} boxes, got {shown(given)}"
        )
    numbers = {name.casefold(): number for number, name in reversed(list(known.items()))}
    found = []
    for one in each:
        if isinstance(one, str):
            if one.casefold() not in numbers:
                names = list(known.values())
                raise TargetError(
                    f"label: expected a number below {count} or one of {names[:12]}, got {one!r}"
                    f"{suggested(one, names)}"
                )
            one = numbers[one.casefold()]
        found.append(whole("label", one, 0, count - 1, TargetError))
    return found


def checked_boxes(box: Any, size: Size) -> Tensor:
    """Boxes (n, 4) in float64, each with an area inside the image."""
    expected = "(x_min, y_min, x_max, y_max) in pixels of the image, or (n, 4) of them"
    try:
        odd = isinstance(box, Tensor) and (
            box.is_nested or box.layout != torch.strided or box.is_complex()
        )
        if odd:  # a cast would drop the imaginary part, and the rest fails later
            raise TypeError("no dense real numbers")
        found = torch.as_tensor(box, dtype=torch.float64, device="cpu").detach()
    except FAILURES as problem:
        raise InputError(f"box: expected {expected}, got {shown(box)}") from problem
    found = found[None] if found.ndim == 1 else found
    if found.ndim != 2 or found.shape[1] != 4 or not len(found):
        raise InputError(f"box: expected {expected}, got {tuple(found.shape)}")
    finite("box", found, expected)
    said, (height, width) = shown(found.tolist()), size
    x1, y1, x2, y2 = found.unbind(1)
    if bool(((x1 >= x2) | (y1 >= y2)).any()):
        raise InputError(f"box: expected {expected}, x_min < x_max and y_min < y_max; got {said}")
    if bool(((x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0)).any()):
        raise InputError(f"box: expected {expected}, of {width} x {height}; got {said}")
    if bool((found.abs() <= 1).all()) and max(size) > 2:
        raise InputError(f"box: expected {expected}, got {said}; multiply it by width and height")
    return found


def overlaps(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Of corners (n, 4) and (m, 4): IoU, and how far apart they are (L1), both (n, m)."""
    one, two = boxes[:, None], others[None]
    inside = (torch.minimum(one, two)[..., 2:] - torch.maximum(one, two)[..., :2]).clamp_min(0)
    areas = [(b[..., 2:] - b[..., :2]).clamp_min(0).prod(-1) for b in (one, two)]
    common = inside.prod(-1)
    return common / (areas[0] + areas[1] - common), (one - two).abs().sum(-1)


def ordered(scores: Tensor, threshold: float, queries: Any) -> tuple[list[Tensor], list[int]]:
    """All queries of each image, those that are kept first, and the number of these.

    Args:
        scores (Tensor): (B, Q).
        queries (sequence or None): those that are kept, as for `explain_detections`.
    """
    batch, count = scores.shape
    order = list(scores.argsort(dim=1, descending=True, stable=True))
    if queries is None:
        return order, (scores > threshold).sum(1).tolist()
    rows = checked_queries(queries)
    if not any(isinstance(row, (Sequence, Tensor)) for row in rows):
        rows = [rows] * batch
    if len(rows) != batch or not all(isinstance(row, (Sequence, Tensor)) for row in rows):
        raise TargetError(
            f"queries: expected numbers of queries, or a sequence of them for each of the {batch} "
            f"images; got {queries!r}"
        )
    try:
        given = [torch.as_tensor(row, device=scores.device) for row in rows]
    except FAILURES as problem:
        raise TargetError(
            f"queries: expected numbers in [0, {count}), got {shown(queries)}"
        ) from problem
    for row in given:
        other = row.is_floating_point() or row.is_complex() or row.dtype == torch.bool
        beyond = bool(((row < 0) | (row >= count)).any()) if not row.is_complex() else True
        if row.ndim != 1 or (row.numel() and other) or beyond:
            raise TargetError(f"queries: expected numbers in [0, {count}), got {row.tolist()}")
    pairs = zip(given, order, strict=True)
    return [torch.cat([row.long(), rest]) for row, rest in pairs], [len(row) for row in given]


def corners(boxes: Tensor, size: Size) -> Tensor:
    """Normalised centre, width and height -> x_min, y_min, x_max, y_max in pixels; (n, 4)."""
    centre, extent = boxes.to(working_dtype(boxes.dtype)).chunk(2, -1)
    height, width = size
    normalised = torch.cat([centre - extent / 2, centre + extent / 2], -1)
    return normalised * normalised.new_tensor([width, height, width, height])


def images_of(inputs: Any) -> tuple[str, Tensor]:
    """The images among the inputs, (B, C, H, W), and the name of their entry ("" for a tensor)."""
    given = inputs if isinstance(inputs, Mapping) else {"": inputs}
    images = {
        name: value
        for name, value in given.items()
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
    }
    if len(images) != 1:
        found = {n: tuple(v.shape) for n, v in given.items() if isinstance(v, Tensor)}
        raise InputError(
            "expected images (B, C, H, W) of floats, or a Mapping with one such entry; got "
            f"{found or type(inputs).__name__}"
        )
    return next(iter(images.items()))


def real_sizes(inputs: Any, pixels: Tensor) -> list[Size]:
    """Size of every image without the padding at its right and bottom, which `pixel_mask` tells."""
    mask = inputs.get("pixel_mask") if isinstance(inputs, Mapping) else None
    height, width = pixels.shape[-2:]
    if mask is None:
        return [(height, width)] * len(pixels)
    whole_mask = isinstance(mask, Tensor) and mask.layout == torch.strided and not mask.is_meta
    if not whole_mask or mask.shape != (len(pixels), height, width):
        raise InputError(
            f"pixel_mask: expected ({len(pixels)}, {height}, {width}), got {shown(mask)}"
        )
    sizes = []
    for real in mask.bool():
        h, w = int(real.any(-1).sum()), int(real.any(0).sum())
        if not h or int(real.sum()) != h * w or not real[h - 1, w - 1]:
            raise InputError(
                f"pixel_mask: expected ({len(pixels)}, {height}, {width}) with 1 on the upper left "
                f"rectangle of each image and 0 on its padding, got {tuple(mask.shape)} otherwise"
            )
        sizes.append((h, w))
    return sizes


def checked_sizes(target_sizes: Any, batch: int) -> list[Size]:
    """`target_sizes` as pairs (height, width)."""
    expected = f"(height, width) for each of the {batch} images"
    try:
        given = target_sizes.tolist() if isinstance(target_sizes, Tensor) else target_sizes
        rows = [listed("target_sizes", row) for row in listed("target_sizes", given, expected)]
    except FAILURES as problem:
        raise InputError(
            f"target_sizes: expected {expected}, got {shown(target_sizes)}"
        ) from problem
    if len(rows) != batch or any(len(row) != 2 for row in rows):
        raise InputError(f"target_sizes: expected {expected}, got {shown(target_sizes)}")
    return [(_side(height), _side(width)) for height, width in rows]


def _side(value: Any) -> int:
    """A side in pixels; processors give whole numbers, as floats or tensors, too."""
    value = scalar(value)
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return whole("target_sizes", value, 1, MAX_SIDE, InputError)


def checked_queries(queries: Any) -> list[Any]:
    """The queries that are asked about, or those of each image."""
    try:
        given = queries.tolist() if isinstance(queries, Tensor) else queries
        return listed("queries", given, "numbers of queries")
    except FAILURES as problem:
        raise TargetError(
            f"queries: expected numbers of queries, got {shown(queries)}"
        ) from problem


def check_settings(
    threshold: Any, activation: Any, max_detections: Any, id2label: Any, show_progress: Any
) -> None:
    """Refuses what no detector can be asked."""
    number("threshold", threshold, 0, 1, error=InputError)
    one_of("activation", activation, ACTIVATIONS)
    if max_detections is not None:
        whole("max_detections", max_detections, error=InputError)
    if id2label is not None:
        mapping_of("id2label", id2label, "class to name", InputError)
    flag("show_progress", show_progress)
