"""What a dashboard computes, without the page around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_attn._checks import callable_of, finite, flag, texts, whole
from captum_attn.insights.examples import Example
from captum_attn.insights.features import BaseFeature, Batch, FeatureOutput
from captum_attn.insights.methods import CAPTUM_METHODS, METHODS, OF_WORDS, Method
from captum_attn.insights.tab import ExamplesTab, one_at_a_time, through
from captum_attn.metrics import Curve, RandomAttribution, perturbation_curve
from captum_attn.metrics.shared import tensor_of

__all__ = ["Explanation", "Prediction", "Session"]

TOP = 4  # predictions shown, as in Captum Insights
STEPS = 20  # of the deletion curve
ORDERS = 10  # random ones
REMEMBERED = 64  # curves of random orders


class Prediction(NamedTuple):
    """One class and its score."""

    target: int
    label: str
    score: float


@dataclass(frozen=True)
class Explanation:
    """Why one example got one class, by one method.

    Attributes:
        method (str): the method's name.
        target (int, optional): the explained class; None for a model with one score.
        attributions (tuple of Tensor): (1, ...), one for each input, of the shape that the model
            got.
        outputs (list of FeatureOutput): the inputs, drawn.
    """

    method: str
    target: int | None
    attributions: tuple[Tensor, ...]
    outputs: list[FeatureOutput]


class Session(ExamplesTab):
    """The models, examples and methods of one dashboard.

    Args:
        models, classes, features, dataset, score_func, use_label_for_attr, methods, num_examples,
            presets, note: see `AttributionVisualizer`.

    Examples::

        >>> session = Session(model, classes, [ImageFeature("Photo")], [Batch(images, labels)])
        >>> why = session.explain("ViT", session.examples[0], "VTranM", {}, target=None)
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
        classes: Sequence[str],
        features: BaseFeature | Sequence[BaseFeature],
        dataset: Iterable[Batch],
        score_func: Callable | None = None,
        use_label_for_attr: bool = True,
        *,
        methods: Sequence[Method] | None = None,
        num_examples: int = 32,
        presets: Mapping[str, Any] | None = None,
        note: str = "",
    ) -> None:
        self._chances: dict[Any, tuple[Example, Curve]] = {}
        self.classes = texts("classes", classes)
        if score_func is not None:
            callable_of("score_func", score_func, "a callable of the model's output, or None")
        self.score_func = score_func
        self.use_label_for_attr = flag("use_label_for_attr", use_label_for_attr)
        super().__init__(models, features, dataset, methods, num_examples, presets, note)

    # ------------------------------------------------------------------------ computed
    def predict(self, model: str, example: Example, top: int = TOP) -> list[Prediction]:
        """The classes with the highest scores, the highest first.

        Args:
            model (str): its name.
            example (Example): one.
            top (int): at most so many. Default: 4.

        Returns:
            list of Prediction: one, for a model with one score.
        """
        top = whole("top", top)
        with one_at_a_time, torch.no_grad():
            inputs = self._transformed(example)
            scores = self._scores(tensor_of(self._model(model)(*inputs, *example.additional)))[0]
        finite("the model's scores", scores, "look at its weights and at the input")
        if scores.numel() == 1:
            index = int(scores.round())
            return [Prediction(index, self._label(index), float(scores))]
        found = scores.topk(min(top, len(scores)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [Prediction(index, self._label(index), score) for index, score in pairs]

    def explain(
        self,
        model: str,
        example: Example,
        method: str,
        options: Mapping[str, Any] | None = None,
        target: int | None = None,
    ) -> Explanation:
        """Attributions of every input, and their pictures.

        Args:
            model, method (str): their names.
            example (Example): one.
            options (Mapping, optional): the method's, by name, as a form has them.
            target (int, optional): the class. Default: the predicted one.

        Returns:
            Explanation: its attributions are those of the method itself, called with the
            transformed inputs.
        """
        with one_at_a_time:
            target = self._target(model, example, target)
            attribution, made = self._method(method)(self._model(model)), self._transformed(example)
            keywords = self._given(self._method(method), options)
            if "baselines" in inspect.signature(attribution.attribute).parameters:
                keywords["baselines"] = self._baselines(made)
            more = {"additional_forward_args": example.additional or None, **keywords}
            found = tuple(v.detach() for v in attribution.attribute(made, target=target, **more))
            drawn = zip(self.features, found, example.inputs, _shares(found), strict=True)
            outputs = [f.visualize(values, data, share) for f, values, data, share in drawn]
        return Explanation(method, target, found, outputs)

    def deletion(
        self, model: str, example: Example, attributions: Sequence[Tensor], target: int | None
    ) -> Curve:
        """The score of the target while the most relevant units give way to the baseline.

        The units of all drawn inputs are ranked together, by their relevance.

        Args:
            model (str): its name.
            example (Example): one.
            attributions (tuple of Tensor): of any method.
            target (int, optional): the explained class; None for a model with one score.

        Returns:
            Curve: of 21 fractions, from 0 to 1.
        """
        with one_at_a_time:
            made = self._transformed(example)
            return perturbation_curve(
                self._model(model), made, tuple(attributions), target, example.additional or None,
                measure=lambda output, _: self._score_of(output, target),
                steps=STEPS, perturbations_per_eval=STEPS + 2, **self._units(example, made),
            )  # fmt: skip

    def chance(self, model: str, example: Example, target: int | None) -> Curve:
        """`deletion` in ten random orders, a row for each: what a method has to beat."""
        key = model, id(example.inputs[0]), target
        if key in self._chances:
            return self._chances[key][1]
        curves = []
        with one_at_a_time:
            made = self._transformed(example)
            for seed in range(ORDERS):
                random = RandomAttribution(self._model(model), seed).attribute(made, target=target)
                curves.append(self.deletion(model, example, random, target))
        found = curves[0]._replace(values=torch.cat([curve.values for curve in curves]))
        if len(self._chances) >= REMEMBERED:
            self._chances.clear()
        self._chances[key] = example, found  # the example is kept, and with it its id
        return found

    # ------------------------------------------------------------------------ parts
    def offered(self) -> Sequence[Method]:
        """All; two of Captum's where every input is of floats, none of pixels where one is not."""
        with torch.no_grad():
            made = self._transformed(self.examples[0])
        floats = all(value.is_floating_point() for value in made)
        return (*METHODS, *CAPTUM_METHODS) if floats else OF_WORDS

    def without_effect(self) -> set[str]:
        """Those of images where there is none, those of streams where one is."""
        kinds = [feature.visualization_type() for feature in self.features]
        found = set() if "image" in kinds else {"interpolation"}
        return found if len(kinds) > 1 else found | {"self_in_rule_10", "noise_link"}

    def _units(self, example: Example, made: tuple[Tensor, ...]) -> dict[str, Any]:
        """What the deletion curve removes: patches where they are known, and no special tokens."""
        baselines = self._baselines(made)
        drawn = [i for i, f in enumerate(self.features) if f.visualization_type() != "empty"]
        sizes = {i: getattr(self.features[i], "patch_size", None) for i in drawn}
        words = {
            i: ~torch.isin(example.inputs[i], torch.tensor(special))
            for i in drawn
            if (special := getattr(self.features[i], "special_ids", ()))
        }
        sized = {i: size for i, size in sizes.items() if size}
        given: dict[str, Any] = {
            "fill": {i: baselines[i] for i in drawn},
            "patch_size": sized,
            "unit": dict.fromkeys(sized, "patch"),
            "removable": words,
        }
        return {"perturb": drawn} | {name: value for name, value in given.items() if value}

    def _label(self, index: int) -> str:
        return self.classes[index] if 0 <= index < len(self.classes) else str(index)

    def _target(self, model: str, example: Example, target: int | None) -> int | None:
        if not self.use_label_for_attr:
            return None
        return self.predict(model, example)[0].target if target is None else target

    def _scores(self, output: Tensor) -> Tensor:
        """(B, classes), or (B, 1)."""
        scores = output if self.score_func is None else self.score_func(output)
        return scores.reshape(len(scores), -1)

    def _score_of(self, output: Tensor, target: int | None) -> Tensor:
        return self._scores(output)[:, 0 if target is None else target]

    def _baselines(self, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            through(f.baseline_transforms[:1], value)
            if f.baseline_transforms
            else torch.zeros_like(value)
            for f, value in zip(self.features, made, strict=True)
        )


def _shares(attributions: Sequence[Tensor]) -> list[float]:
    """Every input's net relevance; the magnitudes sum to 1."""
    sums = torch.stack([values.double().sum() for values in attributions])
    total = float(sums.abs().sum())
    return (sums / total).tolist() if total else [0.0] * len(sums)
