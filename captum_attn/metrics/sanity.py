"""Sanity: what an explanation has to beat, and whether it notices what the model has learned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from captum._utils.progress import NullProgress, progress
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._checks import a_callable, a_tensor, explaining, flag, positive_int
from captum_attn.metrics._model import (
    Attributions,
    Inputs,
    Key,
    finite_attributions,
    named,
    one_map,
)

__all__ = ["ParameterRandomization", "RandomAttribution", "parameter_randomization"]

Redraw = Callable[[str, Tensor, torch.Generator], Tensor]


class RandomAttribution(Attribution):
    r"""The baseline of every table: uniform random numbers in the shape of the inputs.

    Their mean is 0, so that the sum over a large unit is no more relevant than over a small one.
    They are drawn per example from a seed and the example's own values, so the same example gets
    the same map whatever batch it comes in, and the global random state is left alone.

    Args:
        forward_func (callable): the model; it is not run.
        seed (int): another seed is another baseline. Default: 0.
        names (sequence of str, optional): the entries of a Mapping that get attributions. Default:
            all tensors but masks (entries with "mask" in their name), and entries that enter
            the same positions as an earlier one: of the same kind, integer or floating, and with
            the same number of tokens (`token_type_ids`, `visual_pos`).

    Examples::

        >>> RandomAttribution(model).attribute(images, target=3)  # of the images' shape
    """

    def __init__(
        self, forward_func: Callable, seed: int = 0, names: Sequence[str] | None = None
    ) -> None:
        super().__init__(forward_func)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise OptionError(f"seed: expected a whole number, got {seed!r}")
        if names is not None and not (
            isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names)
        ):
            raise OptionError(f"names: expected the names of some inputs, got {names!r}")
        self.seed, self.names = seed, names

    @classmethod
    def get_name(cls) -> str:
        return "Random Attribution"

    @log_usage()
    def attribute(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        **kwargs: Any,
    ) -> Any:
        r"""Random numbers in [-0.5, 0.5); arguments but the inputs are taken and not looked at.

        Args:
            inputs (Tensor, tuple of Tensor, or Mapping of str to Tensor): the model's inputs.

        Returns:
            *Tensor*, *tuple of Tensor* or *dict*: in the container of the inputs and of their
            shapes; in float32, float64 for float64 inputs.
        """
        values = named(inputs)
        chosen = _entries(values, self.names) if isinstance(inputs, Mapping) else list(values)
        for key in chosen:
            if not a_tensor(f"input {key!r}", values.get(key)).ndim:
                raise InputError(f"input {key!r}: expected a tensor with a batch axis")
        if not chosen or len({len(values[key]) for key in chosen}) > 1:
            raise InputError(f"expected tensors of one batch size, got {list(values)}")
        seeds = [
            self._seed_of([values[k][i] for k in chosen]) for i in range(len(values[chosen[0]]))
        ]
        drawn = {}
        for number, key in enumerate(chosen):
            like = values[key]
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            maps = [_uniform(like.shape[1:], s + number, dtype) for s in seeds]
            drawn[key] = torch.stack(maps).to(like.device) if maps else like.new_zeros(like.shape)
        if isinstance(inputs, Mapping):
            return drawn
        return tuple(drawn.values()) if isinstance(inputs, tuple) else drawn[0]

    def _seed_of(self, example: list[Tensor]) -> int:
        digest = hashlib.sha256(str(self.seed).encode())
        for value in example:
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy().tobytes())
        return int.from_bytes(digest.digest()[:6], "big")


def _uniform(shape: torch.Size, seed: int, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=rng, dtype=torch.float64, device="cpu") - 0.5).to(dtype)


def _entries(values: Mapping[Key, Any], names: Sequence[str] | None) -> list[Key]:
    """The entries of a Mapping that a random attribution is for."""
    if names is not None:
        return list(names)
    found: list[Key] = []
    for key, value in values.items():
        if not isinstance(value, Tensor) or value.ndim < 2 or "mask" in str(key):
            continue
        earlier = [values[k] for k in found]
        same = any(
            e.is_floating_point() == value.is_floating_point()
            and max(e.ndim, value.ndim) <= 3
            and e.shape[:2] == value.shape[:2]
            for e in earlier
        )
        if not same:
            found.append(key)
    if not found:
        raise InputError(f"none of the entries {list(values)} takes an attribution: pass names=")
    return found


class ParameterRandomization(NamedTuple):
    """How alike the attributions stay while the model is randomised from the top down.

    Attributes:
        layers (tuple of str): modules in the order in which they were randomised; the i-th column
            has the first i + 1 of them random.
        similarity (Tensor): (B, L), float64, Spearman's rank correlation with the attributions of
            the trained model: near 0 (or negative, for what is turned round) is good, 1 is a map
            that did not notice. The signs of the attributions count, as in the paper's "no
            absolute value"; `absolute=True` is its other form.
    """

    layers: tuple[str, ...]
    similarity: Tensor


def parameter_randomization(
    method: Attribution,
    inputs: Inputs,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    attributions: Attributions | None = None,
    model: nn.Module | None = None,
    layers: Sequence[str] | None = None,
    absolute: bool = False,
    redraw: Redraw | None = None,
    seed: int = 0,
    show_progress: bool = False,
    **options: Any,
) -> ParameterRandomization:
    r"""Cascading randomisation of the model's parameters (Adebayo et al., NeurIPS 2018).

    From the output down, one module after the other gets random parameters, and the attributions
    are compared with those of the trained model. A method that explains what the model has learned
    has to lose its likeness; one that keeps it shows the input, not the model. The model is left
    as it was found, also after an exception.

    Args:
        method (Attribution): any Captum method.
        inputs, target, additional_forward_args, **options: what `method.attribute` is called with.
        attributions (optional): those of the trained model, if they are at hand.
        model (Module, optional): what is randomised. Default: `method.forward_func`.
        layers (sequence of str, optional): names of modules, from the top down, each randomised
            with all that it holds. Default: every module with parameters of its own, from the one
            that was registered last to the first.
        absolute (bool): compare magnitudes. Default: False.
        redraw (callable, optional): (name, parameter, generator) -> a tensor of its shape.
            Default: normal numbers with the parameter's own mean and standard deviation, so that
            a deep model's output stays within range.
        seed (int): Default: 0.
        show_progress (bool): Default: False.

    Returns:
        ParameterRandomization: with similarity (B, L); 0 where a map is constant and so has no
        order.

    Examples::

        >>> found = parameter_randomization(GenericAttention(model), images, target=3)
        >>> dict(zip(found.layers, found.similarity.mean(0).tolist()))
    """
    if isinstance(method, type) or not callable(getattr(method, "attribute", None)):
        raise OptionError(
            "method: expected a Captum Attribution made with a model, GenericAttention(model) or "
            f"the like, got {method!r}"
        )
    root = getattr(method, "forward_func", None) if model is None else model
    if not isinstance(root, nn.Module):
        raise OptionError("the method explains a callable: pass the module it runs as model=")
    flag("absolute", absolute)
    flag("show_progress", show_progress)
    if redraw is not None:
        a_callable("redraw", redraw)

    def attribute() -> list[np.ndarray]:
        found = method.attribute(
            inputs, target=target, additional_forward_args=additional_forward_args, **options
        )
        return _flat(found, absolute)

    names = _cascade(root, layers)
    rng = torch.Generator().manual_seed(positive_int("seed", seed, 0))
    with explaining("the method could not explain these inputs"):
        first = attribute()
    before = first if attributions is None else _flat(attributions, absolute)
    if [one.shape for one in before] != [one.shape for one in first]:
        raise InputError(
            "attributions: expected the method's own of these inputs, "
            f"{[one.shape for one in first][:2]} numbers, got {[one.shape for one in before][:2]}"
        )
    columns = []
    with (
        _restored(root),
        progress(desc="Randomisation") if show_progress else NullProgress() as bar,
    ):
        for name in names:
            own = root.get_submodule(name).named_parameters(recurse=layers is not None)
            for parameter_name, parameter in own:
                full = f"{name}.{parameter_name}" if name else parameter_name
                new = (redraw or _normal)(full, parameter.detach(), rng)
                if not isinstance(new, Tensor) or new.shape != parameter.shape:
                    got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                    raise OptionError(
                        f"redraw: expected a tensor of the shape {tuple(parameter.shape)} of "
                        f"{full!r}, got {got}"
                    )
                with torch.no_grad():
                    parameter.copy_(new)
            columns.append([_spearman(a, b) for a, b in zip(before, attribute(), strict=True)])
            bar.update(1)
    return ParameterRandomization(
        tuple(names), torch.tensor(columns, dtype=torch.float64, device="cpu").T
    )


def _cascade(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    modules = dict(model.named_modules())
    if layers is None:
        names = [n for n, m in modules.items() if any(True for _ in m.parameters(recurse=False))]
        names = names[::-1]
    else:
        names = list(layers) if isinstance(layers, (list, tuple)) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise OptionError(f"layers: expected names of modules, got {layers!r}")
        unknown = [n for n in names if n not in modules]
        if unknown:
            raise OptionError(f"layers: the model has no modules {unknown}")
    if not names:
        raise InputError("the model has no parameters to randomise")
    return names


def _normal(_name: str, parameter: Tensor, rng: torch.Generator) -> Tensor:
    draw = torch.randn(parameter.shape, generator=rng, dtype=torch.float64, device="cpu").to(
        parameter.device
    )
    own = parameter.double()
    return own.mean() + draw * own.std(correction=0)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(kept[name])


def _flat(attributions: Attributions, absolute: bool) -> list[np.ndarray]:
    """One vector per example, over all inputs."""
    entries = [one_map(v) for v in named(attributions).values() if v is not None]
    sizes = {len(v) if v.ndim > 1 and v.numel() else 0 for v in entries}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(
            "attributions: expected those of one batch of examples, got the shapes "
            f"{[tuple(v.shape) for v in entries]}"
        )
    flat = torch.cat([finite_attributions(v).flatten(1) for v in entries], 1).cpu()
    return list((flat.abs() if absolute else flat).numpy())


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)
