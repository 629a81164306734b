"""What other rooms use of this one, beside the measures: a model's inputs and outputs."""

from captum_attn.metrics._inputs import Model, predicted, rows_of, tensor_of

__all__ = ["Model", "predicted", "rows_of", "tensor_of"]
