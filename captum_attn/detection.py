"""Detections, each with its attribution: what in the image an object query looked at.

For detectors of the DETR family, and every other model that gives logits and a box for each query.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from captum._utils.progress import progress
from captum.attr import Attribution
from torch import Tensor

from captum_attn import _detector as detector
from captum_attn._checks import names_of, number, shown
from captum_attn.attr import AttentionAttribution, Result
from captum_attn.errors import InputError, OptionError
from captum_attn.observe.streams.states import InputMap
from captum_attn.observe.streams.to_inputs import check_interpolation

__all__ = ["Detections", "Missed", "explain_detections", "explain_missed"]

Explanation = tuple[Tensor, dict[str, Tensor], Tensor | None]  # map, tokens, grid


@dataclass(eq=False)
class Detections:
    """The detections of one image, the most probable first, each with its attribution.

    Nothing above the threshold is no error: n = 0, every tensor is empty, `tokens` has no entry.

    Args:
        boxes (Tensor): (n, 4), x_min, y_min, x_max, y_max in pixels of the image.
        labels (Tensor): (n,), the classes.
        scores (Tensor): (n,), their probabilities.
        queries (Tensor): (n,), the object queries: `(query, label)` is what was explained.
        names (list of str): the classes' names, their numbers where they have none.
        maps (Tensor): (n, H, W), the attribution of the image's pixels, summed over the channels.
        tokens (dict): stream name -> (n, n_tokens), relevance of every token; empty for methods
            that are not of this library, and for those that give relevance of pixels themselves.
        grid (Tensor or None): (n, h, w), relevance of the image's tokens as they lie on the whole
            input; None where they form no grid, and where `tokens` is empty.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    queries: Tensor
    names: list[str]
    maps: Tensor
    tokens: dict[str, Tensor] = field(default_factory=dict)
    grid: Tensor | None = None

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(eq=False)
class Missed(Detections):
    """Objects that were not detected, each with the query that came nearest.

    `boxes`, `scores`, `queries` and `maps` are that query's, `labels` and `names` the missed
    classes: the score is the probability that the query gives the missed class.

    Args:
        overlaps (Tensor): (n,), intersection over union of the query's box and the object's.
        lies_right (Tensor): (n,), bool: whether that is enough for a detection.
        likeliest (list of str): the query's own likeliest class, whose probability is
            `likeliest_scores` (n,).
    """

    overlaps: Tensor = field(default_factory=lambda: torch.empty(0))
    lies_right: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    likeliest: list[str] = field(default_factory=list)
    likeliest_scores: Tensor = field(default_factory=lambda: torch.empty(0))

    def __str__(self) -> str:
        lines = []
        for i, name in enumerate(self.names):
            where = "lies right" if self.lies_right[i] else "is the closest"
            lines.append(
                f"{name}: query {int(self.queries[i])} {where} (IoU {float(self.overlaps[i]):.2f}) "
                f"with {name} {float(self.scores[i]):.2f}; likeliest: {self.likeliest[i]} "
                f"{float(self.likeliest_scores[i]):.2f}"
            )
        return "\n".join(lines)


