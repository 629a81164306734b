"""What the detector's tab computes: the objects of a picture, and a map for the chosen one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_attn._checks import mapping_of, number, one_of, whole
from captum_attn.detection import Detections, explain_detections
from captum_attn.errors import InputError
from captum_attn.insights.examples import Example
from captum_attn.insights.features import Batch, ImageFeature
from captum_attn.insights.methods import CAPTUM_METHODS, OF_DETECTIONS, Method
from captum_attn.insights.tab import ExamplesTab, one_at_a_time

__all__ = ["DetectionSession"]

MAX_DETECTIONS = 12  # shown of one picture, the likeliest


class DetectionSession(ExamplesTab):
    """A detector, pictures, and the methods that explain one of its detections.

    Args:
        models, feature, dataset, threshold, activation, id2label, methods, num_examples, presets,
            note: see `DetectionVisualizer`.

    Examples::

        >>> session = DetectionSession(detr, ImageFeature("Photo"), [Batch(images)])
        >>> found = session.detect("DETR", session.examples[0])
        >>> why = session.explain("DETR", session.examples[0], int(found.queries[0]), "ODAM")
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
        feature: ImageFeature,
        dataset: Iterable[Batch],
        *,
        threshold: float = 0.5,
        activation: str = "auto",
        id2label: Mapping[int, str] | None = None,
        methods: Sequence[Method] | None = None,
        num_examples: int = 32,
        presets: Mapping[str, Any] | None = None,
        note: str = "",
    ) -> None:
        self.threshold = number("threshold", threshold, 0, 1)
        one_of("activation", activation, ("auto", "softmax", "sigmoid"))
        if id2label is not None:
            mapping_of("id2label", id2label, "class to name")
        self._asked = {"activation": activation, "id2label": id2label}
        super().__init__(models, feature, dataset, methods, num_examples, presets, note)
        if len(self.features) != 1 or self.features[0].visualization_type() != "image":
            raise InputError(
                "feature: expected one ImageFeature, the picture that the detector gets; got "
                f"{[type(one).__name__ for one in self.features]}"
            )

    def offered(self) -> Sequence[Method]:
        """Those that have a meaning for one detection, and two of Captum's."""
        return (*OF_DETECTIONS, *CAPTUM_METHODS)

    def shown(self, example: Example) -> Tensor:
        """The picture that is drawn, (1, C, H, W)."""
        return torch.as_tensor(self.features[0].shown(example.inputs[0])).detach().cpu()

    def detect(self, model: str, example: Example, threshold: float | None = None) -> Detections:
        """The objects that the detector finds, the likeliest first, without maps.

        Args:
            model (str): its name.
            example (Example): one.
            threshold (float, optional): a detection's probability is above it. Default: the
                session's.

        Returns:
            Detections: at most 12; their boxes are in pixels of what is drawn.
        """
        least = self.threshold if threshold is None else number("threshold", threshold, 0, 1)
        with one_at_a_time, torch.no_grad():
            return self._found(
                _WithoutMap(self._model(model)), example,
                threshold=least, max_detections=MAX_DETECTIONS,
            )  # fmt: skip

    def explain(
        self,
        model: str,
        example: Example,
        query: int,
        method: str,
        options: Mapping[str, Any] | None = None,
    ) -> Detections:
        """The map of one detection.

        Args:
            model, method (str): their names.
            example (Example): one.
            query (int): the object query, one of `detect(...).queries`.
            options (Mapping, optional): the method's, by name, as a form has them.

        Returns:
            Detections: one, with its map.
        """
        kind, query = self._method(method), whole("query", query, 0)
        given = self._given(kind, options)
        with one_at_a_time:
            return self._found(kind(self._model(model)), example, queries=[query], **given)

    def _found(self, method: Any, example: Example, **given: Any) -> Detections:
        (inputs,) = self._transformed(example)
        size = tuple(self.shown(example).shape[-2:])
        asked = {"target_sizes": [size], **self._asked, **given}
        (found,) = explain_detections(method, inputs, **asked)
        return found


class _WithoutMap(Attribution):
    """In place of a method where only the boxes are asked for."""

    def attribute(self, inputs: Tensor, target: Any, additional_forward_args: Any = None) -> Tensor:
        return torch.zeros_like(inputs)
