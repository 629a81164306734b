"""What the tabs of a dashboard have in common: models, methods and examples, by their names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from captum.attr import Attribution
from torch import Tensor, nn

from captum_attn._checks import listed, mapping_of, one_of, shown, text, whole
from captum_attn._method_names import method_class, method_name
from captum_attn.errors import InputError, OptionError
from captum_attn.insights.examples import Example, examples_of
from captum_attn.insights.features import BaseFeature, Batch
from captum_attn.insights.methods import Method, values_of
from captum_attn.insights.uploads import read_picture

__all__ = ["Absent", "ExamplesTab", "Tab", "named", "one_at_a_time", "through"]

# A model that is being explained has hooks on it, and PyTorch has modes that are global.
one_at_a_time = threading.RLock()


class Tab:
    """Models and methods to choose from.

    Args:
        methods (sequence of type or str, optional): Default: those that the kind of tab offers.
        presets, note: see `AttributionVisualizer`.
    """

    def __init__(
        self, methods: Sequence[Method] | None, presets: Mapping[str, Any] | None, note: str
    ) -> None:
        self.note = text("note", note)
        self.presets = _values("presets", presets)
        chosen = self.offered() if methods is None else _checked_methods(methods)
        self.methods = {method.get_name(): method for method in chosen}

    def offered(self) -> Sequence[Method]:
        """The methods of this kind of tab."""
        raise NotImplementedError

    def without_effect(self) -> set[str]:
        """Options that change nothing here, and are not shown."""
        return set()

    def _given(self, method: Method, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """The method's keyword arguments: what is given, else the presets."""
        return values_of(method, {**self.presets, **_values("options", options)})

    def _method(self, name: str) -> Method:
        """By the name that is shown, that of the class, or its paper's."""
        if isinstance(name, str) and name not in self.methods:
            named = {method.__name__: shown for shown, method in self.methods.items()}
            with suppress(OptionError):
                name = named.get(method_name("method", name), name)
        return _of("method", name, self.methods)


class Absent(Tab):
    """In place of a model that is not installed: a line that says how to get it.

    Args:
        note (str): that line.
    """

    def __init__(self, note: str) -> None:
        super().__init__(None, None, note)

    def offered(self) -> Sequence[Method]:
        """None."""
        return ()


class ExamplesTab(Tab):
    """Models, methods, and examples of a data set or of the user's own.

    Args:
        models, features, dataset, methods, num_examples, presets, note: see
            `AttributionVisualizer`.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
        features: BaseFeature | Sequence[BaseFeature],
        dataset: Iterable[Batch],
        methods: Sequence[Method] | None,
        num_examples: int,
        presets: Mapping[str, Any] | None,
        note: str,
    ) -> None:
        self.models = named(models)
        self.features = _checked_features(features)
        num_examples = whole("num_examples", num_examples)
        self.examples = list(islice(examples_of(dataset, len(self.features)), num_examples))
        if not self.examples:
            raise InputError("dataset: expected at least one Batch with an example, got none")
        super().__init__(methods, presets, note)

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

    def example(self, index: int) -> Example:
        """The example of a number, as a form has it."""
        return self.examples[whole("example", index, 0, len(self.examples) - 1)]

    @property
    def takes_picture(self) -> bool:
        """Whether the user may bring a picture."""
        return any(hasattr(feature, "read") for feature in self.features)

    @property
    def takes_text(self) -> bool:
        """Whether the user may bring a text."""
        return any(getattr(feature, "tokenize", None) is not None for feature in self.features)

    def _model(self, name: str) -> nn.Module:
        return _of("model", name, self.models)

    def _transformed(self, example: Example) -> tuple[Tensor, ...]:
        pairs = zip(self.features, example.inputs, strict=True)
        return tuple(through(f.input_transforms, value) for f, value in pairs)


def _values(name: str, given: Any) -> dict[str, Any]:
    return {} if given is None else dict(mapping_of(name, given, "option to value"))


def _checked_methods(methods: Any) -> list[Any]:
    found = listed("methods", methods, "classes of Captum attributions")
    found = [method_class("methods", m) if isinstance(m, str) else m for m in found]
    if not found or not all(isinstance(m, type) and issubclass(m, Attribution) for m in found):
        raise OptionError(
            "methods: expected classes of Captum attributions, such as GenericAttention; "
            f"got {shown(methods)}"
        )
    return found


def _checked_features(given: Any) -> list[Any]:
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


def named(models: Any) -> dict[str, nn.Module]:
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


def through(transforms: Sequence[Callable], value: Tensor) -> Tensor:
    """Transforms see one example without its batch axis, as in Captum Insights."""
    value = value[0]
    for transform in transforms:
        value = transform(value)
    return value[None]
