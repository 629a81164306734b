"""A prompt as a generating model takes it, and the same with tokens behind it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_attn._checks import FAILURES, shown, shown_error, way_out, whole
from captum_attn.errors import AttnError, InputError
from captum_attn.observe.capture.restore import modules_of

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Prompt:
    """What a model generates on: the sequence itself and the inputs beside it.

    Args:
        forward_func (Module or callable): the model, or a callable that runs one.
        inputs (Tensor or Mapping): what the user gave.

    Attributes:
        values (dict): the inputs by name.
        name (str): the entry that holds the sequence, `decoder_input_ids` behind an encoder.
        ids (Tensor): (B, p), its tokens so far.
    """

    def __init__(self, forward_func: Callable, inputs: Any) -> None:
        roots = modules_of(forward_func)
        self.model: Any = roots[0] if len(roots) == 1 else forward_func
        self.parameters = _parameters(forward_func)
        self.values = _by_name(inputs, self.parameters)
        config = getattr(self.model, "config", None)
        encodes = getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in self.values
        self._prefix = "decoder_" if encodes else ""
        self._started = bool(encodes) and "decoder_input_ids" not in self.values
        if encodes:
            self.name = "decoder_input_ids"
            if self._started:
                self.values[self.name] = self._start()
        else:
            self.name = "input_ids" if isinstance(inputs, Mapping) else next(iter(self.values))
        self.ids = _checked_ids(self.name, self.values.get(self.name), 1)
        self._check_padding()

    def setting(self, name: str) -> Any:
        """What the model's generation config, or else its config, says; or None."""
        owners = (getattr(self.model, kind, None) for kind in ("generation_config", "config"))
        return next((v for v in (getattr(o, name, None) for o in owners) if v is not None), None)

    def generate(self, max_new_tokens: Any, settings: dict[str, Any]) -> Tensor:
        """What the model generates, greedily unless `settings` say otherwise."""
        max_new_tokens = whole("max_new_tokens", max_new_tokens, error=InputError)
        if not hasattr(self.model, "generate"):
            raise InputError(
                f"max_new_tokens: expected a model with `generate`, got {type(self.model).__name__}"
                "; generate by other means and pass the ids as `generated`"
            )
        greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        given = {**self.values, **greedy, **settings}
        try:
            with torch.no_grad():
                found = self.model.generate(**given)
        except AttnError:
            raise
        except FAILURES as problem:  # of the model, whose code is not ours
            longest, ids = self.setting("max_position_embeddings"), self.ids
            raise InputError(
                f"the model cannot generate {max_new_tokens} tokens ({shown_error(problem)}): "
                f"{self.name!r} has {ids.shape[1]} tokens, ids {int(ids.min())} to "
                f"{int(ids.max())}; the model's config has a vocabulary of "
                f"{self.setting('vocab_size')} and {longest} positions; generate_kwargs are "
                f"{shown(settings)}"
            ) from problem
        return found if isinstance(found, Tensor) else found.sequences

    def continued(self, generated: Any, with_prompt: bool) -> Tensor:
        """(B, T), the new tokens among `generated`."""
        ids, (batch, p) = _checked_ids("generated", generated).to(self.ids.device), self.ids.shape
        if len(ids) != batch:
            raise InputError(
                f"generated: expected one sequence for each of the {batch} prompts, got {len(ids)}"
            )
        if with_prompt:
            if not torch.equal(ids[:, :p], self.ids):
                raise InputError(
                    f"generated: expected every sequence to begin with the {p} tokens of "
                    f"{self.name!r}, as `model.generate` returns them; pass `with_prompt=False` if "
                    f"these are the new tokens alone; got {ids[0, :p].tolist()} for "
                    f"{self.ids[0].tolist()} in the first"
                )
            ids = ids[:, p:]
        elif self._started:
            raise InputError(
                "generated: expected `decoder_input_ids` among the inputs, what the decoder "
                "started from, as new tokens alone (with_prompt=False) do not show it"
            )
        if not ids.shape[1]:
            raise InputError("generated: expected at least one new token behind the prompt, got 0")
        return ids

    def with_tokens(self, new: Tensor, real: Tensor) -> dict[str, Any]:
        """The inputs with further tokens, as `model.generate` extends them.

        Args:
            new (Tensor): (B, n), their ids.
            real (Tensor): (B, n), False for padding.
        """
        values = dict(self.values)
        ids, n = self.ids, new.shape[1]
        values[self.name] = torch.cat([ids, new.to(ids)], 1)
        mask, places = f"{self._prefix}attention_mask", f"{self._prefix}position_ids"
        if values.get(mask) is not None:
            values[mask] = torch.cat([values[mask], real.to(values[mask])], 1)
        if values.get(places) is not None:
            steps = torch.arange(1, n + 1, device=ids.device)
            values[places] = torch.cat([values[places], values[places][..., -1:] + steps], -1)
        elif self._needs_places(values.get(mask)):
            values[places] = (values[mask].long().cumsum(1) - 1).clamp_min(0)
        if self._prefix:
            return values
        if values.get("token_type_ids") is not None:
            types = values["token_type_ids"]
            values["token_type_ids"] = torch.cat([types, types[:, -1:].expand(-1, n)], 1)
        if values.get("mm_token_type_ids") is not None:  # 0: text
            types = values["mm_token_type_ids"]
            values["mm_token_type_ids"] = torch.cat([types, types.new_zeros(len(types), n)], 1)
        return values

    def real(self) -> Tensor:
        """(B, p), False for padding."""
        mask = self.values.get(f"{self._prefix}attention_mask")
        return torch.ones_like(self.ids, dtype=torch.bool) if mask is None else mask.bool()

    # ------------------------------------------------------------------------ checks and guesses
    def _start(self) -> Tensor:
        """(B, 1), the token that the decoder starts from."""
        start = self.setting("decoder_start_token_id")
        start = self.setting("bos_token_id") if start is None else start
        if start is None:
            raise InputError(
                "expected `decoder_input_ids` (B, p), what the decoder starts from: the model's "
                "config has no `decoder_start_token_id`"
            )
        first = next(v for v in self.values.values() if isinstance(v, Tensor))
        ids = torch.as_tensor(start, device=first.device).view(-1, 1)  # one, or one per example
        return ids.expand(len(first), 1) if len(ids) == 1 else ids

    def _check_padding(self) -> None:
        mask = self.values.get(f"{self._prefix}attention_mask")
        if mask is not None and getattr(mask, "shape", None) != self.ids.shape:
            raise InputError(
                f"{self._prefix}attention_mask: expected the shape of {self.name!r}, "
                f"{tuple(self.ids.shape)}; got {shown(mask)}"
            )
        if mask is not None and not bool(mask[:, -1].bool().all()):
            raise InputError(
                f"{self.name!r}: expected a batch padded on the left, as `model.generate` takes it "
                "(padding_side='left'); got padding behind a prompt"
            )
        ids, pad, eos = (
            self.values.get("input_ids"), self.setting("pad_token_id"), self.setting("eos_token_id")
        )  # fmt: skip
        if ids is None or pad is None or self.values.get("attention_mask") is not None:
            return
        ends = [eos] if eos is None or isinstance(eos, int) else list(eos)
        if pad not in ends and bool((ids == pad).any()):
            raise InputError(
                f"'input_ids' hold the padding token {pad}, and there is no 'attention_mask': pass "
                "the tokenizer's whole output"
            )

    def _needs_places(self, mask: Tensor | None) -> bool:
        """Whether `model.generate` counts the positions from the first real token on.

        A model with rotary positions in three dimensions works them out from its mask by itself.
        """
        if mask is None or self._prefix or bool(mask.bool().all()):
            return False
        modules = self.model.modules() if isinstance(self.model, nn.Module) else []
        by_itself = any(hasattr(module, "get_rope_index") for module in modules)
        return "position_ids" in self.parameters and not by_itself


