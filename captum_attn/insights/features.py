"""What a dashboard shows: batches of examples, and how each input of the model is drawn.

The notions, names and arguments are those of Captum Insights, so that a feature made for one
dashboard works in the other: here Captum's own features, and these in captum 0.8's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from captum_attn._checks import callable_of, listed, shown, text, texts, whole
from captum_attn.errors import InputError
from captum_attn.insights.pictures import drawn, drawn_regions
from captum_attn.insights.uploads import Picture, fitted

__all__ = [
    "BaseFeature",
    "Batch",
    "EmptyFeature",
    "FeatureOutput",
    "GeneralFeature",
    "ImageFeature",
    "RegionFeature",
    "TextFeature",
]

Transforms = Callable | Sequence[Callable] | None


class Batch:
    """Examples of a data set, as `captum.insights.Batch`.

    Args:
        inputs (Tensor or tuple of Tensor): one (B, ...) for each feature, before its transforms.
        labels (Tensor, optional): (B,), the right classes.
        additional_args (any, optional): further positional arguments of the model, which get no
            attribution; a Tensor of B rows is split with the examples.
        names (sequence of str, optional): B names of the examples, for the list of them.

    Examples::

        >>> Batch(inputs=images, labels=torch.tensor([3, 5]))
    """

    def __init__(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        labels: Tensor | None = None,
        additional_args: Any = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.inputs, self.labels, self.additional_args = inputs, labels, additional_args
        self.names = names


class FeatureOutput(NamedTuple):
    """One input of one example, drawn.

    Attributes:
        name (str): of the feature.
        base: the input: a PNG in base64, words, or labels of numbers.
        modified: its attribution: a PNG in base64, or one number in [-100, 100] for each of `base`.
        type (str): "image", "text", "general" or "empty".
        contribution (float): the input's share of all relevance, signed.
    """

    name: str
    base: Any
    modified: Any
    type: str
    contribution: float


class BaseFeature:
    """One input of the model: how it is brought to the model and how it is drawn.

    Args:
        name (str): shown above it.
        baseline_transforms (callable or list, optional): from one transformed example to the
            baseline, which Captum's methods start from and which stands in the deletion curve
            where units were removed; the first counts. Default: zeros.
        input_transforms (callable or list, optional): from one example of the data set to what
            the model gets, such as a normalisation.
        visualization_transform (callable, optional): from the example (1, ...) of the data set to
            what is drawn.
    """

    kind: ClassVar[str] = ""

    def __init__(
        self,
        name: str,
        baseline_transforms: Transforms = None,
        input_transforms: Transforms = None,
        visualization_transform: Callable | None = None,
    ) -> None:
        self.name = text("name", name)
        self.baseline_transforms = _as_list("baseline_transforms", baseline_transforms)
        self.input_transforms = _as_list("input_transforms", input_transforms)
        _optional("visualization_transform", visualization_transform)
        self.visualization_transform = visualization_transform

    @classmethod
    def visualization_type(cls) -> str:
        """The kind of its drawing, see `FeatureOutput`."""
        return cls.kind

    def visualize(self, attribution: Tensor, data: Tensor, contribution_frac: float) -> Any:
        """Draws one example (1, ...) of the data set with its attribution of the same shape."""
        raise NotImplementedError

    def shown(self, data: Tensor) -> Any:
        """What is drawn of an example."""
        return self.visualization_transform(data) if self.visualization_transform else data


class ImageFeature(BaseFeature):
    """An image (B, C, H, W), one channel or three.

    Args:
        name, baseline_transforms, input_transforms, visualization_transform: see `BaseFeature`.
        upload (callable, optional): from the user's picture, a PIL image in RGB, to an example
            (C, H, W) of the data set. Default: resized to the size of the examples, in [0, 1],
            grey where they have one channel.
        patch_size (int, optional): what is removed as one in the deletion curve. Default: pixels.

    Examples::

        >>> ImageFeature("Photo", baseline_transforms=lambda x: x * 0, input_transforms=normalize)
    """

    kind = "image"

    def __init__(
        self,
        name: str,
        baseline_transforms: Transforms = None,
        input_transforms: Transforms = None,
        visualization_transform: Callable | None = None,
        *,
        upload: Callable[[Picture], Tensor] | None = None,
        patch_size: int | None = None,
    ) -> None:
        super().__init__(name, baseline_transforms, input_transforms, visualization_transform)
        _optional("upload", upload)
        self.patch_size = None if patch_size is None else whole("patch_size", patch_size)
        self.upload = upload

    def read(self, picture: Picture, like: Tensor) -> Tensor:
        """The user's picture as an example (1, C, H, W) that is `like` another."""
        made = fitted(picture, like.shape[1:]) if self.upload is None else self.upload(picture)
        if not isinstance(made, Tensor) or made.shape != like.shape[1:]:
            got = tuple(made.shape) if isinstance(made, Tensor) else shown(made)
            raise InputError(
                f"{self.name}: expected `upload` to return {tuple(like.shape[1:])}, as the "
                f"examples have, got {got}"
            )
        return made[None].to(like)

    def visualize(
        self, attribution: Tensor, data: Tensor, contribution_frac: float
    ) -> FeatureOutput:
        shown = torch.as_tensor(self.shown(data)).detach().cpu()[0]
        heat = attribution.detach().cpu()[0].sum(0)
        return FeatureOutput(
            self.name,
            drawn(heat, shown, "original_image"),
            drawn(heat, shown, "blended_heat_map"),
            self.kind,
            contribution_frac,
        )


