"""The test zoo: tiny transformers with random weights, built from configurations, and what is known
of each by hand: how many attention calls it makes, what its token stream is called and how long it
is, and which rows of it the explained output reads.

All weights are a function of the parameter's name and shape, so models of one `twin` group, which
write the same computation in different ways, have the same weights and must be explained alike.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTHS = (7, 4, 5)  # of the examples in a padded batch
VOCABULARY = 60


@dataclass(frozen=True)
class Sample:
    """A batch as the model takes it.

    Args:
        inputs: what is explained: a tensor, a tuple of tensors or a dict.
        extra (tuple): `additional_forward_args`; None for none.
        real (Tensor): (B, n) bool, which tokens of the stream are no padding; None: all. A dict
            of them where there are several streams.
    """

    inputs: Any
    extra: tuple | None = None
    real: Any = None

    def one(self, i: int) -> Sample:
        """The i-th example with its padding, a batch of one."""
        return Sample(*(_sliced(part, i) for part in (self.inputs, self.extra, self.real)))

    def to(self, dtype: torch.dtype) -> Sample:
        """The same with floating-point inputs in `dtype`."""
        return Sample(_cast(self.inputs, dtype), _cast(self.extra, dtype), self.real)

    def run(self, function: Callable) -> Any:
        """The function's output on this batch."""
        if isinstance(self.inputs, Mapping):
            return function(**self.inputs)
        inputs = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        return function(*inputs, *(self.extra or ()))


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(change, item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(change, item) for item in value)
    return value


def _sliced(value: Any, i: int) -> Any:
    return _mapped(lambda t: t[i : i + 1], value)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return _mapped(lambda t: t.to(dtype) if t.is_floating_point() else t, value)


@dataclass(frozen=True, eq=False)
class Model:
    """A model of the zoo and its inputs, without what is known of its attention.

    Args:
        name (str): name of the case.
        build (callable): -> the model with unset weights.
        examples (callable): (batch, generator) -> a list of single examples, of several lengths
            where the model takes such.
        collate (callable): list of examples -> `Sample`, padded.
        target: a value, or a callable `Sample` -> value.
        forward (callable): model -> the function that is explained; None: the model itself.
        random (bool): whether the model draws random numbers in eval mode.
    """

    name: str
    build: Callable[..., nn.Module]
    examples: Callable[[int, torch.Generator], list]
    collate: Callable[[list], Sample]
    target: Any = 1
    forward: Callable[[nn.Module], Callable] | None = None
    random: bool = False

    def sample(self, batch: int = 3, seed: int = 0) -> Sample:
        return self.collate(self.raw(batch, seed))

    def raw(self, batch: int = 3, seed: int = 0) -> list:
        generator = torch.Generator().manual_seed(1000 + seed)
        return self.examples(batch, generator)

    def model(self) -> nn.Module:
        """The model, built once per process; whoever changes it puts it back."""
        model = _model(self)
        SHARED.setdefault(self, kind_of(model))
        return model

    def fresh(self, *form: str) -> nn.Module:
        """A new copy of the model."""
        model = self.build(*form)
        set_weights(model)
        return model.eval()

    def function(self, model: nn.Module) -> Callable:
        return model if self.forward is None else self.forward(model)

    def target_of(self, sample: Sample) -> Any:
        return self.target(sample) if callable(self.target) else self.target


@dataclass(frozen=True, eq=False, kw_only=True)
class Case(Model):
    """One model with a single token stream.

    Args:
        calls (int): attention calls of one forward run.
        stream (str): name of the token stream.
        tokens (int): its length in a batch of three.
        readout: an int, or a callable (model, `Sample`) -> (B, n) weights that sum to 1.
        content (str): name of the entry of a Mapping that gets an attribution.
        grid (callable): (B, n) token relevance, input shape -> what `attr` summed over its
            channel axis must be with `interpolation="nearest"`; None: no statement.
        channel (int): that axis; None: there is none.
        twin (str): models of one group compute the same thing.
        attention (tuple): names of modules that run attention, for `describe`.
    """

    calls: int
    stream: str
    tokens: int
    readout: Any = 0
    content: str | None = None
    grid: Callable[[Tensor, torch.Size], Tensor] | None = None
    channel: int | None = None
    twin: str | None = None
    attention: tuple[str, ...] = field(default=())

    def readout_of(self, model: nn.Module, sample: Sample) -> Any:
        return self.readout(model, sample) if callable(self.readout) else self.readout

    def content_of(self, value: Any) -> Tensor:
        """The tensor of a result (or of inputs) that the token stream grows from."""
        if isinstance(value, Mapping):
            return value[self.content]
        return value[0] if isinstance(value, tuple) else value

    @property
    def padded(self) -> bool:
        return self.sample().real is not None


