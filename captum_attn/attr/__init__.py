"""The attribution methods, and what a method of one's own needs: its base, `Run` and `Block`."""

from captum_attn.attr._base import AttentionAttribution, Block, Result, Run
from captum_attn.attr.generic_attention import GenericAttention
from captum_attn.attr.heterogenous import HeterogenousAttention
from captum_attn.attr.raw_attention import RawAttention
from captum_attn.attr.rollout import AttentionRollout
from captum_attn.attr.vtranm import VTranM

__all__ = [
    "AttentionAttribution",
    "AttentionRollout",
    "Block",
    "GenericAttention",
    "HeterogenousAttention",
    "RawAttention",
    "Result",
    "Run",
    "VTranM",
]
