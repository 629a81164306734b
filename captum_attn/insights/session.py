"""What a dashboard computes, without the page around it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_attn._checks import callable_of, finite, flag, listed, one_of, shown, text, texts, whole
from captum_attn._method_names import method_class, method_name
from captum_attn.errors import InputError, OptionError
from captum_attn.insights.examples import Example, examples_of
from captum_attn.insights.features import BaseFeature, Batch, FeatureOutput
from captum_attn.insights.methods import CAPTUM_METHODS, METHODS, OF_WORDS, Method, values_of
from captum_attn.insights.uploads import read_picture
from captum_attn.metrics import Curve, RandomAttribution, perturbation_curve
from captum_attn.metrics.shared import tensor_of

__all__ = ["Explanation", "Prediction", "Session"]

TOP = 4  # predictions shown, as in Captum Insights
STEPS = 20  # of the deletion curve
ORDERS = 10  # random ones
REMEMBERED = 64  # curves of random orders

# A model that is being explained has hooks on it, and PyTorch has modes that are global.
_one_at_a_time = threading.RLock()


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


class Session:
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
        self.note = text("note", note)
        self._chances: dict[Any, tuple[Example, Curve]] = {}
        self.models = _named(models)
        self.classes = texts("classes", classes)
        self.features = _features(features)
        if score_func is not None:
            callable_of("score_func", score_func, "a callable of the model's output, or None")
        self.score_func = score_func
        self.use_label_for_attr = flag("use_label_for_attr", use_label_for_attr)
        if presets is not None and not isinstance(presets, Mapping):
            raise OptionError(
                f"presets: expected a Mapping of option to value, got {shown(presets)}"
            )
        self.presets = dict(presets or {})
        num_examples = whole("num_examples", num_examples)
        self.examples = list(islice(examples_of(dataset, len(self.features)), num_examples))
        if not self.examples:
            raise InputError("dataset: expected at least one Batch with an example, got none")
        self.methods = {m.get_name(): m for m in self._offered(methods)}

    # ------------------------------------------------------------------------ the user's own
    def own(self, example: Example, picture: str | None = None, text: str | None = None) -> Example:
        """The example with the user's picture (a file) and text in place of its own, if given.

        Raises:
            InputError: for a file that is no picture, a text of blanks alone, or where no input
                takes one.
        """
        if text and not text.strip():
            raise InputError("the text is empty: give it at least one word, or clear the field")
        inputs, additional = list(example.inputs), example.additional
        if picture:
            i = self._first("read", "an image", "an ImageFeature")
            inputs[i] = self.features[i].read(read_picture(picture), inputs[i])
        if text and text.strip():
            i = self._first("tokenize", "a text", "a TextFeature with tokenize=")
            found = self.features[i].tokenize(text)
            inputs[i], *more = found if isinstance(found, tuple) and found else (found,)
            if not isinstance(inputs[i], Tensor) or inputs[i].ndim < 2 or len(inputs[i]) != 1:
                raise InputError(
                    f"{self.features[i].name}: expected `tokenize` to return ids (1, n), got "
                    f"{shown(inputs[i])}"
                )
            additional = tuple(more) or additional
        if not picture and not (text and text.strip()):
            return example
        brought = [f"your picture {Path(picture).name}"] if picture else []
        brought += [f"your text “{text.strip()}”"] if text else []
        return Example(tuple(inputs), additional, None, ", ".join(brought))

    def _first(self, what: str, given: str, feature: str) -> int:
        found = [i for i, f in enumerate(self.features) if getattr(f, what, None) is not None]
        if not found:
            raise InputError(f"this model takes no {given.split()[-1]}: expected {feature}")
        return found[0]

    @property
    def takes_picture(self) -> bool:
        """Whether the user may bring a picture."""
        return any(hasattr(feature, "read") for feature in self.features)

    @property
    def takes_text(self) -> bool:
        """Whether the user may bring a text."""
        return any(getattr(feature, "tokenize", None) is not None for feature in self.features)

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
        with _one_at_a_time, torch.no_grad():
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
        with _one_at_a_time:
            target = self._target(model, example, target)
            attribution, made = self._method(method)(self._model(model)), self._transformed(example)
            keywords = values_of(self._method(method), {**self.presets, **(options or {})})
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
        with _one_at_a_time:
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
        with _one_at_a_time:
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
    def _offered(self, methods: Sequence[Method] | None) -> Sequence[Method]:
        if methods is not None:
            found = listed("methods", methods, "classes of Captum attributions")
            found = [method_class("methods", m) if isinstance(m, str) else m for m in found]
            if not found or not all(
                isinstance(m, type) and issubclass(m, Attribution) for m in found
            ):
                raise OptionError(
                    "methods: expected classes of Captum attributions, such as GenericAttention; "
                    f"got {shown(methods)}"
                )
            return found
        with torch.no_grad():
            made = self._transformed(self.examples[0])
        floats = all(value.is_floating_point() for value in made)
        return (*METHODS, *CAPTUM_METHODS) if floats else OF_WORDS

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

    def _model(self, name: str) -> nn.Module:
        return _of("model", name, self.models)

    def _method(self, name: str) -> Method:
        """By the name that is shown, that of the class, or its paper's."""
        if isinstance(name, str) and name not in self.methods:
            named = {method.__name__: shown for shown, method in self.methods.items()}
            with suppress(OptionError):
                name = named.get(method_name("method", name), name)
        return _of("method", name, self.methods)

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

    def _transformed(self, example: Example) -> tuple[Tensor, ...]:
        pairs = zip(self.features, example.inputs, strict=True)
        return tuple(_through(f.input_transforms, value) for f, value in pairs)

    def _baselines(self, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            _through(f.baseline_transforms[:1], value)
            if f.baseline_transforms
            else torch.zeros_like(value)
            for f, value in zip(self.features, made, strict=True)
        )


def _features(given: Any) -> list[Any]:
    """Of this package or of Captum Insights, which have no base in common."""
    found = [given] if hasattr(given, "visualize") else listed("features", given, "features")
    if not found:
        raise InputError("features: expected one for each input of the model, got none")
    for feature in found:
        if not hasattr(feature, "visualize") or isinstance(feature, type):
            raise InputError(
                f"features: expected one for each input, such as ImageFeature('Photo'); got "
                f"{shown(feature)}"
            )
    return found


def _named(models: Any) -> dict[str, nn.Module]:
    if isinstance(models, Mapping):
        found = {str(name): model for name, model in models.items()}
    else:
        each = list(models) if isinstance(models, (list, tuple)) else [models]
        names = [type(model).__name__ for model in each]
        twice = len(set(names)) < len(names)
        found = {
            f"Model {i}: {name}" if twice else name: model
            for i, (name, model) in enumerate(zip(names, each, strict=True), 1)
        }
    if not found or not all(callable(m) and not isinstance(m, type) for m in found.values()):
        raise InputError(
            "models: expected a model, a list of them or a Mapping of name to model, got "
            f"{shown(models)}"
        )
    return found


def _of(what: str, name: str, known: Mapping[str, Any]) -> Any:
    return known[one_of(what, name, known)]


def _through(transforms: Sequence[Callable], value: Tensor) -> Tensor:
    """Transforms see one example without its batch axis, as in Captum Insights."""
    value = value[0]
    for transform in transforms:
        value = transform(value)
    return value[None]


def _shares(attributions: Sequence[Tensor]) -> list[float]:
    """Every input's net relevance; the magnitudes sum to 1."""
    sums = torch.stack([values.double().sum() for values in attributions])
    total = float(sums.abs().sum())
    return (sums / total).tolist() if total else [0.0] * len(sums)
