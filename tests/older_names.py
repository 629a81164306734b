"""The golden weights carry transformers 5's names of parameters; older versions have others."""

from __future__ import annotations

from torch import Tensor, nn

# family -> (transformers 5, 4.48) parts of names, replaced in this order.
OLDER = {
    "vit": (
        (".o_proj.", ".output.dense."), (".q_proj.", ".attention.query."),
        (".k_proj.", ".attention.key."), (".v_proj.", ".attention.value."),
        (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."),
        ("vit.layers.", "vit.encoder.layer."),
    ),
    "detr": (
        (".o_proj.", ".out_proj."), (".mlp.", "."), (".backbone.", ".backbone.conv_encoder."),
    ),
}  # fmt: skip


def load(model: nn.Module, weights: dict[str, Tensor], family: str) -> None:
    """Loads all weights, under the names that the installed version has."""
    if not set(weights) <= set(model.state_dict()):
        for new, old in OLDER[family]:
            weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    model.load_state_dict(weights)