@cache
def _model(case: Model) -> nn.Module:
    return case.fresh()


SHARED: dict[Model, tuple] = {}
"""The models handed out since the test began, and what they were then."""


def kind_of(model: nn.Module) -> tuple:
    """What a test that does not copy the model's numbers can see of a change."""
    tensors = (*model.parameters(), *model.buffers())
    return model.training, [(t.dtype, t.requires_grad, t._version, t.grad is None) for t in tensors]


def set_weights(model: nn.Module) -> None:
    """Weights large enough for attention to differ from uniform; the same for the same name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            lookup = any(word in name for word in ("embedding", "token", "pos_", "wte", "wpe"))
            if lookup and parameter.ndim < 4:
                parameter.copy_(0.7 * noise)
            elif parameter.ndim < 2:
                around_one = bool((parameter == 1).all())  # a norm's scale
                parameter.copy_(0.1 * noise + (1 if around_one else 0))
            else:
                parameter.copy_(1.2 * noise / math.sqrt(parameter[0].numel()))


# ---------------------------------------------------------------------------- what inputs look like
def images(*size: int) -> Callable[[int, torch.Generator], list]:
    return lambda batch, generator: [torch.randn(size, generator=generator) for _ in range(batch)]


def texts(batch: int, generator: torch.Generator) -> list[Tensor]:
    """Token ids from 10 up; smaller ids are left for padding and other special tokens."""
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(batch)]
    return [torch.randint(10, VOCABULARY, (n,), generator=generator) for n in lengths]


def vectors(batch: int, generator: torch.Generator) -> list[Tensor]:
    """Sequences of embeddings, (n, 16)."""
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(batch)]
    return [torch.randn(n, 16, generator=generator) for n in lengths]


def same_length(examples: Callable, n: int = 6) -> Callable[[int, torch.Generator], list]:
    def draw(batch: int, generator: torch.Generator) -> list:
        found = [examples(1, generator)[0][:n] for _ in range(batch)]
        assert all(len(example) == n for example in found)
        return found

    return draw


def stacked(examples: list[Tensor]) -> Sample:
    return Sample(torch.stack(examples))


def stacked_as(name: str) -> Callable[[list[Tensor]], Sample]:
    return lambda examples: Sample({name: torch.stack(examples)})


def as_tuple(examples: list[Tensor]) -> Sample:
    return Sample((torch.stack(examples),))


def padded(examples: list[Tensor], pad: float = 0, left: bool = False) -> tuple[Tensor, Tensor]:
    """-> the batch, (B, n, ...), and which of its tokens are real, (B, n) bool."""
    n = max(len(example) for example in examples)
    batch = torch.full((len(examples), n, *examples[0].shape[1:]), pad, dtype=examples[0].dtype)
    real = torch.zeros(len(examples), n, dtype=torch.bool)
    for row, mask, example in zip(batch, real, examples, strict=True):
        place = slice(n - len(example), n) if left else slice(0, len(example))
        row[place], mask[place] = example, True
    return batch, real


def tokenized(
    examples: list[Tensor],
    pad: int = 0,
    left: bool = False,
    name: str = "input_ids",
    positions: bool = False,
    types: bool = False,
) -> Sample:
    """As a tokenizer's output."""
    batch, real = padded(examples, pad, left)
    inputs = {name: batch, "attention_mask": real.long()}
    if types:
        inputs["token_type_ids"] = (torch.arange(batch.shape[1]) > 2).long().expand(real.shape)
        inputs["token_type_ids"] = inputs["token_type_ids"].clone()
    if positions:
        inputs["position_ids"] = (real.long().cumsum(-1) - 1).clamp(min=0)
    return Sample(inputs, real=real)


def with_mask(examples: list[Tensor]) -> Sample:
    """Ids or embeddings, and where they are real as an additional argument."""
    batch, real = padded(examples)
    return Sample(batch, (real,), real)


# ---------------------------------------------------------------------------- what is read out
def weights_of(rows: Tensor, sample: Sample) -> Tensor:
    """(n,) row weights -> (B, n), normalised."""
    batch = next(t for t in _tensors(sample.inputs)).shape[0]
    return (rows / rows.sum()).expand(batch, -1).clone()


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(lambda t: found.append(t) or t, value)  # type: ignore[func-returns-value]
    return found


