"""Ten-line models, each a trap for the wiring, with answers worked out by hand.

The answer is plain matrix algebra, written out in each test, on the maps and gradients that the
model itself stored (one example at a time). ``bar`` stands for Eq. 5's map. What needs the
two-stream rule (Eq. 8-11) has ``two_stream`` in its name: ``pytest -k two_stream`` runs it alone.
"""

import re

import pytest
import torch
from torch import nn

from captum_attn import AttentionRollout, GenericAttention, RawAttention
from captum_attn.errors import AttnError, ReadoutError, TargetError
from tests import plain
from tests.plain import close, eye

DIM = 6


class Attend(nn.Module):
    """Two-headed attention with its own projections: asked by q, answered by k and v."""

    def __init__(self, maps, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.maps, self.heads = maps, heads

    def forward(self, q, k, v=None, mask=None):
        v = k if v is None else v
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.q, q), (self.k, k), (self.v, v))
        )  # (B, H, n, d)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        z = self.maps.add(scores.softmax(-1)) @ v
        return self.out(z.transpose(1, 2).flatten(-2))


class Trap(nn.Module):
    """Base: named attention modules, a linear head onto three classes, no norms."""

    def __init__(self, *names, classes=3):
        super().__init__()
        self.maps = plain.Maps()
        for name in names:
            self.add_module(name, Attend(self.maps))
        self.head = nn.Linear(DIM, classes)


def ready(cls, *args, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(*args).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2)  # maps far from uniform
    return model


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bars(model, target, *inputs, **named):
    """Eq. 5's maps of one example, in the order of the calls."""
    A, G = plain.maps_and_gradients(model, lambda out: out[0, target], *inputs, **named)
    return [plain.gae_map(a, g) for a, g in zip(A, G, strict=True)]


def one(inputs, b):
    return tuple(x[b : b + 1] for x in inputs)


def place(line, name):
    """Where a name stands in a line as a word of its own, or None."""
    found = re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", line)
    return found and found.start()


def lines_of(table, model, module):
    """The lines of a printed table that name this attention module first."""
    names = [name for name, part in model.named_modules() if isinstance(part, Attend)]
    about = []
    for line in str(table).splitlines():
        places = {name: place(line, name) for name in names if place(line, name) is not None}
        if places and min(places, key=places.get) == module:
            about.append(line)
    return about


def asks(line, asking, answering):
    """Both streams are on the line, the asking one first."""
    first, second = place(line, asking), place(line, answering)
    return first is not None and second is not None and first < second


# ------------------------------------------------------------ versions, one stream


