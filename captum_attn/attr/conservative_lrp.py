"""Conservative propagation: Ali et al., "XAI for Transformers: Better Explanations through
Conservative Propagation", ICML 2022."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from captum_attn.attr._gradient_rules import conservative
from captum_attn.attr._lrp import InputRelevance
from captum_attn.observe.operators.bridge import Rules


class ConservativeLRP(InputRelevance):
    r"""Conservative propagation, Ali et al., ICML 2022: gradient x input with two changes.

    - AH rule: attention maps are constants;
    - LN rule: the normaliser of layer norms (and of other norms) is a constant.

    The paper reads relevance at the tokens that enter the first block: `attribute_tokens`.
    `attribute` goes on to the inputs by the same rules.

    Args:
        forward_func: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        norm (str): "mean" differentiates the mean of a norm (the paper's LN rule), "mean_std" holds
            it constant, too (the default of the authors' script). Default: "mean".
        rules (Mapping or str, optional): other rules for some kinds of operations, or a published
            table by name, see `captum_attn.attr.rules`. Default: None.

    Examples::

        >>> ConservativeLRP(bert).attribute_tokens(ids, target=1)["input_ids"]    # (B, n)
    """

    @dataclass(frozen=True)
    class Options(InputRelevance.Options):
        norm: Literal["mean", "mean_std"] = "mean"

    @classmethod
    def get_name(cls) -> str:
        return "Conservative LRP"

    @classmethod
    def table(cls, options: Options) -> Rules:
        return conservative(options.norm)