class TextFeature(BaseFeature):
    """Token ids (B, n), or embeddings (B, n, D).

    Args:
        name, baseline_transforms, input_transforms: see `BaseFeature`.
        visualization_transform (callable): from the ids (1, n) to a list of n words.
        tokenize (callable, optional): from the user's text to ids (1, n), or to a tuple of them and
            the additional arguments that go with them. Without it no text can be typed.
        special_ids (sequence of int): ids of tokens that are no words ([CLS], [SEP], padding);
            never removed in the deletion curve.

    Examples::

        >>> TextFeature("Text", None, None, lambda ids: tokenizer.convert_ids_to_tokens(ids[0]))
    """

    kind = "text"

    def __init__(
        self,
        name: str,
        baseline_transforms: Transforms = None,
        input_transforms: Transforms = None,
        visualization_transform: Callable | None = None,
        *,
        tokenize: Callable[[str], Any] | None = None,
        special_ids: Sequence[int] = (),
    ) -> None:
        super().__init__(name, baseline_transforms, input_transforms, visualization_transform)
        _optional("tokenize", tokenize)
        given = listed("special_ids", special_ids, "ids")
        self.special_ids = tuple(whole("special_ids", one, 0) for one in given)
        self.tokenize = tokenize

    def visualize(
        self, attribution: Tensor, data: Tensor, contribution_frac: float
    ) -> FeatureOutput:
        values = attribution.detach().squeeze(0)
        values = values.sum(-1) if values.ndim > 1 else values  # (n,)
        words = [str(word) for word in self.shown(data)]
        if len(words) != len(values):
            raise InputError(
                f"{self.name}: expected `visualization_transform` to return one word for each of "
                f"the {len(values)} tokens, got {len(words)}"
            )
        return FeatureOutput(self.name, words, _percent(values), self.kind, contribution_frac)


class RegionFeature(BaseFeature):
    """Features of regions (B, R, D) of a picture, such as a detector's.

    Args:
        name, baseline_transforms, input_transforms: see `BaseFeature`.
        visualization_transform (callable): from the features (1, R, D) to the picture (C, H, W)
            and the regions' boxes (R, 4), x_min, y_min, x_max, y_max in pixels.

    Examples::

        >>> RegionFeature("Regions", None, None, lambda features: (picture, boxes))
    """

    kind = "image"

    def visualize(
        self, attribution: Tensor, data: Tensor, contribution_frac: float
    ) -> FeatureOutput:
        picture, boxes = self.shown(data)
        values = attribution.detach().cpu()[0].sum(-1).double()  # (R,)
        return FeatureOutput(
            self.name,
            drawn_regions(torch.zeros_like(values), picture, boxes),
            drawn_regions(values, picture, boxes),
            self.kind,
            contribution_frac,
        )


class GeneralFeature(BaseFeature):
    """Numbers (B, C) with a name each.

    Args:
        name (str): shown above them.
        categories (list of str): C names.

    Examples::

        >>> GeneralFeature("Passenger", ["age", "fare"])
    """

    kind = "general"

    def __init__(self, name: str, categories: Sequence[str]) -> None:
        super().__init__(name)
        self.categories = texts("categories", categories)

    def visualize(
        self, attribution: Tensor, data: Tensor, contribution_frac: float
    ) -> FeatureOutput:
        values, numbers = attribution.detach().squeeze(0), data.squeeze(0).tolist()
        if len(numbers) != len(self.categories):
            raise InputError(
                f"{self.name}: expected {len(self.categories)} numbers, one for each category, got "
                f"{len(numbers)}"
            )
        base = [f"{c}: {d:.2f}" for c, d in zip(self.categories, numbers, strict=True)]
        return FeatureOutput(self.name, base, _percent(values), self.kind, contribution_frac)


class EmptyFeature(BaseFeature):
    """An input that is not drawn, such as positions."""

    kind = "empty"

    def __init__(
        self,
        name: str = "empty",
        baseline_transforms: Transforms = None,
        input_transforms: Transforms = None,
        visualization_transform: Callable | None = None,
    ) -> None:
        super().__init__(name, baseline_transforms, input_transforms, visualization_transform)

    def visualize(
        self, attribution: Tensor, data: Tensor, contribution_frac: float
    ) -> FeatureOutput:
        return FeatureOutput(self.name, None, None, self.kind, contribution_frac)


def _as_list(name: str, transforms: Transforms) -> list[Callable]:
    if transforms is None:
        return []
    if callable(transforms):
        return [transforms]
    found = listed(name, transforms, "callables")
    return [callable_of(f"{name}[{i}]", one) for i, one in enumerate(found)]


def _optional(name: str, value: Any) -> None:
    if value is not None:
        callable_of(name, value, "a callable or None")


def _percent(values: Tensor) -> list[float]:
    """In [-100, 100], the largest magnitude at its end; zeros stay."""
    largest = float(values.abs().max())
    return [100 * value / largest if largest else 0.0 for value in values.tolist()]