class Parallel(Trap):
    """x + attn1(x) + attn2(x): two maximal calls at once."""

    def __init__(self, tail):
        super().__init__("stem", "left_branch", "right_branch", *["tail"] * tail)

    def forward(self, tokens):
        x = tokens + self.stem(tokens, tokens)
        x = x + self.left_branch(x, x) + self.right_branch(x, x)
        if hasattr(self, "tail"):
            x = x + self.tail(x, x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("tail", [True, False], ids=["read by a call", "read by the head"])
def test_parallel_branches(tail):
    model, x = ready(Parallel, tail), random(2, 5, DIM)
    R = GenericAttention(model).relevance_maps(x, 1)["tokens", "tokens"]
    tokens = GenericAttention(model).attribute_tokens(x, 1)["tokens"]
    for b in range(2):
        first, left, right, *rest = bars(model, 1, x[b : b + 1])
        base = eye(5) + first
        expected = base + left @ base + right @ base  # base + sum of (R_i - base)
        for bar in rest:
            expected = expected + bar @ expected
        close(tokens[b], expected[0])
        close(R[b], expected)

    for b in range(2):
        A, _ = plain.maps_and_gradients(model, lambda out: out[0, 1], x[b : b + 1])
        hat = [plain.row_normalised(plain.fuse_heads(a) + eye(5)) for a in A]
        expected = hat[1] @ hat[0] + hat[2] @ hat[0] - hat[0]
        for step in hat[3:]:
            expected = step @ expected
        rolled = AttentionRollout(model).attribute_tokens(x, 1)["tokens"]
        close(rolled[b], expected[0])


def test_describe_parallel_branches():
    model, x = ready(Parallel, True), random(2, 5, DIM)
    table = GenericAttention(model).describe(x, 1)
    for module in ("stem", "left_branch", "right_branch", "tail"):
        (line,) = lines_of(table, model, module)
        assert place(line, "tokens") is not None
        assert place(line, "queries") is None


class SharedKeys(Trap):
    """Keys and values of the first layer serve the later ones."""

    def __init__(self):
        super().__init__("a", "b", "c")

    def forward(self, tokens):
        x = tokens + self.a(tokens, tokens)
        x = x + self.b(x, tokens)
        x = x + self.c(x, tokens)
        return self.head(x[:, 2])


def test_keys_and_values_shared_between_layers():
    """Later layers ask with the newest version and are answered by the oldest, R = I."""
    model, x = ready(SharedKeys), random(2, 4, DIM)
    maps = GenericAttention(model).relevance_maps(x, 0)
    assert set(maps) == {("tokens", "tokens")}
    for b in range(2):
        a, second, third = bars(model, 0, x[b : b + 1])
        close(maps["tokens", "tokens"][b], eye(4) + a + second + third)
        # what a chain of layers would have given is something else
        chain = (eye(4) + third) @ (eye(4) + second) @ (eye(4) + a)
        assert (chain - maps["tokens", "tokens"][b]).abs().max() > 1e-4


class MixedVersions(Trap):
    """Three layers; the last takes keys and values from different versions."""

    def __init__(self, keys, values):
        super().__init__("a", "b", "c")
        self.keys, self.values = keys, values

    def forward(self, tokens):
        versions = [tokens]
        for layer in (self.a, self.b):
            versions.append(versions[-1] + layer(versions[-1], versions[-1]))
        x = versions[-1] + self.c(versions[-1], versions[self.keys], versions[self.values])
        return self.head(x[:, 0])


@pytest.mark.parametrize(("keys", "values"), [(0, 2), (2, 0), (1, 2), (0, 1), (2, 1)])
def test_where_keys_and_values_differ_the_values_decide(keys, values):
    model, x = ready(MixedVersions, keys, values), random(2, 4, DIM)
    R = GenericAttention(model).relevance_maps(x, 2)["tokens", "tokens"]
    for b in range(2):
        a, second, third = bars(model, 2, x[b : b + 1])
        versions = [eye(4), eye(4) + a, (eye(4) + second) @ (eye(4) + a)]
        close(R[b], versions[2] + third @ versions[values])


class Twice(Trap):
    """One attention module, called once per layer (ALBERT)."""

    def __init__(self):
        super().__init__("one_layer")

    def forward(self, tokens):
        x = tokens
        for _ in range(3):
            x = x + self.one_layer(x, x)
        return self.head(x.mean(1))


def test_a_module_called_three_times():
    model, x = ready(Twice), random(2, 4, DIM)
    method = GenericAttention(model)
    R = method.relevance_maps(x, 0)["tokens", "tokens"]
    for b in range(2):
        expected = eye(4)
        for bar in bars(model, 0, x[b : b + 1]):
            expected = expected + bar @ expected
        close(R[b], expected)
    assert len(lines_of(method.describe(x, 0), model, "one_layer")) == 3
    assert len(method.layer_maps(x, 0)) == 3


class LongSkip(Trap):
    """The first version comes back two layers later, added: still one stream and one order."""

    def __init__(self):
        super().__init__("a", "b", "c")

    def forward(self, tokens):
        early = tokens + self.a(tokens, tokens)
        x = early + self.b(early, early)
        x = 0.5 * (x + early)
        x = x + self.c(x, x)
        return self.head(x[:, 0])


def test_a_long_skip_connection_is_no_second_branch():
    model, x = ready(LongSkip), random(1, 4, DIM)
    a, b, c = bars(model, 0, x)
    R = GenericAttention(model).relevance_maps(x, 0)["tokens", "tokens"][0]
    close(R, (eye(4) + c) @ (eye(4) + b) @ (eye(4) + a))


class DeadEnd(Trap):
    """A call that the explained output does not depend on."""

    def __init__(self):
        super().__init__("live", "dead")

    def forward(self, tokens):
        x = tokens + self.live(tokens, tokens)
        y = x + self.dead(x, x)
        return self.head(x[:, 0]), y


def test_a_dead_branch_has_no_relevance_and_is_not_read():
    model, x = ready(DeadEnd), random(1, 4, DIM)
    A, G = plain.maps_and_gradients(model, lambda out: out[0][0, 1], x)
    assert not G[1].any()
    close(
        GenericAttention(model).attribute_tokens(x, 1)["tokens"][0],
        (eye(4) + plain.gae_map(A[0], G[0]))[0],
    )


# ------------------------------------------------------------ streams that join


class Added(Trap):
    """Two inputs of one length, each with its own attention, added, then attention."""

    def __init__(self):
        super().__init__("of_words", "of_tags", "joint")

    def forward(self, words, tags):
        words = words + self.of_words(words, words)
        tags = tags + self.of_tags(tags, tags)
        x = words + tags
        x = x + self.joint(x, x)
        return self.head(x[:, 1])


def test_two_streams_of_one_length_added():
    """The joined version's row is the sum of both streams' rows."""
    model, inputs = ready(Added), (random(2, 4, DIM, seed=1), random(2, 4, DIM, seed=2))
    tokens = GenericAttention(model).attribute_tokens(inputs, 1)
    assert set(tokens) == {"words", "tags"}
    for b in range(2):
        words, tags, joint = bars(model, 1, *one(inputs, b))
        close(tokens["words"][b], ((eye(4) + joint) @ (eye(4) + words))[1])
        close(tokens["tags"][b], ((eye(4) + joint) @ (eye(4) + tags))[1])
    attributions = GenericAttention(model).attribute(inputs, 1)
    assert isinstance(attributions, tuple)
    for attribution, name in zip(attributions, ("words", "tags"), strict=True):
        close(attribution.sum(-1), tokens[name])


class Embedded(Trap):
    """Two inputs that enter the same positions before any attention are one stream."""

    def __init__(self):
        super().__init__("layer")
        self.words, self.kinds = nn.Embedding(9, DIM), nn.Embedding(2, DIM)

    def forward(self, input_ids, token_type_ids):
        x = self.words(input_ids) + self.kinds(token_type_ids)
        x = x + self.layer(x, x)
        return self.head(x[:, 0])


def test_two_inputs_of_one_position_are_one_stream():
    model = ready(Embedded)
    ids, kinds = torch.tensor([[3, 1, 8, 1], [2, 2, 0, 5]]), torch.tensor([[0, 0, 1, 1]] * 2)
    expected = torch.stack(
        [(eye(4) + bars(model, 2, *one((ids, kinds), b))[0])[0] for b in range(2)]
    )
    method = GenericAttention(model)
    assert set(method.attribute_tokens((ids, kinds), 2)) == {"input_ids"}
    first, second = method.attribute((ids, kinds), 2)
    close(first, expected)
    assert second.shape == kinds.shape
    assert not second.any()
    mapped = method.attribute({"token_type_ids": kinds, "input_ids": ids}, 2)
    assert type(mapped) is dict
    assert set(mapped) == {"input_ids"}
    close(mapped["input_ids"], expected)


# ------------------------------------------------------------ resampler


class Resampler(Trap):
    """Learned latents ask, cat(media, latents) answers."""

    def __init__(self, layers):
        super().__init__(*[f"layer{i}" for i in range(layers)])
        self.latents, self.layers = nn.Parameter(torch.randn(1, 3, DIM)), layers

    def forward(self, media):
        x = self.latents.expand(len(media), -1, -1)
        for i in range(self.layers):
            x = x + getattr(self, f"layer{i}")(x, torch.cat([media, x], 1))
        return self.head(x[:, 1])


def test_resampler_of_one_layer():
    """R[queries, queries] = I before the call: both blocks of A_bar are the answer."""
    model, media = ready(Resampler, 1, seed=2), random(2, 5, DIM)
    method = GenericAttention(model)
    tokens = method.attribute_tokens(media, 0)
    assert set(tokens) == {"media", "queries"}
    for b in range(2):
        (bar,) = bars(model, 0, media[b : b + 1])  # (3, 5 + 3)
        assert bar[1, :5].max() > 1e-3
        assert bar[1, 5:].max() > 1e-3
        close(tokens["media"][b], bar[1, :5])
        close(tokens["queries"][b], (eye(3) + bar[:, 5:])[1])
    assert method.attribute(media, 0).shape == media.shape
    (line,) = lines_of(method.describe(media, 0), model, "layer0")
    assert asks(line, "queries", "media")


def test_two_stream_resampler():
    """Columns of media go across (Eq. 10, 11), columns of latents within (Eq. 6, 7)."""
    model, media = ready(Resampler, 2), random(2, 5, DIM)
    R = GenericAttention(model).relevance_maps(media, 0)
    for b in range(2):
        one_, two = bars(model, 0, media[b : b + 1])
        latents, from_media = eye(3) + one_[:, 5:], one_[:, :5]
        expected = (
            from_media + two[:, 5:] @ from_media + plain.residual_normalised(latents).T @ two[:, :5]
        )
        close(R["queries", "media"][b], expected)
        close(R["queries", "queries"][b], (eye(3) + two[:, 5:]) @ latents)
        close(R["media", "media"][b], eye(5))


# ------------------------------------------------------------ towers without gradients


class Tower(Trap):
    """The image goes through a tower; the words ask it."""

    def __init__(self, how):
        super().__init__("words_layer", "cross")
        self.tower, self.how = nn.Module(), how
        self.tower.inner = Attend(self.maps)

    def forward(self, words, image):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            image = image + self.tower.inner(image, image)
        if self.how == "detach":
            image = image.detach()
        words = words + self.words_layer(words, words)
        if self.how != "unread":
            words = words + self.cross(words, image)
        return self.head(words[:, 0])


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_tower_cut_off_from_the_gradient_is_named(how):
    model, inputs = ready(Tower, how), (random(1, 4, DIM), random(1, 3, DIM, seed=1))
    with pytest.raises(AttnError, match=r"tower"):
        GenericAttention(model).attribute(inputs, 0)


class Aside(Tower):
    def forward(self, words, image):
        with torch.no_grad():
            self.tower.inner(image, image)
        words = words + self.words_layer(words, words)
        return self.head(words[:, 0])


def test_a_tower_that_nobody_reads_is_no_error():
    model, inputs = ready(Aside, "aside"), (random(1, 4, DIM), random(1, 3, DIM, seed=1))
    tokens = GenericAttention(model).attribute_tokens(inputs, 0)
    (bar,) = aside_bars(model, *inputs)
    close(tokens["words"][0], (eye(4) + bar)[0])
    assert not tokens.get("image", torch.zeros(1)).any()


def aside_bars(model, words, image):
    """The one map with a gradient (the tower's has none to ask for)."""
    model.maps.recording = True
    output = model(words, image)
    A = model.maps[1]
    (G,) = torch.autograd.grad(output[0, 0], [A])
    model.maps.recording = False
    model.maps.clear()
    return [plain.gae_map(A[0].detach(), G[0])]


def test_two_stream_frozen_tower():
    """Parameters that require no grad cut nothing off."""
    model, inputs = ready(Tower, "frozen"), (random(1, 4, DIM), random(1, 3, DIM, seed=1))
    tower, words_layer, cross = bars(model, 0, *inputs)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    R = GenericAttention(model).relevance_maps(inputs, 0)
    words, image = eye(4) + words_layer, eye(3) + tower
    normalised = plain.residual_normalised
    close(R["words", "image"][0], normalised(words).T @ cross @ normalised(image))
    close(R["words", "words"][0], words)
    close(R["image", "image"][0], image)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------ maps that depend on content


class Sorted(Trap):
    """Every example's tokens are put in the order of their first component, then attended."""

    def __init__(self, how, keep):
        super().__init__("before", "after")
        self.how, self.keep = how, keep

    def forward(self, tokens):
        x = tokens + self.before(tokens, tokens)
        order = tokens[..., 0].argsort(1)[:, : self.keep]  # the same whatever the attention
        if self.how == "gather":
            x = x.gather(1, order[..., None].expand(-1, -1, DIM))
        else:
            x = x[torch.arange(len(x))[:, None], order]
        x = x + self.after(x, x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("keep", [5, 3], ids=["permuted", "pruned"])
@pytest.mark.parametrize("how", ["gather", "index"])
def test_a_gather_that_depends_on_the_content(how, keep):
    model = ready(Sorted, how, keep)
    method = GenericAttention(model)
    for seed in (0, 1):  # the second call meets other orders
        x = random(3, 5, DIM, seed=seed)
        orders = x[..., 0].argsort(1)[:, :keep]
        assert len({tuple(order.tolist()) for order in orders}) > 1
        tokens = method.attribute_tokens(x, 1)
        assert set(tokens) == {"tokens"}
        for b in range(3):
            before, after = bars(model, 1, x[b : b + 1])
            moved = (eye(5) + before)[orders[b]]  # (kept, 5): rows follow, columns stay
            close(tokens["tokens"][b], ((eye(keep) + after) @ moved)[0])
        close(method.attribute(x, 1).sum(-1), tokens["tokens"])


class Shuffled(Trap):
    """The tokens are permuted before the first attention (ViLT)."""

    def __init__(self):
        super().__init__("a", "b")

    def forward(self, tokens):
        order = tokens[..., 0].argsort(1)
        x = tokens.gather(1, order[..., None].expand(-1, -1, DIM))
        x = x + self.a(x, x)
        x = x + self.b(x, x)
        return self.head(x.mean(1))


def test_attribute_tokens_is_in_input_order():
    model, x = ready(Shuffled), random(2, 5, DIM)
    tokens = GenericAttention(model).attribute_tokens(x, 0)["tokens"]
    attributions = GenericAttention(model).attribute(x, 0)
    for b in range(2):
        order = x[b, :, 0].argsort()
        a, c = bars(model, 0, x[b : b + 1])
        expected = torch.zeros(5, dtype=torch.float64)
        expected[order] = ((eye(5) + c) @ (eye(5) + a)).mean(0)
        close(tokens[b], expected)
        close(attributions[b].sum(-1), expected)


class MaskedMean(Trap):
    """Padding is masked as key and left out of the mean."""

    def __init__(self):
        super().__init__("a", "b")
        self.embed = nn.Embedding(9, DIM)

    def forward(self, input_ids, attention_mask):
        x, seen = self.embed(input_ids), attention_mask.bool()
        for layer in (self.a, self.b):
            x = x + layer(x, x, mask=seen[:, None, None, :])
        weights = seen[..., None].to(x.dtype)
        return self.head((x * weights).sum(1) / weights.sum(1))


PADDED = {
    "input_ids": torch.tensor([[4, 7, 1, 0, 0], [0, 0, 8, 3, 0], [5, 2, 6, 1, 7]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]),
}


def test_padding_at_different_places_and_a_masked_mean():
    """Each example is its own tokens alone; padding gets 0 and no weight in the mean."""
    model = ready(MaskedMean)
    result = GenericAttention(model).attribute(PADDED, 1)
    assert set(result) == {"input_ids"}
    for b, seen in enumerate(PADDED["attention_mask"].bool()):
        ids = PADDED["input_ids"][b, seen][None]
        a, c = bars(model, 1, ids, torch.ones_like(ids))
        n = ids.shape[1]
        close(result["input_ids"][b, seen], ((eye(n) + c) @ (eye(n) + a)).mean(0))
        assert not result["input_ids"][b, ~seen].any()


class LastToken(Trap):
    """A causal model that reads each example's last real token."""

    def __init__(self):
        super().__init__("a", "b")
        self.embed = nn.Embedding(9, DIM)

    def forward(self, input_ids, attention_mask):
        x, n = self.embed(input_ids), input_ids.shape[1]
        earlier = torch.ones(n, n, dtype=torch.bool).tril()
        mask = earlier & (attention_mask.bool()[:, None, None, :] | torch.eye(n, dtype=torch.bool))
        for layer in (self.a, self.b):
            x = x + layer(x, x, mask=mask)
        last = (attention_mask * torch.arange(1, n + 1)).argmax(1)
        return self.head(x[torch.arange(len(x)), last])


def test_the_last_token_of_each_example():
    model = ready(LastToken)
    method = GenericAttention(model)
    result = method.attribute(PADDED, 2)["input_ids"]
    rolled = AttentionRollout(model).attribute(PADDED)["input_ids"]
    for b, seen in enumerate(PADDED["attention_mask"].bool()):
        ids = PADDED["input_ids"][b, seen][None]
        A, G = plain.maps_and_gradients(model, lambda out: out[0, 2], ids, torch.ones_like(ids))
        close(result[b, seen], plain.gae(A, G)[-1])
        close(rolled[b, seen], plain.rollout(A)[-1])
        assert not result[b, ~seen].any()
        assert not rolled[b, ~seen].any()


class Llava(Trap):
    """Image tokens are scattered into the places of the placeholder id 0; the last row is read."""

    def __init__(self):
        super().__init__("a", "b")
        self.tower = nn.Module()
        self.tower.patches = nn.Conv2d(3, DIM, 4, 4)
        self.tower.attend = Attend(self.maps)
        self.projector, self.embed = nn.Linear(DIM, DIM), nn.Embedding(9, DIM)

    def forward(self, input_ids, pixel_values):
        image = self.tower.patches(pixel_values).flatten(2).mT
        image = image + self.tower.attend(image, image)
        x, places = self.embed(input_ids), (input_ids == 0)[..., None]
        x = x.masked_scatter(places.expand_as(x), self.projector(image))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        x = x + self.a(x, x, mask=mask)
        x = x + self.b(x, x, mask=mask)
        return self.head(x[:, -1])


def test_image_tokens_at_different_places():
    model = ready(Llava)
    inputs = {
        "input_ids": torch.tensor([[3, 0, 0, 0, 0, 5, 1], [0, 0, 7, 2, 0, 0, 4]]),
        "pixel_values": random(2, 3, 8, 8),
    }
    method = GenericAttention(model)
    tokens = method.attribute_tokens(inputs, 1)
    assert set(tokens) == {"input_ids", "pixel_values"}
    for b in range(2):
        tower, a, c = bars(model, 1, *one(tuple(inputs.values()), b))
        language = (eye(7) + c) @ (eye(7) + a)
        at_image = inputs["input_ids"][b] == 0
        close(tokens["input_ids"][b], torch.where(at_image, 0, language[-1]))
        # the language stream's rows at the placeholders begin as the tower's rows
        close(tokens["pixel_values"][b], language[-1][at_image] @ (eye(4) + tower))

    attributions = method.attribute(inputs, 1, interpolation="nearest")
    assert attributions["input_ids"].shape == inputs["input_ids"].shape
    grid = tokens["pixel_values"].reshape(2, 2, 2)
    on_pixels = grid.repeat_interleave(4, 1).repeat_interleave(4, 2)
    close(attributions["pixel_values"].sum(1), on_pixels)


# ------------------------------------------------------------ readout


class Pooled(Trap):
    """[CLS] and the mean of the patches, side by side, into one linear head (DINOv2)."""

    def __init__(self, norm):
        super().__init__("layer")
        self.cls, self.norm = nn.Parameter(torch.randn(1, 1, DIM)), norm()
        self.head = nn.Linear(2 * DIM, 3)

    def forward(self, tokens):
        x = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], 1)
        x = self.norm(x + self.layer(x, x))
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1))


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.LayerNorm(DIM)], ids=["plain", "normed"])
def test_class_token_and_mean_are_weighted_as_the_head_weighs_them(norm):
    """Weights: the norms of the head's two halves, the second shared by the patches, sum 1."""
    model, x = ready(Pooled, norm), random(2, 4, DIM)
    model.head.weight.data[:, DIM:] *= 3
    tokens = GenericAttention(model).attribute_tokens(x, 2)["tokens"]
    of_cls = model.head.weight[2, :DIM].norm().item()
    of_patch = model.head.weight[2, DIM:].norm().item() / 4
    weights = torch.tensor([of_cls] + [of_patch] * 4, dtype=torch.float64)
    weights = weights / weights.sum()
    for b in range(2):
        (bar,) = bars(model, 2, x[b : b + 1])
        close(tokens[b], weights @ (eye(5) + bar))