def mean_of(n: int, first: int = 0) -> Callable[[nn.Module, Sample], Tensor]:
    """Equal weights from token `first` on."""

    def weights(model: nn.Module, sample: Sample) -> Tensor:
        return weights_of((torch.arange(n) >= first).float(), sample)

    return weights


def mean_of_real(model: nn.Module, sample: Sample) -> Tensor:
    assert sample.real is not None
    return sample.real / sample.real.sum(1, keepdim=True)


def last_real(sample: Sample) -> Tensor:
    assert sample.real is not None
    n = sample.real.shape[1]
    return (sample.real * torch.arange(1, n + 1)).argmax(1)


def last_row(model: nn.Module, sample: Sample) -> Tensor:
    return F.one_hot(last_real(sample), sample.real.shape[1]).float()  # type: ignore[union-attr]


def next_token(sample: Sample) -> list[tuple[int, int]]:
    """Targets of a language model: one token after the last real one, a different one for each."""
    return [(int(place), 20 + i % 2) for i, place in enumerate(last_real(sample))]


def two_heads(model: nn.Module, sample: Sample) -> Tensor:
    """Distilled DeiT: half the class token's logit and half the distillation token's."""
    rows = torch.zeros(18)
    rows[0] = model.head.weight[1].detach().norm()  # type: ignore[union-attr, index]
    rows[1] = model.head_dist.weight[1].detach().norm()  # type: ignore[union-attr, index]
    return weights_of(rows, sample)


def class_and_mean(model: nn.Module, sample: Sample) -> Tensor:
    """DINOv2's head reads [CLS] and the mean of the 16 patches, 2 registers between them.

    In transformers 4.48 the mean is over the registers too.
    """
    of_class, of_mean = model.classifier.weight[1].detach().chunk(2)  # type: ignore[union-attr, index]
    skips = "num_register_tokens" in inspect.getsource(type(model).forward)
    first = 3 if skips else 1
    rows = torch.zeros(19)
    rows[0], rows[first:] = of_class.norm(), of_mean.norm() / (19 - first)
    return weights_of(rows, sample)


def per_channel(model: nn.Module, sample: Sample) -> Tensor:
    """PatchTST's head reads the mean over patches of each of 2 channels, each with its weights."""
    of_channels = model.head.linear.weight[1].detach().view(2, -1).norm(dim=1)  # type: ignore
    return weights_of(of_channels.repeat_interleave(4), sample)


# ---------------------------------------------------------------------------- where tokens lie
def patches(height: int, width: int, prefix: int) -> Callable[[Tensor, torch.Size], Tensor]:
    """Tokens behind `prefix` special ones, laid on patches of height x width pixels."""

    def lay(tokens: Tensor, shape: torch.Size) -> Tensor:
        grid = tokens[:, prefix:].view(-1, shape[-2] // height, shape[-1] // width)
        return grid.repeat_interleave(height, 1).repeat_interleave(width, 2)

    return lay


def tubelets(tokens: Tensor, shape: torch.Size) -> Tensor:
    """VideoMAE: 2 x 4 x 4 tubelets of (B, 4, 3, 8, 8), the channel axis summed away."""
    grid = tokens.view(-1, 2, 2, 2)
    return grid.repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)


def spectrogram(tokens: Tensor, shape: torch.Size) -> Tensor:
    """AST: 4 x 4 patches of a (time 24, frequency 8) input, tokens frequency first."""
    grid = tokens[:, 2:].view(-1, 2, 6).mT
    return grid.repeat_interleave(4, 1).repeat_interleave(4, 2)


def series(tokens: Tensor, shape: torch.Size) -> Tensor:
    """PatchTST: 4 patches of 4 steps of each of 2 channels, in the order of the input."""
    return tokens.view(-1, 4, 2).repeat_interleave(4, 1)


def as_tokens(tokens: Tensor, shape: torch.Size) -> Tensor:
    return tokens


# ---------------------------------------------------------------------------- plain attention
def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])


def hidden(real: Tensor) -> Tensor:
    """(B, n) bool -> (B, 1, 1, n) bool, True where a key may not be seen."""
    return ~real[:, None, None, :]


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def merged(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)


