"""Generated text, each of its tokens attributed to the prompt and to the tokens before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from captum_attn._checks import callable_of, flag, listed, scalar, shown, whole
from captum_attn._prompt import Prompt
from captum_attn.attr import AttentionAttribution, Result
from captum_attn.errors import InputError, OptionError
from captum_attn.objectives import Objective
from captum_attn.observe.observation import tensor_of

__all__ = ["Generation", "explain_generation"]


@dataclass(eq=False)
class Generation:
    """The T tokens that a model generated, each with its attribution.

    Row t is the relevance for the t-th generated token, as it was predicted from the prompt and
    the tokens before it; that of later tokens is exactly 0.

    Args:
        relevance (dict): stream name -> (B, T, n), relevance of its tokens: of a source (the text
            that an encoder reads, an image, audio), and of the sequence that is generated on.
        stream (str): the name of that sequence, `input_ids`, or `decoder_input_ids` behind an
            encoder. Its last columns are `columns`.
        tokens (Tensor): (B, T), ids of the generated tokens, the rows.
        valid (Tensor): (B, T), False behind an example's end of sequence, where the rows are 0.
        columns (Tensor): (B, p + T - 1), ids of the p tokens of the prompt and of the generated
            ones but for the last, which nothing was predicted from.
        real (Tensor): (B, p + T - 1), False where a column is padding.
    """

    relevance: dict[str, Tensor]
    stream: str
    tokens: Tensor
    valid: Tensor
    columns: Tensor
    real: Tensor

    @property
    def matrix(self) -> Tensor:
        """(B, T, columns of all streams): the sources, then the prompt and what was generated."""
        sources = [rows for name, rows in self.relevance.items() if name != self.stream]
        return torch.cat([*sources, self.relevance[self.stream]], -1)


def explain_generation(
    method: AttentionAttribution,
    inputs: Tensor | Mapping[str, Any],
    generated: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    generate_kwargs: Mapping[str, Any] | None = None,
    with_prompt: bool = True,
    eos_token_id: int | Iterable[int] | None = None,
    objective: Objective | None = None,
    start_layer: int = 0,
    show_progress: bool = False,
    **options: Any,
) -> Generation:
    r"""Attributes each token of a generated sequence to all that it was predicted from.

    One forward pass over the whole sequence, and one backward pass for each generated token.

    Args:
        method (AttentionAttribution): a method on the model, `GenericAttention(model)`: a causal
            language model, an encoder-decoder model, with text, images or audio as source.
        inputs (Tensor or Mapping of str to Tensor): the prompt, as `model.generate` takes it, a
            batch padded on the left. Encoder-decoder models: what the encoder reads; what the
            decoder starts from is `decoder_input_ids`, or the model's `decoder_start_token_id`.
        generated (LongTensor, optional): (B, p + T), what `model.generate` returned.
        max_new_tokens (int, optional): instead of `generated`, lets the model generate so many
            tokens at most, greedily.
        generate_kwargs (Mapping, optional): further arguments of `model.generate`.
        with_prompt (bool): whether `generated` begins with the p tokens of the prompt (of the
            decoder, behind an encoder); False: it is (B, T), the new tokens alone, as Whisper
            returns them. Default: True.
        eos_token_id (int or several, optional): the tokens that end a sequence, () for none.
            Default: those of the model's generation config.
        objective (callable, optional): (logits, target) -> (B,), target one (position, token id)
            for each example. Default: the logit of the generated token.
        start_layer (int), **options: as for `attribute`.
        show_progress (bool): a progress bar over the generated tokens. Default: False.

    Returns:
        Generation: the relevance, one matrix for each stream.

    Raises:
        InputError: if the prompt, the generated tokens and the model do not fit together.

    Examples::

        >>> inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        >>> found = explain_generation(GenericAttention(llm), inputs, max_new_tokens=20)
        >>> found.relevance["input_ids"]                      # (B, 20, p + 19)
        >>> found = explain_generation(GenericAttention(bart), inputs, bart.generate(**inputs))
        >>> found.relevance["input_ids"], found.relevance["decoder_input_ids"]
    """
    if not isinstance(method, AttentionAttribution):
        raise OptionError(
            "method: expected a method of this library on the model, GenericAttention(model); got "
            f"{type(method).__name__}"
        )
    _check_settings(generate_kwargs, objective, start_layer)
    with_prompt, ends = flag("with_prompt", with_prompt), _ends(eos_token_id)
    flag("show_progress", show_progress)
    prompt = Prompt(method.forward_func, inputs)
    if (generated is None) == (max_new_tokens is None):
        raise InputError("expected either `generated` or `max_new_tokens`, got both or neither")
    if generated is not None and generate_kwargs:
        raise InputError("generate_kwargs: expected none with `generated`, which is there already")
    if generated is None:
        generated = prompt.generate(max_new_tokens, dict(generate_kwargs or {}))
    new = prompt.continued(generated, with_prompt)
    valid = _valid(new, _ends(prompt.setting("eos_token_id")) if ends is None else ends)
    batch, length = new.shape
    fed = prompt.with_tokens(new[:, :-1], valid[:, :-1])
    columns = fed[prompt.name]

    def targets(output: Any) -> list[list[tuple[int, int]]]:
        """For every t the (position, token) of each example; a valid one where it has ended."""
        logits = tensor_of(output)
        if logits.ndim != 3 or logits.shape[1] < columns.shape[1]:
            raise InputError(
                f"expected logits (B, {columns.shape[1]}, vocabulary), one row for every token of "
                f"{prompt.name!r}; got {tuple(logits.shape)}"
            )
        first = logits.shape[1] - length  # an image may take places in front of the text
        steps = torch.arange(length, device=new.device).expand_as(new) * valid
        ids = new.gather(1, steps)
        pairs = torch.stack([first + steps, ids], -1)[:, valid.any(0)]  # (B, t, 2)
        return [[(p, i) for p, i in pair] for pair in pairs.transpose(0, 1).tolist()]

    rows = list(
        method.explain_each(
            fed,
            targets,
            Result.tokens,
            objective=objective,
            start_layer=start_layer,
            causal=True,
            show_progress=show_progress,
            **options,
        )
    )
    relevance = {}
    for name in rows[0]:
        found = torch.stack([row[name] for row in rows], 1)
        relevance[name] = found.new_zeros(batch, length, found.shape[2])
        relevance[name][:, : len(rows)] = found * valid[:, : len(rows), None]
    stream = next((n for n in relevance if prompt.name in n.split("+")), None)
    if stream is None:
        raise InputError(
            f"{prompt.name!r} enters no token stream of its own (streams: {list(relevance)})"
        )
    _refuse_later(relevance[stream], columns.shape[1])
    real = torch.cat([prompt.real(), valid[:, :-1]], 1)
    return Generation(relevance, stream, new, valid, columns, real)


def _check_settings(generate_kwargs: Any, objective: Any, start_layer: Any) -> None:
    if generate_kwargs is not None and not isinstance(generate_kwargs, Mapping):
        raise OptionError(
            f"generate_kwargs: expected a Mapping of generate's options, got "
            f"{shown(generate_kwargs)}"
        )
    if objective is not None:
        callable_of("objective", objective, "a callable (logits, target) -> (B,)")
    whole("start_layer", start_layer, 0)


def _ends(eos: Any) -> list[int] | None:
    """The ids that end a sequence; None where nothing is said of them."""
    if eos is None:
        return None
    given = list(eos) if isinstance(eos, (set, frozenset)) else scalar(eos)
    ids = [given] if isinstance(given, Integral) else listed("eos_token_id", given, "ids")
    return [whole("eos_token_id", one, 0) for one in ids]


def _valid(new: Tensor, eos: list[int] | None) -> Tensor:
    """(B, T): True up to the first token that ends the sequence."""
    if eos is None:
        return torch.ones_like(new, dtype=torch.bool)
    ends = torch.isin(new, torch.as_tensor(eos, dtype=torch.long, device=new.device))
    return ends.cumsum(1) - ends.long() == 0


def _refuse_later(rows: Tensor, columns: int) -> None:
    """Raises if a token was explained by itself or by later ones: the model is not causal."""
    length = rows.shape[1]
    own = rows[..., -columns:]
    later = own.triu(columns - length + 1)
    if bool((later != 0).any()):
        raise InputError(
            "tokens of the sequence see later ones when the model runs on all of them at once, so "
            "that one pass does not show how they were generated; expected a causal model: explain "
            "each token with `attribute_tokens` on the tokens before it"
        )