class MeanPooled(Trap):
    """A mean over tokens of very different sizes, behind no norm: still equal rows."""

    def __init__(self):
        super().__init__("layer")

    def forward(self, tokens):
        x = tokens + self.layer(tokens, tokens)
        return self.head(torch.tanh(x.mean(1)))


def test_a_mean_pooled_head_reads_all_rows_alike():
    model, x = ready(MeanPooled), random(2, 5, DIM)
    x[:, 0] *= 2
    tokens = GenericAttention(model).attribute_tokens(x, 0)["tokens"]
    for b in range(2):
        (bar,) = bars(model, 0, x[b : b + 1])
        close(tokens[b], (eye(5) + bar).mean(0))


class DeadHead(Trap):
    """A ReLU that never opens: the output is a constant."""

    def __init__(self):
        super().__init__("layer")
        self.hidden = nn.Linear(DIM, DIM)
        nn.init.constant_(self.hidden.bias, -1e6)

    def forward(self, tokens):
        x = tokens + self.layer(tokens, tokens)
        return self.head(self.hidden(x[:, 1]).relu())


@pytest.mark.parametrize("method", [GenericAttention, AttentionRollout, RawAttention])
def test_a_dead_head_asks_for_the_readout(method):
    model, x = ready(DeadHead), random(1, 4, DIM)
    with pytest.raises(ReadoutError, match="readout"):
        method(model).attribute(x, 0)