def by_matmul(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    attention = F.softmax(scores_of(q, k), dim=-1)
    if self.record is not None:
        attention.retain_grad()
        self.record.append(attention)
    return torch.matmul(attention, v)


def by_operator(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    q = q * q.shape[-1] ** -0.5
    return self.dropout((q @ k.mT).softmax(-1)) @ v


def by_softmax_module(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return torch.matmul(input=self.softmax(scores_of(q, k)), other=v)


def by_bmm(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    scores = torch.bmm(merged(q), merged(k).transpose(1, 2)) / math.sqrt(q.shape[-1])
    attention = F.dropout(torch.softmax(scores, -1), 0.1, self.training)
    return torch.bmm(attention, merged(v)).view(q.shape)


def by_baddbmm(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    q, k = merged(q), merged(k)
    zero = q.new_zeros(1, 1, 1)
    alpha = q.shape[-1] ** -0.5
    attention = torch.baddbmm(zero, q, k.transpose(1, 2), beta=1, alpha=alpha).softmax(-1)
    return torch.baddbmm(zero, attention, merged(v)).view(v.shape)


def by_einsum(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def by_einsum_heads_inside(
    self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, n, H, d)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def by_keys_first(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    scores = (k @ q.mT) / math.sqrt(q.shape[-1])  # (B, H, k, q)
    return (v.mT @ scores.softmax(dim=-2)).mT


def by_casts(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    attention = F.softmax(scores_of(q, k), dim=-1, dtype=torch.float64).to(v.dtype)
    return attention @ v.contiguous()


def by_sdpa(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)


def masked_fill(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(hidden(real), -math.inf).softmax(-1) @ v


def masked_add(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    mask = hidden(real).to(q.dtype) * torch.finfo(q.dtype).min
    return torch.softmax(scores_of(q, k) + mask, dim=-1) @ v


def masked_where(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    scores = torch.where(hidden(real), torch.tensor(-1e9, dtype=q.dtype), scores_of(q, k))
    return self.dropout(self.softmax(scores)) @ v


def masked_sdpa_bool(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden(real))


def masked_sdpa_float(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[0], 1, q.shape[2], q.shape[2], dtype=q.dtype)
    mask = mask.masked_fill(hidden(real), -math.inf)
    return F.scaled_dot_product_attention(q, k, v, mask)


def biased(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return (scores_of(q, k) + self.bias[:, : q.shape[2], : k.shape[2]]).softmax(-1) @ v


def biased_sdpa(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    bias = self.bias[None, :, : q.shape[2], : k.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def causal_inline(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(~causal(q.shape[2]), torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def causal_sdpa(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def causal_sdpa_mask(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=causal(q.shape[2]))


def scaled_inline(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return (0.9 * (q @ k.mT)).softmax(-1) @ v


def scaled_sdpa(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.9)


def grouped_inline(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return scores_of(q, k).softmax(-1) @ v


def grouped_sdpa(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def talking_heads(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    scores = self.before(scores_of(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    attention = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return attention @ v


def sinks(self: Attention, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    sink = self.sink.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    scores = torch.cat([scores_of(q, k), sink], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v


class Attention(nn.Module):
    """Attention with its inner part, q, k, v -> output, written in one of many ways."""

    def __init__(self, dim: int, heads: int, form: Callable, kv_heads: int) -> None:
        super().__init__()
        self.form, self.heads, self.kv_heads = form, heads, kv_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim * kv_heads // heads)
        self.value = nn.Linear(dim, dim * kv_heads // heads)
        self.out = nn.Linear(dim, dim)
        self.dropout, self.softmax = nn.Dropout(0.1), nn.Softmax(-1)
        self.record: list[Tensor] | None = None
        if form in (biased, biased_sdpa):
            self.bias = nn.Parameter(torch.zeros(heads, 8, 8))
        if form is talking_heads:
            self.before, self.after = nn.Linear(heads, heads), nn.Linear(heads, heads)
        if form is sinks:
            self.sink = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:  # (B, n, D), (B, n)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            layer(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        return self.out(self.form(self, q, k, v, real).transpose(1, 2).flatten(2))


class OneHead(nn.Module):
    """Attention over (B, n, D) without a head axis."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(scores_of(q, k).softmax(-1) @ v)


class Multihead(nn.Module):
    """`nn.MultiheadAttention` in each of its modes."""

    def __init__(
        self, dim: int, heads: int, batch_first: bool, need_weights: bool, **options: Any
    ) -> None:
        super().__init__()
        self.batch_first, self.need_weights = batch_first, need_weights
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=batch_first, **options)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x, _ = self.attention(x, x, x, key_padding_mask=~real, need_weights=self.need_weights)
        return x if self.batch_first else x.transpose(0, 1)


class Block(nn.Module):
    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), real)
        return x + self.feed_forward(self.norm2(x))


class Classifier(nn.Module):
    """A pre-norm transformer over embeddings (B, n, 16) that reads its first or all real tokens."""

    def __init__(
        self, attention: Callable[[], nn.Module], depth: int = 2, pool: str = "first"
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, attention()) for _ in range(depth))
        self.norm, self.head, self.pool = nn.LayerNorm(16), nn.Linear(16, 5), pool

    def forward(self, vectors: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            real = torch.ones(vectors.shape[:2], dtype=torch.bool)
        x = vectors
        for block in self.blocks:
            x = block(x, real)
        return self.head(pooled(self.norm(x), real, self.pool))


def pooled(x: Tensor, real: Tensor, pool: str) -> Tensor:
    if pool == "first":
        return x[:, 0]
    return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)


class Encoder(nn.Module):
    """The classifier that a torch user writes: embeddings, `nn.TransformerEncoder`, a head."""

    def __init__(self, pool: str, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.pool, self.batch_first = pool, batch_first
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.position = nn.Parameter(torch.zeros(1, 8, 16))
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, batch_first=batch_first, norm_first=norm_first, dropout=0.1
        )
        nested = batch_first and not norm_first
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[:, : tokens.shape[1]]
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=~real)
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(pooled(x, real, self.pool))


def inline(form: Callable, pool: str = "first", kv_heads: int = 4) -> Classifier:
    return Classifier(lambda: Attention(16, 4, form, kv_heads), pool=pool)


# ---------------------------------------------------------------------------- timm
def timm_vit(fused: bool = True, distilled: bool = False, **options: Any) -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    settings = {
        "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2,
        "mlp_ratio": 2, "num_classes": 5,
    }  # fmt: skip
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**settings | options)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def timm_eva(**options: Any) -> nn.Module:
    from timm.models.eva import Eva

    settings = {
        "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2,
        "mlp_ratio": 2, "num_classes": 5, "use_rot_pos_emb": True, "swiglu_mlp": True,
        "global_pool": "token",
    }  # fmt: skip
    return Eva(**settings | options)


# ---------------------------------------------------------------------------- transformers
def hf(kind: str, head: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    """A transformers model with the configuration `<kind>Config`."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**options)
    made = getattr(transformers, head)
    # Some families have no fused form in older versions (PatchTST in 4.48).
    config._attn_implementation = attention if made._supports_sdpa else "eager"
    return made(config)


BERT_SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 5,
}  # fmt: skip
VIT_SIZE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 16, "patch_size": 4, "num_labels": 5,
}  # fmt: skip
GPT_SIZE = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16,
    "num_labels": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
END_OF_TEXT = 5  # CLIP's; not 2, for which transformers keeps an older rule

bert = partial(hf, "Bert", "BertForSequenceClassification", **BERT_SIZE)
vit = partial(hf, "ViT", "ViTForImageClassification", **VIT_SIZE)
gpt2 = partial(hf, "GPT2", "GPT2LMHeadModel", **GPT_SIZE)
gpt2_classifier = partial(hf, "GPT2", "GPT2ForSequenceClassification", **GPT_SIZE)
llama = partial(hf, "Llama", "LlamaForCausalLM", **LLAMA_SIZE)
patchtst = partial(
    hf, "PatchTST", "PatchTSTForClassification", num_input_channels=2, context_length=16,
    patch_length=4, patch_stride=4, d_model=16, num_hidden_layers=2, num_attention_heads=2,
    ffn_dim=32, num_targets=3,
)  # fmt: skip
ast = partial(
    hf, "AST", "ASTForAudioClassification", hidden_size=16, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=32, patch_size=4, max_length=24, num_mel_bins=8,
    num_labels=5,
)  # fmt: skip
wav2vec2 = partial(
    hf, "Wav2Vec2", "Wav2Vec2ForSequenceClassification", hidden_size=16, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_kernel=(10, 3),
    conv_stride=(5, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    classifier_proj_size=8, num_labels=5, conv_bias=True, vocab_size=VOCABULARY,
)  # fmt: skip


def clip_text(attention: str = "sdpa") -> nn.Module:
    sizes = {k: v for k, v in BERT_SIZE.items() if k != "num_labels"}
    return hf(
        "CLIPText", "CLIPTextModelWithProjection", attention, **sizes, projection_dim=12,
        pad_token_id=0, bos_token_id=4, eos_token_id=END_OF_TEXT,
    )  # fmt: skip


def clip_vision(attention: str = "sdpa") -> nn.Module:
    sizes = {k: v for k, v in VIT_SIZE.items() if k != "num_labels"}
    return hf("CLIPVision", "CLIPVisionModelWithProjection", attention, **sizes, projection_dim=12)


def end_of_text(examples: list[Tensor]) -> Sample:
    """Each text ends with CLIP's end-of-text token, which is not the largest id."""
    return tokenized([torch.cat([ids[:-1], torch.tensor([END_OF_TEXT])]) for ids in examples])


def vilt() -> nn.Module:
    sizes = {k: v for k, v in BERT_SIZE.items() if k != "num_labels"}
    return hf(
        "Vilt", "ViltForQuestionAnswering", "eager", **sizes, image_size=16, patch_size=4,
        num_labels=5, max_image_length=-1,
    )  # fmt: skip


def texts_and_images(batch: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    return list(zip(texts(batch, generator), images(3, 16, 16)(batch, generator), strict=True))


def text_and_image(examples: list[tuple[Tensor, Tensor]]) -> Sample:
    """As ViltProcessor gives it: tokens are the text, [CLS] of the image, and its 16 patches."""
    ids, real = padded([ids for ids, _ in examples])
    pixels = torch.stack([image for _, image in examples])
    inputs = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": pixels,
        "pixel_mask": torch.ones(len(ids), 16, 16, dtype=torch.long),
    }
    return Sample(inputs, real=torch.cat([real, real.new_ones(len(ids), 17)], 1))


def waves(batch: int, generator: torch.Generator) -> list[Tensor]:
    """10 samples and then 10 more for each further frame: 19, 14 and 16 frames."""
    frames = [(19, 14, 16)[i % 3] for i in range(batch)]
    return [torch.randn(10 * n + 10, generator=generator) for n in frames]


def waves_with_mask(examples: list[Tensor]) -> Sample:
    batch, heard = padded(examples)
    frames = (heard.sum(1) - 10) // 10
    real = torch.arange(int(frames.max())) < frames[:, None]
    return Sample({"input_values": batch, "attention_mask": heard.long()}, real=real)


def mean_hidden_state(model: nn.Module) -> Callable:
    """What a sentence encoder computes: the mean of the real tokens' last states."""

    def embed(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pooled(states, attention_mask, "mean")

    return embed


def from_embeddings(model: nn.Module) -> Callable:
    def classify(inputs_embeds: Tensor, real: Tensor) -> Tensor:
        return model(inputs_embeds=inputs_embeds, attention_mask=real.long()).logits

    return classify


# ---------------------------------------------------------------------------- the table
def image_case(name: str, build: Callable, calls: int, tokens: int, **options: Any) -> Case:
    settings: dict[str, Any] = {
        "examples": images(3, 16, 16), "collate": stacked, "stream": "x", "channel": 1,
    }  # fmt: skip
    return Case(name, build, calls=calls, tokens=tokens, **settings | options)


def text_case(name: str, build: Callable, calls: int = 2, **options: Any) -> Case:
    settings: dict[str, Any] = {
        "examples": texts, "collate": tokenized, "stream": "input_ids", "tokens": max(LENGTHS),
        "content": "input_ids", "grid": as_tokens,
    }  # fmt: skip
    return Case(name, build, calls=calls, **settings | options)


def plain_case(name: str, build: Callable, **options: Any) -> Case:
    """Embeddings of one length, no mask."""
    settings: dict[str, Any] = {
        "examples": same_length(vectors), "collate": stacked, "stream": "vectors", "tokens": 6,
        "grid": as_tokens, "channel": -1,
    }  # fmt: skip
    return Case(name, build, calls=2, **settings | options)


def masked_case(name: str, build: Callable, **options: Any) -> Case:
    """Embeddings of several lengths with a mask."""
    settings: dict[str, Any] = {"examples": vectors, "collate": with_mask, "tokens": max(LENGTHS)}
    return plain_case(name, build, **settings | options)


CASES = [
    # timm
    image_case("vit_cls", timm_vit, 3, 17, grid=patches(4, 4, 1), twin="vit_cls",
               attention=("blocks.0.attn", "blocks.2.attn")),
    image_case("vit_cls_unfused", partial(timm_vit, fused=False), 3, 17, grid=patches(4, 4, 1),
               twin="vit_cls", collate=as_tuple),
    image_case("deit_distilled", partial(timm_vit, distilled=True), 3, 18, grid=patches(4, 4, 2),
               readout=two_heads),
    image_case("vit_registers", partial(timm_vit, reg_tokens=4, no_embed_class=True), 3, 21,
               grid=patches(4, 4, 5)),
    image_case("vit_mean", partial(timm_vit, class_token=False, global_pool="avg"), 3, 16,
               grid=patches(4, 4, 0), readout=mean_of(16)),
    image_case("vit_mean_of_patches", partial(timm_vit, global_pool="avg"), 3, 17,
               grid=patches(4, 4, 1), readout=mean_of(17, first=1)),
    image_case("vit_oblong", partial(timm_vit, img_size=(24, 40), patch_size=(8, 4)), 3, 31,
               examples=images(3, 24, 40), grid=patches(8, 4, 1)),
    image_case("vit_other_size", partial(timm_vit, dynamic_img_size=True), 3, 25,
               examples=images(3, 16, 24), grid=patches(4, 4, 1)),
    image_case("vit_one_channel", partial(timm_vit, in_chans=1, class_token=False,
                                          global_pool="avg", patch_size=8), 3, 4,
               examples=images(1, 16, 16), grid=patches(8, 8, 0), readout=mean_of(4)),
    image_case("eva", timm_eva, 2, 17, grid=patches(4, 4, 1)),
    image_case("eva_mean", partial(timm_eva, class_token=False, global_pool="avg",
                                   use_abs_pos_emb=False, qkv_fused=False), 2, 16,
               grid=patches(4, 4, 0), readout=mean_of(16)),
    # transformers, images
    image_case("hf_vit", vit, 2, 17, grid=patches(4, 4, 1), stream="pixel_values", twin="hf_vit"),
    image_case("hf_vit_eager", partial(vit, "eager"), 2, 17, grid=patches(4, 4, 1),
               stream="pixel_values", collate=stacked_as("pixel_values"),
               content="pixel_values", twin="hf_vit"),
    image_case("dinov2_registers",
               partial(hf, "Dinov2WithRegisters", "Dinov2WithRegistersForImageClassification",
                       **VIT_SIZE, num_register_tokens=2, mlp_ratio=2), 2, 19,
               grid=patches(4, 4, 3), stream="pixel_values", readout=class_and_mean),
    image_case("clip_vision", clip_vision, 2, 17, grid=patches(4, 4, 1), stream="pixel_values",
               collate=stacked_as("pixel_values"), content="pixel_values", twin="clip_vision"),
    image_case("clip_vision_eager", partial(clip_vision, "eager"), 2, 17, grid=patches(4, 4, 1),
               stream="pixel_values", twin="clip_vision"),
    # transformers, text
    text_case("bert", bert, twin="bert", attention=("bert.encoder.layer.0.attention.self",)),
    text_case("bert_eager", partial(bert, "eager"), twin="bert"),
    text_case("bert_types_and_positions", bert,
              collate=partial(tokenized, types=True, positions=True)),
    text_case("bert_embeddings", bert, examples=vectors, forward=from_embeddings,
              collate=with_mask, stream="inputs_embeds", channel=-1),
    text_case("bert_embeddings_mapping", bert, examples=vectors, stream="inputs_embeds",
              collate=partial(tokenized, name="inputs_embeds"), content="inputs_embeds",
              channel=-1),
    text_case("bert_mean_of_states", partial(hf, "Bert", "BertModel", **BERT_SIZE),
              forward=mean_hidden_state, readout=mean_of_real),
    text_case("roberta", partial(hf, "Roberta", "RobertaForSequenceClassification", **BERT_SIZE,
                                 pad_token_id=1), collate=partial(tokenized, pad=1)),
    text_case("distilbert", partial(hf, "DistilBert", "DistilBertForSequenceClassification",
                                    vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2,
                                    hidden_dim=32, max_position_embeddings=16, num_labels=5)),
    text_case("albert", partial(hf, "Albert", "AlbertForSequenceClassification",
                                **BERT_SIZE | {"num_hidden_layers": 3}, embedding_size=8), 3),
    text_case("gpt2_classifier", gpt2_classifier, readout=last_row),
    text_case("gpt2_right", gpt2, target=next_token, readout=last_row, twin="gpt2"),
    text_case("gpt2_right_eager", partial(gpt2, "eager"), target=next_token, readout=last_row,
              twin="gpt2"),
    text_case("gpt2_left", gpt2, target=next_token, readout=last_row,
              collate=partial(tokenized, left=True, positions=True)),
    text_case("llama_right", llama, target=next_token, readout=last_row, twin="llama"),
    text_case("llama_right_eager", partial(llama, "eager"), target=next_token, readout=last_row,
              twin="llama"),
    text_case("llama_left", llama, target=next_token, readout=last_row,
              collate=partial(tokenized, left=True)),
    text_case("clip_text", clip_text, collate=end_of_text, readout=last_row, twin="clip_text"),
    text_case("clip_text_eager", partial(clip_text, "eager"), collate=end_of_text,
              readout=last_row, twin="clip_text"),
    # transformers, other inputs
    Case("vilt", vilt, texts_and_images, text_and_image, calls=2,
         stream="input_ids+pixel_values", tokens=max(LENGTHS) + 17, content="input_ids",
         random=True),
    Case("videomae", partial(hf, "VideoMAE", "VideoMAEForVideoClassification",
                             **VIT_SIZE | {"image_size": 8}, num_frames=4, tubelet_size=2),
         images(4, 3, 8, 8), stacked, calls=2, stream="pixel_values", tokens=8,
         readout=mean_of(8), grid=tubelets, channel=2),
    Case("ast", partial(ast, frequency_stride=4, time_stride=4), images(24, 8), stacked, calls=2,
         stream="input_values", tokens=14, grid=spectrogram,
         readout=lambda model, sample: weights_of((torch.arange(14) < 2).float(), sample)),
    Case("ast_overlapping", partial(ast, frequency_stride=2, time_stride=3), images(24, 8),
         stacked_as("input_values"), calls=2, stream="input_values", tokens=23,
         content="input_values",
         readout=lambda model, sample: weights_of((torch.arange(23) < 2).float(), sample)),
    Case("wav2vec2", partial(wav2vec2, feat_extract_norm="layer"), waves, waves_with_mask, calls=2,
         stream="input_values", tokens=19, readout=mean_of_real, content="input_values"),
    Case("wav2vec2_group_norm", wav2vec2, images(200), stacked, calls=2, stream="input_values",
         tokens=19, readout=mean_of(19)),
    Case("patchtst", partial(patchtst, scaling=None), images(16, 2), stacked, calls=2,
         stream="past_values", tokens=8, readout=per_channel, grid=series),
    Case("patchtst_scaled", patchtst, images(16, 2), stacked, calls=2, stream="past_values",
         tokens=8, readout=per_channel),
    # torch
    *(text_case(f"encoder_{pool}{'' if batch_first else '_length_first'}"
                f"{'_norm_first' if norm_first else ''}",
                partial(Encoder, pool, batch_first, norm_first), collate=with_mask,
                stream="tokens", readout=0 if pool == "first" else mean_of_real,
                twin=f"encoder_{pool}_{norm_first}")
      for pool in ("first", "mean") for batch_first in (True, False)
      for norm_first in (True, False)),
    *(masked_case(f"mha{'' if batch_first else '_length_first'}"
                  f"{'_weights' if need_weights else ''}",
                  partial(Classifier, partial(Multihead, 16, 4, batch_first, need_weights)),
                  twin="mha")
      for batch_first in (True, False) for need_weights in (True, False)),
    masked_case("mha_extra_keys", partial(Classifier, partial(
        Multihead, 16, 4, True, False, add_bias_kv=True, add_zero_attn=True))),
    # inline softmax and the fused kernel, the same computation in many ways
    *(plain_case(form.__name__, partial(inline, form), twin="inline")
      for form in (by_matmul, by_operator, by_softmax_module, by_bmm, by_baddbmm, by_einsum,
                   by_einsum_heads_inside, by_keys_first, by_casts, by_sdpa)),
    *(masked_case(form.__name__, partial(inline, form, pool="mean"), readout=mean_of_real,
                  twin="masked")
      for form in (masked_fill, masked_add, masked_where, masked_sdpa_bool, masked_sdpa_float)),
    *(plain_case(form.__name__, partial(inline, form, pool="mean"), readout=mean_of(6),
                 twin="causal")
      for form in (causal_inline, causal_sdpa, causal_sdpa_mask)),
    *(plain_case(form.__name__, partial(inline, form), twin="bias")
      for form in (biased, biased_sdpa)),
    *(plain_case(form.__name__, partial(inline, form), twin="scale")
      for form in (scaled_inline, scaled_sdpa)),
    *(plain_case(form.__name__, partial(inline, form, kv_heads=2), twin="grouped")
      for form in (grouped_inline, grouped_sdpa)),
    plain_case("talking_heads", partial(inline, talking_heads)),
    plain_case("sinks", partial(inline, sinks)),
    plain_case("one_head", partial(Classifier, partial(OneHead, 16, 1))),
]  # fmt: skip
ZOO = {case.name: case for case in CASES}
assert len(ZOO) == len(CASES)

TWINS: dict[str, list[str]] = {}
for _case in CASES:
    if _case.twin is not None:
        TWINS.setdefault(_case.twin, []).append(_case.name)


def output_tensor(output: Any) -> Tensor:
    """`.logits` if there is one, else the first tensor."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return output.logits
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))