def explain_detections(
    method: Attribution,
    inputs: Tensor | Mapping[str, Any],
    *,
    threshold: float = 0.5,
    activation: str = "auto",
    queries: Sequence[int] | Sequence[Sequence[int]] | None = None,
    max_detections: int | None = None,
    target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
    id2label: Mapping[int, str] | None = None,
    show_progress: bool = False,
    **options: Any,
) -> list[Detections]:
    r"""Runs a detector and attributes every query that detects something.

    One forward pass, and as many backward passes as the image with the most detections has: the
    j-th detections of all images share one. A query counts once, under its likeliest class.

    Args:
        method (Attribution): a method on the detector, `GenericAttention(detector)`. The detector
            gives `.logits` (B, Q, classes) and `.pred_boxes` (B, Q, 4), normalised (x, y) of the
            centre, width and height, or a dict or a tuple of these two. Methods of Captum serve,
            too, with a pass of their own for each detection.
        inputs (Tensor or Mapping of str to Tensor): the images (B, C, H, W), or an image
            processor's output. With a `pixel_mask`, boxes and maps are those of the real image,
            without its padding at the right and at the bottom.
        threshold (float): a detection's probability is above it. Default: 0.5.
        activation (str): "softmax", with "no object" as the last class, or "sigmoid". Default:
            "auto", as the model's `config.num_labels` and the number of logits say: one more
            logit (DETR, Table Transformer, YOLOS), or as many (Conditional and Deformable DETR).
        queries (sequence, optional): these queries instead of those above the threshold, the same
            for every image or a sequence for each.
        max_detections (int, optional): at most so many for each image, the most probable.
        target_sizes (Tensor (B, 2) or sequence, optional): (height, width) of each image, to which
            boxes and maps are scaled. Default: the size of the input.
        id2label (Mapping, optional): class -> name. Default: the model's `config.id2label`.
        show_progress (bool): a progress bar over the detections. Default: False.
        **options: as for `attribute`: `objective`, `start_layer`, `interpolation`, and the
            method's own.

    Returns:
        list of Detections: one for each image.

    Raises:
        InputError: if the output has no boxes, or inputs or options do not fit.
        TargetError: if a query is out of range.
        OptionError: if the activation cannot be told.

    Examples::

        >>> inputs = processor(images, return_tensors="pt")
        >>> sizes = [image.size[::-1] for image in images]
        >>> found = explain_detections(GenericAttention(detr), inputs, target_sizes=sizes)
        >>> found[0].names, found[0].boxes, found[0].maps    # (n,), (n, 4), (n, H, W)
    """
    _check_method(method)
    detector.check_settings(threshold, activation, max_detections, id2label, show_progress)
    if queries is not None:
        detector.checked_queries(queries)
    if not isinstance(method, AttentionAttribution):
        _check_options(method, options)
    _, pixels = detector.images_of(inputs)
    real = detector.real_sizes(inputs, pixels)
    sizes = real if target_sizes is None else detector.checked_sizes(target_sizes, len(pixels))
    found: list[Detections] = []

    def choose(output: Any) -> list[list[tuple[int, int]]]:
        """For every j the (query, class) of each image's j-th detection."""
        logits, boxes = detector.logits_and_boxes(output, len(pixels))
        config = detector.config_of(method.forward_func)
        reads_text = isinstance(inputs, Mapping) and "input_ids" in inputs
        likely = detector.probabilities(logits, activation, config, reads_text)
        scores, labels = likely.max(-1)  # (B, Q)
        order, kept = detector.ordered(scores, threshold, queries)
        known = detector.names_of_classes(config, id2label)
        for b, size in enumerate(sizes):
            own = order[b][: kept[b]][:max_detections]
            found.append(
                Detections(
                    boxes=detector.corners(boxes[b, own], size),
                    labels=labels[b, own],
                    scores=scores[b, own],
                    queries=own,
                    names=[known.get(label, str(label)) for label in labels[b, own].tolist()],
                    maps=pixels.new_empty(0, *size),
                )
            )
        # An image with fewer detections asks about its first query again; the answer is not used.
        rows = [
            [int(order[b][j if j < len(own) else 0]) for b, own in enumerate(found)]
            for j in range(max(map(len, found)))
        ]
        return [[(query, int(labels[b, query])) for b, query in enumerate(row)] for row in rows]

    return _explained(method, inputs, choose, found, (real, sizes), dict(options), show_progress)


