"""What other rooms use of this one, beside the measures: a model's inputs and outputs, options."""

from captum_attn.metrics._checks import known_options
from captum_attn.metrics._engine import OPTIONS
from captum_attn.metrics._model import Model, checked_target, predicted, rows_of, tensor_of

__all__ = [
    "OPTIONS",
    "Model",
    "checked_target",
    "known_options",
    "predicted",
    "rows_of",
    "tensor_of",
]
