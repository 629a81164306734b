"""How the models of `captum_attn.toy` were trained: one script for each, outside of the package."""