def test_a_dead_head_with_a_readout_given():
    model, x = ready(DeadHead), random(1, 4, DIM)
    A, _ = plain.maps_and_gradients(model, lambda out: out[0, 0], x)
    raw = RawAttention(model).attribute_tokens(x, 0, readout=1)["tokens"]
    close(raw[0], plain.raw_attention(A[0])[1])


class Saturated(Trap):
    """Logits so far apart that the probability's gradient is 0 also in float64."""

    def __init__(self):
        super().__init__("a", "b")

    def forward(self, tokens):
        x = tokens + self.a(tokens, tokens)
        x = x + self.b(x, x)
        return 1e5 * self.head(x[:, 2])


def probability(output, target):
    return output.softmax(-1)[:, target]


def test_a_saturated_probability_still_finds_the_readout():
    """Row 2 is found through the raw logit; what has no gradient at all is refused."""
    model, x = ready(Saturated), random(1, 4, DIM)
    target = int(model(x).argmax())
    A, G = plain.maps_and_gradients(model, lambda out: probability(out, target).sum(), x)
    assert not any(g.any() for g in G)
    rolled = AttentionRollout(model).attribute_tokens(x, target, objective=probability)
    close(rolled["tokens"][0], plain.rollout(A)[2])
    with pytest.raises(TargetError, match="saturated"):
        GenericAttention(model).attribute_tokens(x, target, objective=probability)


