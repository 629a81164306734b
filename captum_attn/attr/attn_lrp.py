"""AttnLRP: Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for
Transformers", ICML 2024."""

from __future__ import annotations

from dataclasses import dataclass

from captum_attn.attr._gradient_rules import attn_lrp, check_numbers, with_gamma
from captum_attn.attr._lrp import InputRelevance
from captum_attn.observe.operators.bridge import Rules


class AttnLRP(InputRelevance):
    r"""AttnLRP, Achtibat et al., ICML 2024, as the authors' code computes it.

    Relevance is x ∘ g with g the gradient of the explained logit under these rules:

    - a product of two activations (Q K^T, A V, gates) hands half of the gradient to each;
    - an elementwise nonlinearity f: g_x = g (f(x) − f(0)) / x;
    - a normaliser (the std of a norm, a quotient's divisor) is a constant;
    - linear layers, sums, pooling and softmax keep their gradient (LRP-0, Taylor).

    It does not conserve: softmax' bias is dropped, as are the biases of linear layers. The
    authors' code stabilises the second rule instead of subtracting f(0); `eps=1e-10` does that.

    Args:
        forward_func: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        eps (float): 0 for the exact rule g (f(x) − f(0)) / x; else g f(x) / (x + eps). Default: 0.
        gamma (tuple of two floats, optional): gamma of the generalised gamma rule in convolutions
            and in linear layers, 0 for none; the authors' choice for ViTs. Default: None.
        gamma_attention (bool): whether the projections of attention calls have it, too.
            Default: True.
        rules (Mapping or str, optional): other rules for some kinds of operations, or a published
            table by name, see `captum_attn.attr.rules`. Default: None.

    Examples::

        >>> heat = AttnLRP(model).attribute(images, target=3).sum(1)          # (B, H, W), signed
        >>> AttnLRP(language_model).attribute(ids, target=(-1, token))        # (B, n)
        >>> AttnLRP(vit).attribute(images, target=3, gamma=(0.25, 0.05))
    """

    @dataclass(frozen=True)
    class Options(InputRelevance.Options):
        eps: float = 0.0
        gamma: tuple[float, float] | None = None
        gamma_attention: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            check_numbers(self.eps, self.gamma)

    @classmethod
    def get_name(cls) -> str:
        return "AttnLRP"

    @classmethod
    def table(cls, options: Options) -> Rules:
        return with_gamma(attn_lrp(options.eps), options.gamma, options.gamma_attention)
