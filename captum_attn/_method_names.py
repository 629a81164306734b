"""Names of methods as people give them: the class, its paper's short name, in any letter case.

Nothing here imports torch, so that a mistyped name is answered before it is waited for.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import captum_attn
from captum_attn._checks import shown, suggested
from captum_attn.errors import OptionError

__all__ = ["ALIASES", "method_class", "method_name", "with_hyphens", "without_hyphens"]

# What papers and other packages call a method -> its class here, or in Captum.
ALIASES = {
    "GAE": "GenericAttention",
    "Chefer": "GenericAttention",
    "rollout": "AttentionRollout",
    "raw": "RawAttention",
    "attention": "RawAttention",
    "TokenTM": "VTranM",
    "heterogeneous": "HeterogenousAttention",
    "heterogenous": "HeterogenousAttention",
    "HeterogeneousAttention": "HeterogenousAttention",
    "T-Attr": "TransformerAttribution",
    "Grad-CAM": "AttentionGradCam",
    "TAM": "TransitionAttention",
    "TIS": "TransformerInputSampling",
    "DIX": "DeepIntegratedExplanations",
    "ViT-CX": "VitCX",
    "BI": "BeyondIntuition",
    "flow": "AttentionFlow",
    "CP-LRP": "CPLRP",
    "Attn-LRP": "AttnLRP",
    "Grad-SAM": "GradSam",
    "Grad-ECLIP": "GradEclip",
    "Conservative-LRP": "ConservativeLRP",
    "Partial-LRP": "PartialLRP",
    "Transformer-LRP": "TransformerLRP",
    "IG": "IntegratedGradients",
    "integrated-gradients": "IntegratedGradients",
    "random": "RandomAttribution",
}
NO_METHODS = {"AttnError", "errors", "evaluate", "metrics", "objectives", "rules"}
RANDOM = "RandomAttribution"  # of captum_attn.metrics: what a method has to beat


def method_name(option: str, given: Any) -> str:
    """The class that a name stands for: itself, an alias, or either in other letters.

    Args:
        option (str): what the name was given to, for the error.
        given (str): such as "GenericAttention", "GAE", "rollout", "T-Attr".

    Returns:
        str: the name of a class of captum_attn, of captum.attr, or RandomAttribution.

    Raises:
        OptionError: for any other name; it lists what there is.

    Examples::

        >>> method_name("methods", "gae"), method_name("methods", "T-Attr")
        ('GenericAttention', 'TransformerAttribution')
    """
    own = [name for name in captum_attn.__all__ if name not in NO_METHODS]
    known = [*own, RANDOM, *_of_captum()]
    if given in known:
        return str(given)
    plain = {_plain(name): name for name in known} | {_plain(a): n for a, n in ALIASES.items()}
    if isinstance(given, str) and (found := plain.get(_plain(given))):
        return found
    near = suggested(given, [*known, *ALIASES])
    raise OptionError(
        f"{option}: neither captum_attn nor captum.attr has {shown(given)}{near or ';'} "
        f"captum_attn has {', '.join(own)}; captum.attr has IntegratedGradients, Saliency and "
        "others"
    )


def method_class(option: str, given: Any) -> type:
    """The class of `method_name`.

    Raises:
        OptionError: for a name of captum.attr that is no method, too.

    Examples::

        >>> method_class("methods", "GAE").__name__
        'GenericAttention'
    """
    name = method_name(option, given)
    import captum.attr

    from captum_attn.metrics import RandomAttribution

    found = getattr(captum_attn if name in captum_attn.__all__ else captum.attr, name, None)
    found = RandomAttribution if name == RANDOM else found
    if not isinstance(found, type) or not issubclass(found, captum.attr.Attribution):
        raise OptionError(f"{option}: {name} of captum.attr is no attribution method")
    return found


def without_hyphens(text: str) -> str:
    """``"T-Attr, GAE"`` -> ``"TAttr, GAE"``: the aliases as Python can read them.

    Examples::

        >>> without_hyphens("T-Attr(start_layer=-1), Grad-CAM")
        'TAttr(start_layer=-1), GradCAM'
    """
    for alias in ALIASES:
        if "-" in alias:
            text = re.sub(rf"(?<![\w'\"-]){alias}(?![\w-])", alias.replace("-", ""), text,
                          flags=re.IGNORECASE)  # fmt: skip
    return text


def with_hyphens(call: str) -> str:
    """The alias at the beginning of a call as papers write it.

    Examples::

        >>> with_hyphens("TAttr(start_layer=1)")
        'T-Attr(start_layer=1)'
    """
    head, bracket, rest = call.partition("(")
    written = {alias.replace("-", "").casefold(): alias for alias in ALIASES if "-" in alias}
    is_class = head in captum_attn.__all__ or head in _of_captum()
    return call if is_class else written.get(head.casefold(), head) + bracket + rest


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).casefold()


def _of_captum() -> list[str]:
    """`captum.attr.__all__`, read and not run: importing it takes seconds."""
    found = importlib.util.find_spec("captum")
    if found is None or found.origin is None:
        return []
    source = (Path(found.origin).parent / "attr" / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []
