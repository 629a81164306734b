"""Rules of relevance propagation: kinds of operations, the published tables, and what rules see.

`rules=` of `AttnLRP`, `CPLRP`, `ConservativeLRP`, `TransformerLRP`, `TransformerAttribution` and
`PartialLRP` takes the name of a table, or a mapping from kinds to rules, laid over the method's
own. A rule is `Shares`, factors of the gradient into each operand; or a callable (operation, what
arrives at its output) -> what each operand gets: a gradient for the first three, whose relevance is
value x gradient, and relevance for the others.

Examples::

    >>> AttnLRP(model).attribute(images, 3, rules={"product": Shares((0.0, 1.0))})
    >>> AttnLRP(model).attribute(images, 3, rules={"linear": epsilon, "convolution": epsilon})
    >>> print(AttnLRP(model).describe(images))      # which kinds ran, by which rule
"""

from captum_attn.attr._gradient_rules import constant_normaliser, epsilon, gamma, identity
from captum_attn.attr._relevance_rules import add, halves, pass_on, proportion, z_apart, z_b, z_plus
from captum_attn.attr._rule_sets import RULE_SETS
from captum_attn.observe.operators.bridge import Operation, Rule, Rules, Shares
from captum_attn.observe.operators.kinds import KINDS

__all__ = [
    "KINDS",
    "RULE_SETS",
    "Operation",
    "Rule",
    "Rules",
    "Shares",
    "add",
    "constant_normaliser",
    "epsilon",
    "gamma",
    "halves",
    "identity",
    "pass_on",
    "proportion",
    "z_apart",
    "z_b",
    "z_plus",
]
