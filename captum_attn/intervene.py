"""Interventions on attention: run a model with some tokens hidden, or with another attention map.

Both hold inside a `with` block, for the thread that entered it, and are undone when it is left,
also by an error. The model is not touched: it may be any that `captum_attn` explains, under the
fused kernel too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_attn._checks import shown
from captum_attn.errors import InputError, OptionError
from captum_attn.observe import AttentionCall, observe
from captum_attn.observe.capture.intervening import Intervening
from captum_attn.observe.capture.restore import (
    attention_is_seen,
    left_as_found,
    modules_of,
    root_of,
)
from captum_attn.observe.capture.tensor_kinds import check_kind
from captum_attn.observe.interventions import (
    hiding,
    in_token_order,
    replacing,
    share_of_tokens,
)
from captum_attn.observe.layers import Layers, check_layers, matches
from captum_attn.observe.streams.states import Source
from captum_attn.observe.streams.structure_cache import StructureCache
from captum_attn.observe.streams.to_inputs import in_order, input_order

__all__ = ["ObservedModel", "hide_tokens", "replace_attention"]

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Any]
Hidden = Tensor | Mapping[str, Tensor]
Attention = Tensor | Callable[[Tensor], Tensor]


class ObservedModel:
    """A model that ran once and was watched, so that its tokens and its attention are known.

    For several interventions on inputs of the same shapes; `hide_tokens` and `replace_attention`
    make one of their own.

    Args:
        forward_func (Module or callable): the model, or any callable that runs one.
        inputs (Tensor, tuple of Tensor, or Mapping of str to Tensor): what it will be run on, or
            inputs like those; the batch axis first.
        additional_forward_args (any, optional): further positional arguments of the model.

    Attributes:
        names (list of str): the names of the inputs, in their order.
        tokens (dict): name of a token stream -> the number of its tokens, as in `attribute_tokens`.
        calls (list of AttentionCall): the attention calls, in the order of execution.

    Raises:
        AttnError: one of its subclasses, where the attention cannot be observed.

    Examples::

        >>> seen = ObservedModel(model, images)
        >>> for token in range(seen.tokens["x"]):
        ...     with seen.hide_tokens(torch.arange(197) == token):
        ...         without = model(images)
    """

    def __init__(
        self, forward_func: Callable, inputs: Inputs, additional_forward_args: Any = None
    ) -> None:
        if not callable(forward_func):
            raise OptionError(
                f"expected a model or a callable that runs one, got {shown(forward_func)}"
            )
        forward_func = root_of(forward_func)
        self._roots = modules_of(forward_func)
        values = _checked(inputs)
        with left_as_found(self._roots):
            self._seen = observe(
                forward_func, values, additional_forward_args, self._roots, StructureCache()
            )
        if any(entry.moving for source in self._seen.wiring.sources for entry in source.entries):
            warnings.warn(
                "which token holds which part of the inputs depends on their content, or on random "
                "numbers that the model draws (ViLT): run these very inputs in the block, and set "
                "the same seed before this and before every run",
                stacklevel=2,
            )

    @property
    def tokens(self) -> dict[str, int]:
        return {source.name: source.n for source in self._seen.wiring.sources}

    @property
    def names(self) -> list[str]:
        """The names of the inputs, those of the model's arguments where they came without."""
        return self._seen.names

    @property
    def calls(self) -> list[AttentionCall]:
        return [state.call for state in self._seen.wiring.updates]

    def tokens_of(self, elements: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tokens that are made of chosen elements of the inputs, for more than half.

        Args:
            elements (Mapping): name of an input -> bool, (B, ...), of its shape: pixels, ids.

        Returns:
            dict: stream name -> (B, n) bool, as `hide_tokens` takes them.

        Raises:
            InputError: where an input enters no token stream.
        """
        batch, found = self._seen.batch, {}
        for source in self._seen.wiring.sources:
            chosen = [
                share
                for entry in source.entries
                if entry.of_input
                and (mask := elements.get(entry.leaf.name)) is not None
                and (share := share_of_tokens(entry, source.n, mask, batch)) is not None
            ]
            if chosen:
                rows = torch.stack(chosen).amax(0) > 0.5
                found[source.name] = in_order(rows, input_order(source, batch))
        names = {e.leaf.name for s in self._seen.wiring.sources for e in s.entries if e.of_input}
        unknown = [name for name in elements if name not in names]
        if unknown:
            raise InputError(
                f"the inputs {unknown} enter no token stream: expected some of {sorted(names)}"
            )
        return found

    @contextmanager
    def hide_tokens(self, hidden: Hidden, *, layers: Layers | None = None) -> Iterator[None]:
        """See `hide_tokens`."""
        check_layers(layers)
        chosen = self._chosen(hidden)
        calls = [call for call in self.calls if matches(call.module, layers, self._roots)]
        if not calls:
            names = sorted({call.module for call in self.calls})
            raise OptionError(f"layers={layers!r} matches none of the attention calls: {names}")
        with self._changed(hiding(self._seen, chosen, calls, self._roots)):
            yield

    @contextmanager
    def replace_attention(
        self, call: int | str | nn.Module | AttentionCall, attention: Attention
    ) -> Iterator[None]:
        """See `replace_attention`."""
        found = self._call(call)
        made = _replacement(found, attention)
        with self._changed(replacing(self._seen, {found: made}, self._roots)):
            yield

    @contextmanager
    def _changed(self, mode: Intervening) -> Iterator[None]:
        with attention_is_seen(self._roots), mode:
            yield

    def _chosen(self, hidden: Hidden) -> dict[Source, Tensor]:
        """Source -> (B, n) bool, in the model's own order of the tokens."""
        sources = {source.name: source for source in self._seen.wiring.sources}
        if not isinstance(hidden, Mapping):
            if len(sources) != 1:
                raise OptionError(
                    f"hidden: the model has the token streams {self.tokens}: expected a dict with "
                    f"the tokens to hide of some of them, got {shown(hidden)}"
                )
            hidden = {next(iter(sources)): hidden}
        unknown = [name for name in hidden if name not in sources]
        if unknown or not hidden:
            raise OptionError(
                f"hidden: expected names among {sorted(sources)}, got {sorted(map(str, hidden))}"
            )
        batch, found = self._seen.batch, {}
        for name, tokens in hidden.items():
            whole = isinstance(tokens, Tensor) and tokens.dtype == torch.bool
            rows = tokens[None] if whole and tokens.ndim == 1 else tokens
            n = sources[name].n
            if not whole or rows.ndim != 2 or rows.shape[1] != n or len(rows) == 0:
                raise OptionError(
                    f"hidden: of {name!r} expected a bool Tensor (B, {n}) or ({n},), True for "
                    f"tokens to hide, got {shown(tokens)}"
                )
            if len(rows) % batch:
                rows = rows.expand(batch, -1) if len(rows) == 1 else rows
            if len(rows) % batch:
                raise OptionError(
                    f"hidden: of {name!r} expected rows for the {batch} examples, or for copies of "
                    f"the batch one after the other, got {len(rows)}"
                )
            found[sources[name]] = in_token_order(sources[name], batch, rows)
        longest = max(map(len, found.values()))
        return {s: rows.repeat(longest // len(rows), 1) for s, rows in found.items()}

    def _call(self, call: int | str | nn.Module | AttentionCall) -> AttentionCall:
        calls = self.calls
        if isinstance(call, AttentionCall):
            chosen = [one for one in calls if one.event == call.event]
        elif isinstance(call, int) and not isinstance(call, bool):
            chosen = calls[call:][:1] if -len(calls) <= call < len(calls) else []
        elif isinstance(call, (str, nn.Module)):
            chosen = [one for one in calls if matches(one.module, call, self._roots)]
        else:
            chosen = []
        if len(chosen) != 1:
            names = [one.module for one in calls]
            raise OptionError(
                f"call: expected an int in [-{len(calls)}, {len(calls)}), a module or the pattern "
                f"of a name that chooses one of the attention calls {names}; {shown(call)} chooses "
                f"{len(chosen)}"
            )
        return chosen[0]


@contextmanager
def hide_tokens(
    forward_func: Callable,
    inputs: Inputs,
    hidden: Hidden,
    additional_forward_args: Any = None,
    *,
    layers: Layers | None = None,
) -> Iterator[None]:
    """Hides tokens: while the block runs, no query of the attention calls sees their keys.

    The attention of a query is shared among the keys that are left, as if the hidden tokens were
    not in the sequence; a query that has none left reads nothing (0). A token is followed through
    the layers. A key that holds several tokens (merged, pooled or mixed ones) is hidden where more
    than half of what it holds is. What mixes tokens beside attention (a mean over all of them, a
    convolution) still sees hidden ones.

    Args:
        forward_func (Module or callable): the model, or any callable that runs one.
        inputs (Tensor, tuple of Tensor, or Mapping): what the model will be run on in the block, or
            inputs of the same shapes; it runs on them once, to find out where the tokens are.
        hidden (Tensor, or dict of stream name to Tensor): (B, n) or (n,) bool, True for tokens to
            hide, in the order of `attribute_tokens`. Rows for m copies of the batch, (m B, n), are
            for runs on that many copies, one after the other.
        additional_forward_args (any, optional): further positional arguments of the model.
        layers (Module, str, or sequence of them, optional): modules, or patterns of their names,
            whose calls hide the tokens. Default: all calls.

    Raises:
        OptionError: for tokens, streams or layers that the model does not have.
        WiringError, InputError: in the block, where the model makes other calls than on `inputs`.

    Examples::

        >>> patches = torch.zeros(1, 197, dtype=torch.bool)
        >>> patches[:, 1:50] = True
        >>> with hide_tokens(model, image, patches):
        ...     logits = model(image)       # as if those patches were not there
    """
    seen = ObservedModel(forward_func, inputs, additional_forward_args)
    with seen.hide_tokens(hidden, layers=layers):
        yield


@contextmanager
def replace_attention(
    forward_func: Callable,
    inputs: Inputs,
    call: int | str | nn.Module | AttentionCall,
    attention: Attention,
    additional_forward_args: Any = None,
) -> Iterator[None]:
    """Replaces one attention call's map while the block runs; all else is computed anew.

    Args:
        forward_func, inputs, additional_forward_args: as for `hide_tokens`.
        call (int, str, Module or AttentionCall): which call: its place in the order of execution
            (-1: the last), the module or pattern of a name that it runs in, or one that
            `layer_maps` gave.
        attention (Tensor or callable): what stands for A, (B, H, q, k) or of fewer axes that
            broadcast to it, as `layer_maps` lays it out ((B F, H, q, k) where F windows are folded
            beside each other); or a function of A that returns it. Rows need not sum to 1.

    Raises:
        OptionError: where no call, or more than one, is chosen, or A does not fit.

    Examples::

        >>> with replace_attention(model, image, -1, lambda A: 0.5 * A):
        ...     logits = model(image)
    """
    seen = ObservedModel(forward_func, inputs, additional_forward_args)
    with seen.replace_attention(call, attention):
        yield


def _replacement(call: AttentionCall, attention: Attention) -> Callable[[Tensor], Tensor]:
    """A, (B, F, H, q, k) -> what stands for it."""
    if not isinstance(attention, Tensor) and not callable(attention):
        raise OptionError(
            f"attention: expected a Tensor (B, H, q, k) or a function of A, got {shown(attention)}"
        )

    def made(weights: Tensor) -> Tensor:
        given = weights.flatten(0, 1)  # (B F, H, q, k)
        found = attention if isinstance(attention, Tensor) else attention(given)
        try:
            check_kind("attention", found)
            return found.to(given).expand(given.shape).view(weights.shape)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise OptionError(
                f"attention: expected one that fits {tuple(given.shape)}, the map (B, H, q, k) of "
                f"{call.module!r}, got {shown(found)}"
            ) from error

    return made


def _checked(inputs: Any) -> tuple[Tensor, ...] | Mapping[str, Any]:
    if isinstance(inputs, Mapping):
        return inputs
    values = inputs if isinstance(inputs, tuple) else (inputs,)
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise InputError(
            "inputs: expected a Tensor, a tuple of Tensors or a Mapping of them (a tokenizer's or "
            f"processor's output), got {shown(inputs)}"
        )
    return values