# ------------------------------------------------------------ cross attention


class CoAttention(Trap):
    """One cross-attention module, called in both directions on the states before it (LXMERT)."""

    def __init__(self, layers):
        names = [f"{kind}{i}" for i in range(layers) for kind in ("cross", "words_", "regions_")]
        super().__init__(*names)
        self.layers = layers

    def forward(self, words, regions):
        for i in range(self.layers):
            cross = getattr(self, f"cross{i}")
            words, regions = words + cross(words, regions), regions + cross(regions, words)
            words = words + getattr(self, f"words_{i}")(words, words)
            regions = regions + getattr(self, f"regions_{i}")(regions, regions)
        return self.head(words[:, 0])


def co_attention(found, layers, sizes, **options):
    R, found = plain.identity_blocks(sizes), iter(found)
    for _ in range(layers):
        words = plain.gae_across(R, "words", "regions", next(found), **options)
        regions = plain.gae_across(R, "regions", "words", next(found), **options)
        R = {key: (words if key[0] == "words" else regions)[key] for key in R}
        R = plain.gae_within(R, "words", next(found))
        R = plain.gae_within(R, "regions", next(found))
    return R


@pytest.mark.parametrize("n_regions", [3, 4], ids=["lengths differ", "lengths equal"])
@pytest.mark.parametrize(
    "options", [{}, {"normalize": False}, {"self_in_rule_10": False}], ids=["paper", "raw", "bare"]
)
def test_two_stream_co_attention_reads_the_old_states(n_regions, options):
    model = ready(CoAttention, 3)
    inputs = (random(2, 4, DIM, seed=1), random(2, n_regions, DIM, seed=2))
    R = GenericAttention(model).relevance_maps(inputs, 1, **options)
    assert set(R) == {(s, x) for s in ("words", "regions") for x in ("words", "regions")}
    tokens = GenericAttention(model).attribute_tokens(inputs, 1, **options)
    for b in range(2):
        found = bars(model, 1, *one(inputs, b))
        expected = co_attention(found, 3, {"words": 4, "regions": n_regions}, **options)
        for key in expected:
            close(R[key][b], expected[key])
        for source in ("words", "regions"):
            close(tokens[source][b], expected["words", source][0])


