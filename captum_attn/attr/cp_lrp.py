"""CP-LRP: attention maps and gates are constants (Achtibat et al., ICML 2024, and their code; after
Ali et al., ICML 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from captum_attn.attr._gradient_rules import check_numbers, cp_lrp, with_gamma
from captum_attn.attr._lrp import InputRelevance
from captum_attn.observe.operators.bridge import Rules


class CPLRP(InputRelevance):
    r"""CP-LRP: AttnLRP with attention maps and gates held constant.

    Relevance is x ∘ g with g the gradient of the explained logit under these rules:

    - A V hands everything to V, a gated product everything to what is gated;
    - any other product of two activations hands half of the gradient to each;
    - an elementwise nonlinearity f: g_x = g (f(x) − f(0)) / x;
    - a normaliser (the std of a norm, a quotient's divisor) is a constant;
    - linear layers, sums and pooling keep their gradient (LRP-0).

    On a model without biases the relevance of the inputs adds up to the logit.

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

        >>> heat = CPLRP(model).attribute(images, target=3).sum(1)            # (B, H, W), signed
        >>> CPLRP(vit).attribute(images, target=3, gamma=(0.25, 0.05))
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
        return "CP-LRP"

    @classmethod
    def table(cls, options: Options) -> Rules:
        return with_gamma(cp_lrp(options.eps), options.gamma, options.gamma_attention)
