"""Attention-based attribution for any transformer, as Captum `Attribution` classes."""

from typing import TYPE_CHECKING

from captum_attn._on_demand import on_demand

if TYPE_CHECKING:
    from captum_attn import errors, intervene, metrics, objectives
    from captum_attn.attr import (
        CPLRP,
        AttCAT,
        AttentionFlow,
        AttentionGradCam,
        AttentionRollout,
        AttnLRP,
        BeyondIntuition,
        ConservativeLRP,
        DeepIntegratedExplanations,
        GenericAttention,
        GradEclip,
        GradSam,
        HeterogenousAttention,
        Odam,
        PartialLRP,
        RawAttention,
        TransformerAttribution,
        TransformerInputSampling,
        TransformerLRP,
        TransitionAttention,
        VitCX,
        VTranM,
        rules,
    )
    from captum_attn.errors import AttnError
    from captum_attn.evaluation import evaluate

__version__ = "0.1.0"

__all__ = [
    "AttCAT",
    "AttentionFlow",
    "AttentionGradCam",
    "AttentionRollout",
    "AttnError",
    "AttnLRP",
    "BeyondIntuition",
    "CPLRP",
    "ConservativeLRP",
    "DeepIntegratedExplanations",
    "GenericAttention",
    "GradEclip",
    "GradSam",
    "HeterogenousAttention",
    "Odam",
    "PartialLRP",
    "RawAttention",
    "TransformerAttribution",
    "TransformerInputSampling",
    "TransformerLRP",
    "TransitionAttention",
    "VTranM",
    "VitCX",
    "errors",
    "evaluate",
    "intervene",
    "metrics",
    "objectives",
    "rules",
]

# The names that are in none of these are methods.
_HOMES = {"AttnError": "errors", "evaluate": "evaluation"}
_MODULES = ("attr", "errors", "evaluation", "intervene", "metrics", "objectives", "observe")
_methods = [name for name in __all__ if name not in (*_HOMES, *_MODULES)]
__getattr__, __dir__ = on_demand(__name__, {**dict.fromkeys(_methods, "attr"), **_HOMES}, _MODULES)
