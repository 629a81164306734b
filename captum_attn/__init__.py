"""Attention-based attribution for any transformer, as Captum `Attribution` classes."""

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