def test_describe_co_attention():
    """One line per call; the shared module asks with the words first, then with the regions."""
    model = ready(CoAttention, 2)
    table = GenericAttention(model).describe((random(1, 4, DIM), random(1, 3, DIM, seed=1)), 1)
    for i in range(2):
        first, second = lines_of(table, model, f"cross{i}")
        assert asks(first, "words", "regions")
        assert asks(second, "regions", "words")
        (line,) = lines_of(table, model, f"words_{i}")
        assert place(line, "words") is not None
        assert place(line, "regions") is None
        (line,) = lines_of(table, model, f"regions_{i}")
        assert place(line, "regions") is not None
        assert place(line, "words") is None


class InTurn(Trap):
    """Not parallel: the regions read the words' *new* state."""

    def __init__(self):
        super().__init__("start_words", "start_regions", "to_words", "to_regions", "last")

    def forward(self, words, regions):
        words = words + self.start_words(words, words)
        regions = regions + self.start_regions(regions, regions)
        words = words + self.to_words(words, regions)
        regions = regions + self.to_regions(regions, words)
        words = words + self.last(words, regions)
        return self.head(words[:, 0])


def test_two_stream_cross_attention_in_turn_reads_the_new_state():
    model, inputs = ready(InTurn), (random(1, 4, DIM, seed=1), random(1, 3, DIM, seed=2))
    R = GenericAttention(model).relevance_maps(inputs, 0)
    start_words, start_regions, to_words, to_regions, last = bars(model, 0, *inputs)
    expected = plain.identity_blocks({"words": 4, "regions": 3})
    expected = plain.gae_within(expected, "words", start_words)
    expected = plain.gae_within(expected, "regions", start_regions)
    expected = plain.gae_across(expected, "words", "regions", to_words)
    expected = plain.gae_across(expected, "regions", "words", to_regions)
    expected = plain.gae_across(expected, "words", "regions", last)
    for key in expected:
        close(R[key][0], expected[key])