def explain_missed(
    method: Attribution,
    inputs: Tensor | Mapping[str, Any],
    box: Tensor | Sequence[Any],
    label: int | str | Sequence[int | str],
    *,
    min_overlap: float = 0.5,
    activation: str = "auto",
    target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
    id2label: Mapping[int, str] | None = None,
    show_progress: bool = False,
    **options: Any,
) -> Missed:
    r"""Explains why an object was not detected: the query that came nearest, and its map.

    Of the queries whose boxes overlap the object's by `min_overlap`, the nearest is the one with
    the highest probability of its class: it lies right, but its score is too low, or another class
    is likelier. Where none does, no query looked there, and it is the one whose box overlaps most,
    or whose corners are closest. What is attributed is its score of the missed class.

    Args:
        method (Attribution), inputs: as for `explain_detections`, of one image.
        box (Tensor or sequence): (4,) or (n, 4), x_min, y_min, x_max, y_max of the missed objects
            in pixels of the image.
        label (int, str or sequence of these): the class, or the class of each box, by number or
            name.
        min_overlap (float): the intersection over union from which on a box lies right.
            Default: 0.5.
        activation, target_sizes, id2label, show_progress, **options: as for `explain_detections`.

    Returns:
        Missed: for each box the nearest query, which `visualize_detections` draws.

    Raises:
        InputError: for boxes that are none, or for several images.
        TargetError: for a class that the detector has not.

    Examples::

        >>> missed = explain_missed(GenericAttention(detr), image, (12, 30, 90, 140), "cat")
        >>> print(missed)
        cat: query 17 lies right (IoU 0.82) with cat 0.31; likeliest: dog 0.62
        >>> visualize_detections(missed, image).save("missed.png")
    """
    _check_method(method)
    detector.check_settings(0.0, activation, None, id2label, show_progress)
    number("min_overlap", min_overlap, 0, 1, open_ends="(")
    if not isinstance(method, AttentionAttribution):
        _check_options(method, options)
    _, pixels = detector.images_of(inputs)
    if len(pixels) != 1:
        raise InputError(f"inputs: expected one image, got {len(pixels)}; explain each by itself")
    real = detector.real_sizes(inputs, pixels)
    sizes = real if target_sizes is None else detector.checked_sizes(target_sizes, 1)
    wanted = detector.checked_boxes(box, sizes[0])
    found: list[Detections] = []

    def choose(output: Any) -> list[list[tuple[int, int]]]:
        """The (query, class) of each missed object."""
        logits, boxes = detector.logits_and_boxes(output, 1)
        config = detector.config_of(method.forward_func)
        reads_text = isinstance(inputs, Mapping) and "input_ids" in inputs
        likely = detector.probabilities(logits, activation, config, reads_text)[0]  # (Q, classes)
        known = detector.names_of_classes(config, id2label)
        labels = detector.classes_of(label, known, likely.shape[1], len(wanted))
        placed = detector.corners(boxes[0], sizes[0])
        overlaps, apart = detector.overlaps(wanted.to(placed), placed)  # (n, Q)
        scores = likely[:, labels].T  # (n, Q)
        right = overlaps >= min_overlap
        closest = torch.where((overlaps > 0).any(1), overlaps.argmax(1), apart.argmin(1))
        likeliest = torch.where(right, scores, -1).argmax(1)
        nearest = torch.where(right.any(1), likeliest, closest)
        best, instead = likely[nearest].max(-1)
        rows = torch.arange(len(wanted), device=nearest.device)
        found.append(
            Missed(
                boxes=placed[nearest],
                labels=torch.tensor(labels, device=nearest.device),
                scores=scores[rows, nearest],
                queries=nearest,
                names=[known.get(one, str(one)) for one in labels],
                maps=pixels.new_empty(0, *sizes[0]),
                overlaps=overlaps[rows, nearest],
                lies_right=right[rows, nearest],
                likeliest=[known.get(one, str(one)) for one in instead.tolist()],
                likeliest_scores=best,
            )
        )
        return [[pair] for pair in zip(nearest.tolist(), labels, strict=True)]

    places = (real, sizes)
    (made,) = _explained(method, inputs, choose, found, places, dict(options), show_progress)
    assert isinstance(made, Missed)
    return made


def _explained(
    method: Attribution,
    inputs: Any,
    choose: Callable[[Any], Any],
    found: list[Detections],
    places: tuple[list[detector.Size], list[detector.Size]],
    options: dict[str, Any],
    show_progress: bool,
) -> list[Detections]:
    """What `choose` found, with its maps, from the images' real sizes to the wanted ones."""
    explain = _from_one_pass if isinstance(method, AttentionAttribution) else _from_own_passes
    real, sizes = places
    made: list[list[Explanation]] = [[] for _ in sizes]
    mode = options.get("interpolation", "bilinear")
    for j, (maps, tokens, grid) in enumerate(
        explain(method, inputs, choose, options, show_progress)
    ):
        for b, own in enumerate(found):
            if j < len(own):
                height, width = real[b]
                laid = _resized(maps[b, :height, :width], sizes[b], mode)
                streams = {name: rows[b] for name, rows in tokens.items()}
                made[b].append((laid, streams, None if grid is None else grid[b]))
    return [_with(own, explained) for own, explained in zip(found, made, strict=True)]


def _check_method(method: Any) -> None:
    if not isinstance(method, Attribution):
        raise OptionError(
            "method: expected a method on the detector, such as GenericAttention(detector); got "
            f"{shown(method)}"
        )


