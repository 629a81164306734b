"""Attention-based attribution for any transformer, as Captum `Attribution` classes."""

from captum_attn import errors, metrics, objectives
from captum_attn.attr import (
    CPLRP,
    AttCAT,
    AttentionGradCam,
    AttentionRollout,
    AttnLRP,
    BeyondIntuition,
    ConservativeLRP,
    GenericAttention,
    GradEclip,
    GradSam,
    HeterogenousAttention,
    PartialLRP,
    RawAttention,
    TransformerAttribution,
    TransformerLRP,
    TransitionAttention,
    VTranM,
    rules,
)
from captum_attn.errors import AttnError
from captum_attn.evaluation import evaluate

__version__ = "0.1.0"

__all__ = [
    "AttCAT",
    "AttentionGradCam",
    "AttentionRollout",
    "AttnError",
    "AttnLRP",
    "BeyondIntuition",
    "CPLRP",
    "ConservativeLRP",
    "GenericAttention",
    "GradEclip",
    "GradSam",
    "HeterogenousAttention",
    "PartialLRP",
    "RawAttention",
    "TransformerAttribution",
    "TransformerLRP",
    "TransitionAttention",
    "VTranM",
    "errors",
    "evaluate",
    "metrics",
    "objectives",
    "rules",
]