class Detector(Trap):
    """Decoder queries that start from zeros, their learned part added to q and k alone (DETR)."""

    def __init__(self, layers):
        names = [f"{kind}{i}" for i in range(layers) for kind in ("encoder", "self", "cross")]
        super().__init__(*names)
        self.places, self.layers = nn.Parameter(torch.randn(3, DIM)), layers

    def forward(self, features):
        x = features
        for i in range(self.layers):
            x = x + getattr(self, f"encoder{i}")(x, x)
        places = self.places.expand(len(x), -1, -1)
        queries = torch.zeros_like(places)
        for i in range(self.layers):
            asking = queries + places
            queries = queries + getattr(self, f"self{i}")(asking, asking, queries)
            queries = queries + getattr(self, f"cross{i}")(queries + places, x)
        return self.head(queries)


def test_two_stream_detector_with_learned_queries():
    model, features = ready(Detector, 2), random(3, 5, DIM)
    targets = [(0, 1), (2, 0), (1, 2)]
    R = GenericAttention(model).relevance_maps(features, targets)
    tokens = GenericAttention(model).attribute_tokens(features, targets)
    assert set(tokens) == {"features", "queries"}
    for b, (query, label) in enumerate(targets):
        A, G = plain.maps_and_gradients(
            model, lambda out, q=query, c=label: out[0, q, c], features[b : b + 1]
        )
        found = [plain.gae_map(a, g) for a, g in zip(A, G, strict=True)]
        sizes = {"features": 5, "queries": 3}
        expected = plain.identity_blocks(sizes, absent=[("features", "queries")])
        for bar in found[:2]:
            expected = plain.gae_within(expected, "features", bar)
        for within, across in (found[2:4], found[4:6]):
            expected = plain.gae_within(expected, "queries", within)
            expected = plain.gae_across(expected, "queries", "features", across)
        for key in expected:
            close(R[key][b], expected[key])
        close(tokens["features"][b], expected["queries", "features"][query])
        close(tokens["queries"][b], expected["queries", "queries"][query])
    assert GenericAttention(model).attribute(features, targets).shape == features.shape


