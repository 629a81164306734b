"""The torch functions by kind, by name: one table for functions, methods and in-place forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

# What a table of rules speaks about, and what each kind holds. `Kind` names are the table's keys.
KINDS: dict[str, str] = {
    "linear": "linear layers, and products of an activation with a constant",
    "convolution": "convolutions with constant weights",
    "image": "a convolution that reads an image input itself",
    "map": "attention map x values; operands: map, values",
    "product": "any other product of two activations that sums over an axis (QK^T)",
    "attention": "the fused attention kernel; operands: q, k, v, mask",
    "gate": "elementwise product with what comes out of a nonlinearity; operands: gate, other",
    "multiply": "elementwise product of two activations, neither or both of them gates",
    "divide": "quotient of two activations; operands: numerator, denominator",
    "solve": "solution of a linear system, A^-1 B; operands: B, A",
    "composite": "product or quotient of two elementwise functions of one tensor; operand: it",
    "activation": "elementwise nonlinearities",
    "norm": "layer, group, instance and RMS norm; batch norm of a batch's own statistics",
    "batch_norm": "batch norm with running statistics, which is linear",
    "statistic": "square roots, variances, norms, reciprocals: what others are divided by",
    "softmax": "softmax and log-softmax",
    "add": "sums and differences of two tensors",
    "scale": "products with a constant or a statistic, shifts by a number, masks on scores",
    "centre": "a tensor less its own mean",
    "reduce": "sums, means, average pooling, interpolation, sampling at fixed places",
    "accumulate": "sums into chosen places (index_add, scatter_add)",
    "places": "where grid_sample reads, if that depends on the input (deformable attention)",
    "other": "whatever else computes (an LSTM, a Fourier transform)",
}  # fmt: skip

_ALIASES = {
    "radd": "add", "subtract": "sub", "multiply": "mul", "rmul": "mul", "divide": "div",
    "truediv": "div", "true_divide": "div", "rtruediv": "rdiv", "rdiv": "rdiv",
    "negative": "neg", "absolute": "abs", "expit": "sigmoid", "clip": "clamp",
    "logsigmoid": "log_sigmoid", "rmatmul": "matmul", "arctan": "atan", "arcsinh": "asinh",
    "vector_norm": "norm", "matrix_norm": "norm", "frobenius_norm": "norm", "_grouped_mm":
    "grouped_mm", "concat": "cat", "concatenate": "cat", "_weight_norm": "weight_norm",
}  # fmt: skip

# f(0) = 0 for these; for the others f(0) is computed.
ZERO_AT_ZERO = frozenset(
    "relu gelu silu tanh elu selu celu leaky_relu relu6 hardtanh hardswish mish softsign "
    "tanhshrink hardshrink softshrink prelu rrelu sin tan asin atan sinh asinh atanh erf erfinv "
    "expm1 log1p abs square pow neg rmsnorm".split()
)
ACTIVATIONS = ZERO_AT_ZERO - {"pow", "neg", "rmsnorm"} | frozenset(
    "sigmoid hardsigmoid softplus log_sigmoid threshold exp exp2 log log2 log10 cos acos cosh "
    "acosh erfc clamp clamp_min clamp_max sinc logit digamma lgamma i0 i0e ndtr".split()
)
STATISTICS = frozenset("sqrt rsqrt var std norm logsumexp reciprocal".split())
# Products that sum over an axis: name -> the places of its two factors.
PRODUCTS: dict[str, tuple[int, int]] = {
    "matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "inner": (0, 1),
    "baddbmm": (1, 2), "addmm": (1, 2), "addbmm": (1, 2), "addmv": (1, 2), "einsum": (1, 2),
    "tensordot": (0, 1), "linear": (0, 1), "grouped_mm": (0, 1), "outer": (0, 1), "kron": (0, 1),
    "conv1d": (0, 1), "conv2d": (0, 1), "conv3d": (0, 1), "conv_transpose1d": (0, 1),
    "conv_transpose2d": (0, 1), "conv_transpose3d": (0, 1), "bilinear": (0, 1), "cross": (0, 1),
    "chain_matmul": (0, 1), "vdot": (0, 1), "vecdot": (0, 1),
}  # fmt: skip
FACTOR_NAMES = (
    ("input", "mat1", "batch1", "self", "mat", "tensor1", "input1", "mat_a"),
    ("weight", "other", "mat2", "batch2", "tensor", "vec", "vec2", "tensor2", "input2", "mat_b"),
)
CONVOLUTIONS = frozenset(name for name in PRODUCTS if name.startswith("conv"))
ADDED_TO = frozenset("baddbmm addmm addbmm addmv".split())  # input + product
NORMS = frozenset("layer_norm group_norm instance_norm rms_norm batch_norm".split())
SOFTMAXES = frozenset("softmax log_softmax softmin _softmax".split())
REDUCTIONS = frozenset(
    "mean sum nanmean nansum cumsum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample grid_sample fold trace "
    "segment_reduce".split()
)
ACCUMULATIONS = frozenset("index_add scatter_add".split())
SOLVES = frozenset("solve solve_triangular".split())
# Elementwise and without an effect on the values' meaning: a chain goes on through these.
STILL = frozenset(
    "to type float double half bfloat16 contiguous clone type_as cuda cpu dropout dropout1d "
    "dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout alias identity "
    "positive view_as detach".split()
)
# These take the shape or the type of their second argument, and nothing else of it.
LIKE_ANOTHER = frozenset("expand_as view_as reshape_as type_as to".split())
# These move, pick and repeat entries; what is known of a tensor goes along.
MOVING = STILL | frozenset(
    "view reshape reshape_as flatten unflatten ravel permute transpose swapaxes swapdims movedim "
    "moveaxis t adjoint T mT H mH squeeze unsqueeze expand expand_as broadcast_to "
    "broadcast_tensors "
    "repeat repeat_interleave tile cat stack hstack vstack dstack column_stack split chunk "
    "tensor_split split_with_sizes unbind narrow select getitem setitem index_select gather take "
    "take_along_dim masked_select masked_fill masked_scatter where tril triu diagonal diag "
    "diag_embed flip fliplr flipud roll rot90 pad constant_pad_nd unfold pixel_shuffle "
    "pixel_unshuffle channel_shuffle copy index_copy index_fill index_put scatter zero fill real "
    "imag view_as_real view_as_complex as_strided sort topk max min amax amin maximum minimum "
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "fmax fmin median kthvalue mode cummax cummin nan_to_num embedding atleast_1d atleast_2d "
    "atleast_3d block_diag meshgrid resolve_conj resolve_neg conj data numpy tolist item "
    "max_unpool1d max_unpool2d max_unpool3d fractional_max_pool2d slice_scatter select_scatter "
    "unsafe_chunk unsafe_split block_diag pin_memory set_ resize retain_grad vsplit hsplit "
    "nested_tensor_from_mask unique nonzero".split()
)
# Piecewise constant: their derivative is 0, so that what they give is a constant.
ROUNDINGS = frozenset("floor ceil round trunc fix sign sgn heaviside floor_divide".split())
# Giving no tensor that a gradient passes: nothing to rule.
CONSTANT = ROUNDINGS | frozenset(
    "eq ne lt le gt ge isnan isinf isfinite argmax argmin argsort bucketize searchsorted one_hot "
    "bernoulli multinomial zeros_like ones_like rand_like randn_like empty_like full_like "
    "new_zeros new_ones new_full new_empty new_tensor size dim numel stride is_floating_point "
    "is_contiguous is_complex any all allclose equal logical_and logical_or logical_not bool int "
    "long histc len bincount shape dtype device requires_grad grad_fn is_leaf ndim layout "
    "is_cuda is_sparse is_quantized is_nested is_meta is_mps _is_view register_hook get_device "
    "element_size nelement storage_offset untyped_storage data_ptr backward hash format repr "
    "grad is_inference is_conj is_neg nonzero_static masked_indices isclose isin bitwise_and "
    "bitwise_or bitwise_not invert and or xor iter contains reduce_ex deepcopy count_nonzero "
    "normal uniform trunc_normal random erf_sample exponential version _version is_pinned "
    "is_shared names name has_names cdouble result_type can_cast is_same_size is_signed "
    "is_nonzero int8 char byte short bitwise_left_shift bitwise_right_shift output_nr is_xpu "
    "is_xla _base _backward_hooks".split()
)
# Linear in their one activation as they are, without a rule of their own.
LINEAR_AS_IS = frozenset(
    "diff fft rfft ifft irfft fft2 ifft2 fftn ifftn rfft2 irfft2 stft "
    "istft fftshift ifftshift hfft ihfft triangular_solve_rhs complex cumulative_trapezoid "
    "trapezoid".split()
)


@lru_cache(maxsize=4096)
def read(func: Callable[..., Any]) -> tuple[str, bool]:
    """(name, whether it writes into its first argument): `Tensor.add_` -> ("add", True)."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", "")), False
    for prefix in ("special_", "linalg_", "fft_"):
        name = name.removeprefix(prefix)
    in_place = False
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name.startswith("i") and name[1:] in _IN_PLACE:
            name, in_place = name[1:], True
    elif name.endswith("_"):
        name, in_place = name.rstrip("_"), name not in ("requires_grad_",)
    in_place |= name == "setitem"
    return _ALIASES.get(name, name), in_place


_IN_PLACE = frozenset("add sub mul div truediv floordiv mod pow matmul and or xor".split())
