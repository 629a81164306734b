"""Attention-based attribution for any transformer, as Captum `Attribution` classes."""

from captum_attn import errors, metrics, objectives
from captum_attn.attr.generic_attention import GenericAttention
from captum_attn.attr.heterogenous import HeterogenousAttention
from captum_attn.attr.raw_attention import RawAttention
from captum_attn.attr.rollout import AttentionRollout
from captum_attn.attr.vtranm import VTranM
from captum_attn.errors import AttnError
from captum_attn.evaluation import evaluate

__version__ = "0.1.0"

__all__ = [
    "AttentionRollout",
    "AttnError",
    "GenericAttention",
    "HeterogenousAttention",
    "RawAttention",
    "VTranM",
    "errors",
    "evaluate",
    "metrics",
    "objectives",
]