def _parameters(forward_func: Callable) -> list[str]:
    function = forward_func.forward if isinstance(forward_func, nn.Module) else forward_func
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in inspect.signature(function).parameters.items() if p.kind in kinds]


def _by_name(inputs: Any, parameters: list[str]) -> dict[str, Any]:
    if isinstance(inputs, Mapping):
        values = dict(inputs)
    elif isinstance(inputs, Tensor) and parameters:
        values = {parameters[0]: inputs}
    else:
        raise InputError(
            "expected a prompt (B, p) of token ids, or a Mapping with it (a tokenizer's output); "
            f"got {type(inputs).__name__}{way_out(inputs)}"
        )
    if not any(isinstance(value, Tensor) for value in values.values()):
        raise InputError(
            f"expected a Mapping with tensors, got entries {list(values)}{way_out(values)}"
        )
    return values


def _checked_ids(name: str, ids: Any, least: int = 0) -> Tensor:
    real = isinstance(ids, Tensor) and ids.layout == torch.strided and not ids.is_meta
    if not real or ids.dtype not in INTEGERS or ids.ndim != 2 or not ids.shape[0]:
        raise InputError(f"{name!r}: expected token ids (B, n), got {shown(ids)}")
    if ids.shape[1] < least:
        raise InputError(f"{name!r}: expected at least one token, got {tuple(ids.shape)}")
    if bool((ids < 0).any()):
        raise InputError(f"{name!r}: expected token ids >= 0, got {int(ids.min())}")
    return ids
