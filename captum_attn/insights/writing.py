"""What the language model's tab computes: the next tokens of a prompt, and why one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_attn._checks import FAILURES, callable_of, finite, flag, shown, text, texts, whole
from captum_attn.errors import InputError, OptionError
from captum_attn.insights.methods import OF_WORDS, Method
from captum_attn.insights.tab import Tab, one_at_a_time
from captum_attn.metrics.shared import tensor_of

__all__ = ["NextToken", "WhyToken", "WritingSession", "Written"]

TOP = 8  # next tokens to choose from
MAX_PROMPT = 512  # tokens
MAX_WRITTEN = 20  # tokens of one request
SINK_AND_SELF = ("sink", "self")


class NextToken(NamedTuple):
    """A token that may come next.

    Attributes:
        token (int): its id.
        text (str): what it spells, in quotes, as a blank in front of it counts.
        probability (float): of coming next.
    """

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class WhyToken:
    """Why a token comes next, by one method.

    Attributes:
        method (str): the method's name.
        tokens (list of str): the n tokens of the prompt, as the tokenizer has them.
        relevance (Tensor): (n,).
        left_out (Tensor): (n,) bool, the tokens whose relevance was taken away.
    """

    method: str
    tokens: list[str]
    relevance: Tensor
    left_out: Tensor


class Written(NamedTuple):
    """A token that was written, and why."""

    token: NextToken
    why: WhyToken


class WritingSession(Tab):
    """A causal language model, its tokenizer, and the methods that explain its next token.

    Args:
        model, tokenizer, prompts, name, methods, presets, note: see `GenerationVisualizer`.

    Examples::

        >>> session = WritingSession(model, tokenizer, ["The capital of France is"])
        >>> likely = session.next_tokens("The capital of France is")
        >>> why = session.explain("The capital of France is", likely[0].token, "VTranM")
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], tuple[Any, Any]],
        tokenizer: Any = None,
        prompts: Sequence[str] = (),
        *,
        name: str = "the model",
        methods: Sequence[Method] | None = None,
        presets: Mapping[str, Any] | None = None,
        note: str = "",
    ) -> None:
        callable_of("model", model, "a causal language model")
        if tokenizer is None and isinstance(model, nn.Module):
            raise InputError("tokenizer: expected the model's, got None")
        if tokenizer is not None:
            _checked_tokenizer(tokenizer)
        self.name, self._loading = text("name", name), (model, tokenizer)
        self.prompts = texts("prompts", prompts)
        super().__init__(methods, presets, note)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer, loaded when they are asked for the first time."""
        model, tokenizer = self._loading
        if tokenizer is not None:
            return model, tokenizer
        found = model()
        if not isinstance(found, (tuple, list)) or len(found) != 2 or not callable(found[0]):
            raise InputError(
                "model: expected a callable that returns (model, tokenizer), or a tokenizer beside "
                f"the model; it returned {shown(found)}"
            )
        return found[0], _checked_tokenizer(found[1])

    def offered(self) -> Sequence[Method]:
        """Those that have a meaning for a text."""
        return OF_WORDS

    def without_effect(self) -> set[str]:
        return {"interpolation", "self_in_rule_10", "noise_link"}

    # ------------------------------------------------------------------------ computed
    def next_tokens(self, prompt: str, top: int = TOP) -> list[NextToken]:
        """The likeliest next tokens, the likeliest first.

        Args:
            prompt (str): what the model goes on from.
            top (int): at most so many. Default: 8.

        Returns:
            list of NextToken
        """
        top = whole("top", top)
        with one_at_a_time:
            return self._likely(self._ids(prompt), top)

    def explain(
        self,
        prompt: str,
        token: int,
        method: str,
        options: Mapping[str, Any] | None = None,
        leave_out: bool = True,
    ) -> WhyToken:
        """Relevance of the prompt's tokens for one next token.

        Args:
            prompt (str): what the model goes on from.
            token (int): an id, likely or not.
            method (str): its name.
            options (Mapping, optional): the method's, by name, as a form has them.
            leave_out (bool): whether the sink and the last token get no relevance. Default: True.

        Returns:
            WhyToken: what the method's `attribute` says of the last place's logit.
        """
        with one_at_a_time:
            ids = self._ids(prompt)
            return self._why(ids, whole("token", token, 0), method, options, leave_out)

    def write(
        self,
        prompt: str,
        count: int,
        method: str,
        options: Mapping[str, Any] | None = None,
        leave_out: bool = True,
    ) -> Iterator[Written]:
        """Lets the model go on, greedily, and explains each token as it comes.

        Args:
            prompt (str): what the model goes on from.
            count (int): tokens at most, 1 to 20; fewer where the model ends its text.
            method, options, leave_out: as for `explain`.

        Returns:
            iterator of Written: one for each token.
        """
        count = whole("count", count, 1, MAX_WRITTEN)
        with one_at_a_time:
            ids = self._ids(prompt)
        for _ in range(count):
            with one_at_a_time:
                (token,) = self._likely(ids, 1)
                why = self._why(ids, token.token, method, options, leave_out)
            yield Written(token, why)
            if token.token in self._ends():
                return
            ids = torch.cat([ids, ids.new_tensor([[token.token]])], 1)

    def with_token(self, prompt: str, token: int) -> str:
        """The prompt with a token behind it."""
        ids = self._ids(prompt)[0].tolist()
        return str(self._decoded([*ids, whole("token", token, 0)]))

    # ------------------------------------------------------------------------ parts
    def _ids(self, prompt: str) -> Tensor:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("the prompt is empty: give it at least one word")
        ids = self.loaded[1](text("prompt", prompt), return_tensors="pt")["input_ids"]
        if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1 or not ids.numel():
            raise InputError(
                f"tokenizer: expected ids (1, n) of the prompt, at least one; got {shown(ids)}"
            )
        if ids.shape[1] > MAX_PROMPT:
            raise InputError(
                f"the prompt has {ids.shape[1]} tokens: expected at most {MAX_PROMPT}; give a "
                "shorter one"
            )
        return ids

    def _likely(self, ids: Tensor, top: int) -> list[NextToken]:
        with torch.no_grad():
            logits = tensor_of(self.loaded[0](ids))
        if logits.ndim != 3:
            raise InputError(
                f"model: expected logits (1, n, vocabulary) of a causal language model, got "
                f"{shown(logits)}"
            )
        scores = finite("the model's logits", logits[0, -1].double(), "look at its weights")
        found = scores.softmax(-1).topk(min(top, len(scores)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [NextToken(i, repr(self._decoded([i])), p) for i, p in pairs]

    def _why(
        self, ids: Tensor, token: int, method: str, options: Mapping[str, Any] | None, out: bool
    ) -> WhyToken:
        kind = self._method(method)
        given = self._given(kind, options)
        given.pop("interpolation", None)
        given["leave_out"] = SINK_AND_SELF if flag("leave_out", out) else ()
        explained = kind(self.loaded[0]).explain_each(
            ids, [(ids.shape[1] - 1, token)],
            lambda result: (result.attributions(ids, "bilinear"), result.marks(ids)),
            **given,
        )  # fmt: skip
        relevance, marks = next(iter(explained))
        tokens = self.loaded[1].convert_ids_to_tokens(ids[0].tolist())
        return WhyToken(kind.get_name(), tokens, relevance[0].detach(), marks[0])

    def _decoded(self, ids: list[int]) -> str:
        try:
            return str(self.loaded[1].decode(ids))
        except FAILURES as problem:
            raise OptionError(
                f"token: expected an id of the tokenizer's vocabulary, got {shown(ids[-1])}"
            ) from problem

    def _ends(self) -> list[int]:
        model, tokenizer = self.loaded
        config = getattr(model, "generation_config", None) or getattr(model, "config", None)
        ends = getattr(config, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _checked_tokenizer(given: Any) -> Any:
    """What reads a text and spells ids, as tokenizers of transformers do."""
    spells = all(hasattr(given, name) for name in ("decode", "convert_ids_to_tokens"))
    if not callable(given) or isinstance(given, type) or not spells:
        raise InputError(
            "tokenizer: expected one as transformers has them, called with a text, with `decode` "
            f"and `convert_ids_to_tokens`; got {shown(given)}"
        )
    return given