def _check_options(method: Attribution, options: Mapping[str, Any]) -> None:
    """Refuses what a method of Captum would meet with a TypeError, a pass later."""
    parameters = inspect.signature(method.attribute).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given = {"inputs", "target", "additional_forward_args", "self"}
        names_of(f"{method.get_name()}'s options", options, [*(set(parameters) - given)],
                 OptionError)  # fmt: skip


def _with(own: Detections, made: list[Explanation]) -> Detections:
    """The detections of one image with what explains each of them."""
    if not made:
        return own
    maps, tokens, grids = zip(*made, strict=True)
    return replace(
        own,
        maps=torch.stack(maps),
        tokens={name: torch.stack([rows[name] for rows in tokens]) for name in tokens[0]},
        grid=None if grids[0] is None else torch.stack(grids),
    )


def _resized(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(H, W) scaled to another size; the values stay, as they are a patch's relevance."""
    if image.shape == size:
        return image
    smooth = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(image[None, None], size, mode=mode, **smooth)[0, 0]


# ---------------------------------------------------------------------------- explaining
def _from_one_pass(
    method: AttentionAttribution,
    inputs: Any,
    choose: Callable[[Any], Any],
    options: dict[str, Any],
    show_progress: bool,
) -> Iterator[Explanation]:
    """The explanations of every target from one forward pass."""
    interpolation = options.pop("interpolation", "bilinear")
    check_interpolation(interpolation)
    image, _ = detector.images_of(inputs)

    def make(result: Result) -> Explanation:
        laid = result.attributions(inputs, interpolation)
        laid = laid[image] if image else laid
        if result.of_tokens is None:  # relevance of pixels, made without any tokens
            return laid.sum(1), {}, None
        grid = _grid(result, image or result.run.observation.names[0])
        return laid.sum(1), result.tokens(), grid

    return method.explain_each(inputs, choose, make, show_progress=show_progress, **options)


def _from_own_passes(
    method: Attribution,
    inputs: Any,
    choose: Callable[[Any], Any],
    options: dict[str, Any],
    show_progress: bool,
) -> Iterator[Explanation]:
    """The same with a method of Captum, which runs the detector anew for every target."""
    image, pixels = detector.images_of(inputs)
    forward_func = method.forward_func
    others = {n: v for n, v in inputs.items() if n != image} if image else {}

    def output(images: Tensor, *values: Any) -> Any:
        named = {image: images, **dict(zip(others, values, strict=True))}
        return forward_func(**named) if image else forward_func(images)

    method = copy.copy(method)
    method.forward_func = lambda *x: detector.logits_and_boxes(output(*x), len(x[0]))[0]
    extra = tuple(others.values()) or None
    with torch.no_grad():
        targets = choose(output(pixels, *others.values()))
    name = f"{method.get_name()} attribution"
    for target in progress(targets, desc=name) if show_progress else targets:
        laid = method.attribute(pixels, target=target, additional_forward_args=extra, **options)
        yield laid.detach().sum(1), {}, None


def _grid(result: Result, image: str) -> Tensor | None:
    """Relevance of the image's tokens as they lie on it, (B, h, w); None if they form no grid."""
    for source in result.sources:
        for entry in source.entries:
            if entry.leaf.name == image and entry.to is not None:
                cells = _cells(entry, entry.to)
                if cells is not None:
                    rows = result.rows_of(source)
                    cells = cells.expand(len(rows), -1, -1)
                    taken = rows.gather(1, cells.flatten(1).clamp_min(0)).view(cells.shape)
                    return taken * (cells >= 0)
    return None


def _cells(entry: InputMap, to: Tensor) -> Tensor | None:
    """The token of every cell of the grid, (B or 1, h, w); -1 for none."""
    cells = to.view(len(to), *entry.shape)
    if entry.axes is not None:  # a feature map that runs along these axes of the image
        return cells if entry.axes == (1, 2) else cells.mT if entry.axes == (2, 1) else None
    if cells.ndim != 4:
        return None
    cells = cells[:, 0]  # every channel of a pixel enters the same token
    for axis in (1, 2):  # one row and one column of each patch
        changes = cells.diff(dim=axis).movedim(axis, 0).flatten(1).any(1)
        first = torch.cat([changes.new_ones(1), changes])
        cells = cells.index_select(axis, first.nonzero()[:, 0])
    return cells
