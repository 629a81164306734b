"""Observes attention in the user's own model."""

from captum_attn.observe.capture.attention_call import AttentionCall, Block
from captum_attn.observe.observation import Observation, observe

__all__ = ["AttentionCall", "Block", "Observation", "observe"]
