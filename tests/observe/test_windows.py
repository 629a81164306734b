"""Windows, pyramids and folded axes: tokens that change places, merge, or enter several windows.

Each model's geometry is written out by hand; A and its gradient come from the model's eager form,
recorded at `softmax` without the library.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_attn import AttentionRollout, GenericAttention, HeterogenousAttention, RawAttention
from tests import plain
from tests.plain import close

TARGET = 2


class SoftmaxRecorder(TorchFunctionMode):
    """Keeps every softmax, with its gradient."""

    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            out.retain_grad()
            self.maps.append(out)
        return out


def recorded(model, example):
    """-> [(A, gradient)] of one example, each (windows, H, q, k)."""
    with SoftmaxRecorder() as recorder:
        logits = model(example).logits
    logits[0, TARGET].backward()
    model.zero_grad()
    return [(a.detach(), a.grad) for a in recorder.maps]


# ------------------------------------------------------------ the plain walk
class Walk:
    """R of one token stream, (tokens, tokens at the start), by loops over windows and tokens.

    Args:
        mode (str): how heads are weighed and the residual is added, see `step`.
    """

    def __init__(self, n, mode):
        self.R, self.mode = plain.eye(n), mode

    def merge(self, groups):
        """Each new token is the average of a group of old ones."""
        self.R = torch.stack([sum(self.R[i] for i in group) / len(group) for group in groups])

    def step(self, A, G, windows):
        """`windows`: for each its (queries, keys), a token or None for padding, keys as groups."""
        updated = {}
        for (queries, keys), maps, gradients in zip(windows, A, G, strict=True):
            rows = [torch.zeros_like(self.R[0])] * len(keys)
            for k, group in enumerate(keys):
                if group:
                    rows[k] = sum(self.R[i] for i in group) / len(group)
            weighed = self.weighed(maps, gradients)
            for q, token in enumerate(queries):
                if token is None:
                    continue
                own, read = 1.0, weighed[q]
                if self.mode == "rollout":
                    own, read = 1 / (1 + read.sum()), read / (1 + read.sum())
                row = own * self.R[token] + sum(a * row for a, row in zip(read, rows, strict=True))
                updated.setdefault(token, []).append(row)
        new = self.R.clone()
        for token, rows in updated.items():  # copies of a token in several windows are averaged
            new[token] = sum(rows) / len(rows)
        self.R = new

    def weighed(self, maps, gradients):
        per_head = {
            "rollout": maps,
            "gae": (maps * gradients).clamp(min=0),
            "full": maps * gradients,
            "absolute": maps * gradients.abs(),
        }[self.mode]
        return plain.fuse_heads(per_head)


METHODS = {
    "rollout": (AttentionRollout, {}),
    "gae": (GenericAttention, {}),
    "full": (HeterogenousAttention, {"correction": "full"}),
    "absolute": (HeterogenousAttention, {"correction": "absolute"}),
}


def whole(tokens):
    """One window in which every token asks and answers."""
    return [(tokens, [[t] for t in tokens])]


# ------------------------------------------------------------ Swin
def windows_of(grid, window, shift):
    """Lanes of a Swin block: `grid` (h, w) of token numbers, padded below and to the right."""
    h, w = len(grid), len(grid[0])
    height, width = -(-h // window) * window, -(-w // window) * window
    padded = [
        [grid[i][j] if i < h and j < w else None for j in range(width)] for i in range(height)
    ]
    if shift:
        padded = [
            [padded[(i + shift) % height][(j + shift) % width] for j in range(width)]
            for i in range(height)
        ]
    windows = []
    for top in range(0, height, window):
        for left in range(0, width, window):
            tokens = [padded[top + i][left + j] for i in range(window) for j in range(window)]
            windows.append((tokens, [[] if t is None else [t] for t in tokens]))
    return windows


def numbered(h, w):
    return [[i * w + j for j in range(w)] for i in range(h)]


def swin_walk(mode, maps, side, window, depths):
    walk, calls = Walk(side * side, mode), iter(maps)
    for stage, depth in enumerate(depths):
        if stage:
            side //= 2
            old = numbered(2 * side, 2 * side)
            walk.merge(
                [
                    [old[2 * i + a][2 * j + b] for a in (0, 1) for b in (0, 1)]
                    for i in range(side)
                    for j in range(side)
                ]
            )
        for block in range(depth):
            shift = window // 2 if block % 2 and side > window else 0
            walk.step(*next(calls), windows_of(numbered(side, side), window, shift))
    return walk.R.mean(0)


def swin(family, side, window=2, depths=(2, 2)):
    config = getattr(transformers, f"{family}Config")(
        image_size=2 * side, patch_size=2, embed_dim=8, depths=list(depths), num_heads=[2, 4],
        window_size=window, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForImageClassification")(config)
    return (
        model,
        (3, 2 * side, 2 * side),
        lambda mode, maps: swin_walk(mode, maps, side, window, depths),
    )


# ------------------------------------------------------------ PVT
def pvt():
    """Keys are convolved with the stride of the reduction; [CLS] joins in the last stage."""
    config = transformers.PvtConfig(
        image_size=32, num_encoder_blocks=3, depths=[2, 1, 2], sequence_reduction_ratios=[4, 2, 1],
        hidden_sizes=[8, 8, 8], patch_sizes=[4, 2, 2], strides=[4, 2, 2],
        num_attention_heads=[1, 2, 2], mlp_ratios=[2, 2, 2], num_labels=3,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.PvtForImageClassification(config), (3, 32, 32), pvt_walk


def squares(side, size):
    """Groups of tokens that a convolution with stride and kernel `size` merges."""
    grid, cells = numbered(side, side), range(0, side, size)
    inside = range(size)
    return [[grid[i + a][j + b] for a in inside for b in inside] for i in cells for j in cells]


def pvt_walk(mode, maps):
    walk, calls = Walk(64, mode), iter(maps)
    for _ in range(2):
        walk.step(*next(calls), [(list(range(64)), squares(8, 4))])
    walk.merge(squares(8, 2))
    walk.step(*next(calls), [(list(range(16)), squares(4, 2))])
    walk.merge(squares(4, 2))
    walk.R = torch.cat([torch.zeros(1, 64, dtype=torch.double), walk.R])  # [CLS] knows no patch
    for _ in range(2):
        walk.step(*next(calls), whole(list(range(5))))
    return walk.R[0]


# ------------------------------------------------------------ TimeSformer
FRAMES, PATCHES = 3, 4


def timesformer():
    """Attention over time for each patch, then over space for each frame with a copy of [CLS]."""
    config = transformers.TimesformerConfig(
        image_size=8, patch_size=4, num_frames=FRAMES, hidden_size=16, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=16, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.TimesformerForVideoClassification(config)
    return model, (FRAMES, 3, 8, 8), timesformer_walk


def timesformer_walk(mode, maps):
    """Tokens: [CLS], then frame by frame its patches."""
    n = PATCHES * FRAMES
    walk, calls = Walk(n, mode), iter(maps)
    walk.R = torch.cat([torch.zeros(1, n, dtype=torch.double), walk.R])  # [CLS] knows no patch
    for _ in range(3):
        over_time = [[1 + t * PATCHES + p for t in range(FRAMES)] for p in range(PATCHES)]
        walk.step(*next(calls), [window for tokens in over_time for window in whole(tokens)])
        over_space = [[0, *(1 + t * PATCHES + p for p in range(PATCHES))] for t in range(FRAMES)]
        walk.step(*next(calls), [window for tokens in over_space for window in whole(tokens)])
    return walk.R[0]


MODELS = {
    "swin": lambda: swin("Swin", 8),
    "swin_padded": lambda: swin("Swin", 10, window=3),
    "swinv2": lambda: swin("Swinv2", 8),
    "pvt": pvt,
    "timesformer": timesformer,
}


def model_and_inputs(name):
    torch.manual_seed(0)
    model, shape, walk = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.double().eval(), torch.randn(2, *shape, dtype=torch.double), walk


@pytest.mark.parametrize("mode", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_follow_the_geometry(name, mode):
    model, images, walk = model_and_inputs(name)
    method, options = METHODS[mode]
    tokens = method(model).attribute_tokens(images, TARGET, **options)["pixel_values"]
    for b in range(2):
        close(tokens[b], walk(mode, recorded(model, images[b : b + 1])), 1e-7)


# ------------------------------------------------------------ the contract, for these models
EVERY = {"raw": (RawAttention, {}), **METHODS}
every_method = pytest.mark.parametrize("mode", EVERY)
every_model = pytest.mark.parametrize("name", MODELS)


@every_method
@every_model
def test_relevance_lies_on_the_patches(name, mode):
    """Each pixel gets its patch's relevance, in equal shares for the channels."""
    model, images, _ = model_and_inputs(name)
    method, options = EVERY[mode]
    explain = method(model)
    tokens = explain.attribute_tokens(images, TARGET, **options)["pixel_values"]
    assert tokens.isfinite().all() and (tokens.abs().amax(1) > 0).all()
    laid = explain.attribute(images, TARGET, interpolation="nearest", **options)
    assert laid.shape == images.shape and laid.dtype == images.dtype
    frames, (height, width) = images.shape[1:-3], images.shape[-2:]
    patch = round((height * width * (frames or (1,))[0] / tokens.shape[1]) ** 0.5)
    grid = tokens.view(2, *frames, height // patch, width // patch)
    grid = grid.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    close(laid, (grid / 3).unsqueeze(-3).expand_as(laid), 1e-12)


@every_method
@every_model
def test_batch_equals_one_by_one(name, mode):
    model, images, _ = model_and_inputs(name)
    method, options = EVERY[mode]
    together = method(model).attribute(images, [1, 2], **options)
    for b, target in enumerate([1, 2]):
        close(together[b : b + 1], method(model).attribute(images[b : b + 1], target, **options))


@every_model
def test_the_model_is_as_found(name, left_as_found, in_use):
    model, images, _ = model_and_inputs(name)
    with in_use(model), left_as_found(model, images), torch.no_grad():
        GenericAttention(model).attribute(images, TARGET)


@every_model
def test_a_merged_token_shares_what_it_gets(name):
    """Rollout is stochastic: the rows that [CLS] and padding do not take sum to one at most."""
    model, images, _ = model_and_inputs(name)
    total = AttentionRollout(model).attribute_tokens(images)["pixel_values"].sum(1)
    assert (total <= 1 + 1e-12).all()
    if name in ("swin", "swinv2"):
        close(total, torch.ones_like(total), 1e-12)
