"""Full relevance propagation: Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention
Visualization", CVPR 2021, down to the input."""

from __future__ import annotations

from dataclasses import dataclass

from captum_attn.attr._lrp import InputRelevance
from captum_attn.attr._relevance_rules import transformer_lrp
from captum_attn.observe.operators.bridge import Rules


class TransformerLRP(InputRelevance):
    r"""The relevance pass of Chefer, Gur & Wolf, CVPR 2021, down to the input ("full LRP").

    From a one-hot R at the output, each operation shares out what arrives, with sd(a, b) =
    a / (b + 1e-9) and 0 where b = 0:

    - linear layers and convolutions by z+: R_x = x+ (w+^T S) + x− (w−^T S), S = sd(R, Z), Z =
      x+ w+ + x− w−; a convolution that reads the image by z-B between the image's extremes;
    - sums in proportion, then normalised so that each summand gets its due of the whole (`renorm`);
    - products of two activations half to each;
    - nonlinearities, norms and softmax pass R on.

    An operation without a rule on the way is a `RuleError` that names it. Departures from the
    authors' code: sums per example, not over the batch; one denominator in convolutions; nothing is
    lost at forks.

    Args:
        forward_func: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        renorm (bool): False leaves out the normalisation of sums. Default: True.
        joint (bool): False divides the two parts of Z in linear layers apart; with `renorm=False`
            this is the authors' older baseline "LRP". Default: True.
        rules (Mapping or str, optional): other rules for some kinds of operations, or a published
            table by name, see `captum_attn.attr.rules`. Default: None.

    Examples::

        >>> heat = TransformerLRP(model).attribute(images, target=3).sum(1)       # (B, H, W)
    """

    @dataclass(frozen=True)
    class Options(InputRelevance.Options):
        renorm: bool = True
        joint: bool = True

    form = "relevance"

    @classmethod
    def get_name(cls) -> str:
        return "Transformer LRP"

    @classmethod
    def table(cls, options: Options) -> Rules:
        return transformer_lrp(options.renorm, options.joint)
