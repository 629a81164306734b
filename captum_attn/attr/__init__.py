"""The attribution methods, and what a method of one's own needs: its base, `Run` and `Block`."""

from captum_attn.attr._base import AttentionAttribution, Block, Result, Run
from captum_attn.attr.attcat import AttCAT
from captum_attn.attr.attention_flow import AttentionFlow
from captum_attn.attr.attention_gradcam import AttentionGradCam
from captum_attn.attr.attn_lrp import AttnLRP
from captum_attn.attr.beyond_intuition import BeyondIntuition
from captum_attn.attr.conservative_lrp import ConservativeLRP
from captum_attn.attr.cp_lrp import CPLRP
from captum_attn.attr.deep_integrated_explanations import DeepIntegratedExplanations
from captum_attn.attr.generic_attention import GenericAttention
from captum_attn.attr.grad_eclip import GradEclip
from captum_attn.attr.grad_sam import GradSam
from captum_attn.attr.heterogenous import HeterogenousAttention
from captum_attn.attr.odam import Odam
from captum_attn.attr.partial_lrp import PartialLRP
from captum_attn.attr.raw_attention import RawAttention
from captum_attn.attr.rollout import AttentionRollout
from captum_attn.attr.transformer_attribution import TransformerAttribution
from captum_attn.attr.transformer_input_sampling import TransformerInputSampling
from captum_attn.attr.transformer_lrp import TransformerLRP
from captum_attn.attr.transition_attention import TransitionAttention
from captum_attn.attr.vit_cx import VitCX
from captum_attn.attr.vtranm import VTranM

__all__ = [
    "AttCAT",
    "AttentionAttribution",
    "AttentionFlow",
    "AttentionGradCam",
    "AttentionRollout",
    "AttnLRP",
    "BeyondIntuition",
    "Block",
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
    "Result",
    "Run",
    "TransformerAttribution",
    "TransformerInputSampling",
    "TransformerLRP",
    "TransitionAttention",
    "VTranM",
    "VitCX",
]