def test_describe_detector():
    model, features = ready(Detector, 2), random(1, 5, DIM)
    table = GenericAttention(model).describe(features, (0, 1))
    for i in range(2):
        (line,) = lines_of(table, model, f"cross{i}")
        assert asks(line, "queries", "features")
        (line,) = lines_of(table, model, f"encoder{i}")
        assert place(line, "features") is not None
        assert place(line, "queries") is None
        (line,) = lines_of(table, model, f"self{i}")
        assert place(line, "queries") is not None
        assert place(line, "features") is None


class Muted(Trap):
    """The words' own layer says nothing for word 2: its row of R - I is exactly 0."""

    def __init__(self):
        super().__init__("words_", "regions_", "cross", "last")

    def forward(self, words, regions):
        heard = torch.tensor([1.0, 1, 0, 1], dtype=words.dtype)[:, None]
        words = words + heard * self.words_(words, words)
        regions = regions + self.regions_(regions, regions)
        words = words + self.cross(words, regions)
        words = words + self.last(words, words)
        return self.head(words[:, 0])


def test_two_stream_a_zero_row_keeps_its_identity():
    """Eq. 8, 9 divide that row by 0; here it keeps the identity, and the others are normalised."""
    model, inputs = ready(Muted), (random(1, 4, DIM), random(1, 3, DIM, seed=1))
    of_words, of_regions, cross, last = bars(model, 0, *inputs)
    assert not of_words[2].any()
    assert of_words[[0, 1, 3]].sum(1).min() > 1e-4
    left = eye(4) + torch.stack([r if not r.any() else r / r.sum() for r in of_words])
    right = eye(3) + of_regions / of_regions.sum(1, keepdim=True)
    R = GenericAttention(model).relevance_maps(inputs, 0)
    close(R["words", "regions"][0], (eye(4) + last) @ (left.T @ cross @ right))
    close(R["words", "words"][0], (eye(4) + last) @ (eye(4) + of_words))


class Prefix(Trap):
    """Learned keys and values that never ask: columns of no stream."""

    def __init__(self):
        super().__init__("a", "b")
        self.prefix = nn.Parameter(torch.randn(1, 2, DIM))

    def forward(self, tokens):
        x, prefix = tokens, self.prefix.expand(len(tokens), -1, -1)
        for layer in (self.a, self.b):
            x = x + layer(x, torch.cat([prefix, x], 1))
        return self.head(x[:, 0])


def test_keys_of_no_stream():
    model, x = ready(Prefix), random(2, 4, DIM)
    tokens = GenericAttention(model).attribute_tokens(x, 0)["tokens"]
    for b in range(2):
        a, c = bars(model, 0, x[b : b + 1])  # (4, 2 + 4)
        close(tokens[b], ((eye(4) + c[:, 2:]) @ (eye(4) + a[:, 2:]))[0])


@pytest.mark.parametrize(
    "build",
    [
        lambda: (ready(Parallel, True), (random(1, 5, DIM),)),
        lambda: (ready(Resampler, 2), (random(1, 5, DIM),)),
        lambda: (ready(CoAttention, 2), (random(1, 4, DIM), random(1, 3, DIM, seed=1))),
        lambda: (ready(Detector, 2), (random(1, 5, DIM),)),
        lambda: (ready(Llava), (torch.tensor([[3, 0, 0, 0, 0, 5, 1]]), random(1, 3, 8, 8))),
    ],
)
def test_the_traps_are_live(build):
    """Guards the answers: maps that differ from uniform, and gradients that are not all zero."""
    model, inputs = build()
    A, G = plain.maps_and_gradients(model, lambda out: out.flatten()[1], *inputs)
    assert max(g.abs().max() for g in G) > 1e-3
    for a in A:
        assert a.std() > 1e-2
    assert not model.maps


class Flipped(Trap):
    """The keys and values are the tokens in reverse order."""

    def __init__(self):
        super().__init__("a", "b")

    def forward(self, tokens):
        x = tokens
        for layer in (self.a, self.b):
            x = x + layer(x, x.flip(1))
        return self.head(x[:, 0])


def test_keys_in_another_order_than_the_queries():
    model, x = ready(Flipped), random(2, 4, DIM)
    tokens = GenericAttention(model).attribute_tokens(x, 0)["tokens"]
    for b in range(2):
        first, second = (bar.flip(1) for bar in bars(model, 0, x[b : b + 1]))
        close(tokens[b], ((eye(4) + second) @ (eye(4) + first))[0])
