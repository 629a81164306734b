"""Models whose peculiarities once gave wrong numbers: each is compared with a plainer run of it."""

import pytest
import timm
import torch
import transformers
from torch import nn

from captum_attn import AttentionRollout, GenericAttention, RawAttention, objectives
from captum_attn.errors import AttnError, ReadoutError
from tests import plain
from tests.conftest import skip_unless_double_runs
from tests.observe.test_traps import Trap, random, ready
from tests.plain import close

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
DECODER = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8}


def ids(batch=2, length=7, seed=0):
    return torch.randint(5, 58, (batch, length), generator=torch.Generator().manual_seed(seed))


def model_of(name, head, **settings):
    config_class = getattr(transformers, f"{name}Config", None)
    model_class = getattr(transformers, f"{name}{head}", None)
    if config_class is None or model_class is None:
        pytest.skip(f"this transformers has no {name}{head}")
    torch.manual_seed(0)
    model = model_class(config_class(**settings)).eval()
    return model if name == "GptOss" else model.double()  # its experts know no double


@pytest.mark.parametrize("form", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("name", ["Llama", "GptOss", "Gemma2"])
def test_unseen_attention_is_switched_for_the_run(name, form):
    """GPT-OSS has sinks and Gemma 2 a soft cap, which SDPA would leave out."""
    extra = {"num_local_experts": 2, "num_experts_per_tok": 1} if name == "GptOss" else {}
    model = model_of(name, "ForCausalLM", **DECODER, **extra)
    model.config._attn_implementation = "eager"
    expected = GenericAttention(model).attribute(ids(), target=(6, 3))
    model.config._attn_implementation = form
    close(GenericAttention(model).attribute(ids(), target=(6, 3)), expected, 1e-6)
    assert model.config._attn_implementation == form


def test_tokens_that_bypass_a_call_keep_their_history():
    """CaiT: class attention updates [CLS] alone; the patches it reads later are the older ones."""
    torch.manual_seed(0)
    model = timm.models.cait.Cait(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4, depth_token_only=2,
        num_classes=5, init_values=1.0,
    )  # fmt: skip
    model, images = model.double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.double)
    method = GenericAttention(model)
    first, second, third, fourth = (m.mean(1) for _, m in method.layer_maps(images, 3))
    tokens = method.attribute_tokens(images, 3)["x"]
    for b in range(2):
        patches = (plain.eye(16) + second[b]) @ (plain.eye(16) + first[b])
        cls = third[b, :, 1:] @ patches  # [CLS] starts from a parameter and knows no patch
        cls = cls + fourth[b, :, :1] @ cls + fourth[b, :, 1:] @ patches
        close(tokens[b], cls[0])


def test_an_embedding_with_the_length_first():
    model = model_of(
        "XLNet", "ForSequenceClassification",
        vocab_size=60, d_model=32, n_layer=2, n_head=4, d_inner=32, num_labels=3,
    )  # fmt: skip
    method, tokens = GenericAttention(model), ids()
    both = method.attribute({"input_ids": tokens}, target=1)["input_ids"]
    for b in range(2):
        one = method.attribute({"input_ids": tokens[b : b + 1]}, target=1)["input_ids"]
        close(both[b], one[0], 1e-6)
    assert (both.argmax(1) == 6).all()  # the summary token is the last


def test_multiple_choice_folds_the_choices_into_the_batch():
    model = model_of("Bert", "ForMultipleChoice", **SMALL, intermediate_size=32)
    choices = torch.stack([ids(3, 9, 1), ids(3, 9, 2)])  # (B, choices, n)
    found = GenericAttention(model).attribute({"input_ids": choices}, target=1)["input_ids"]
    assert found.shape == choices.shape
    assert not found[:, [0, 2]].any()  # the score of a choice reads that choice alone
    assert (found[:, 1] > 0).all()


@pytest.fixture(scope="module")
def clip():
    text = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 16, "eos_token_id": 59}
    image = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    image |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    model = model_of("CLIP", "Model", text_config=text, vision_config=image, projection_dim=16)
    tokens = ids()
    tokens[:, -1] = 59
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "pixel_values": pixels.double()}
    skip_unless_double_runs(lambda: model(**inputs))
    return model, inputs


def test_pairwise_scores_one_example_at_a_time(clip):
    model, inputs = clip
    method = GenericAttention(model)
    both = method.attribute_tokens(inputs, objective=objectives.pairwise)
    assert set(both) == {"input_ids", "pixel_values"}
    for b in range(2):
        one = {name: value[b : b + 1] for name, value in inputs.items()}
        for name, tokens in method.attribute_tokens(one, target=0).items():
            close(both[name][b], tokens[0], 1e-6)


@pytest.mark.parametrize("method", [RawAttention, AttentionRollout])
def test_class_agnostic_methods_read_what_the_objective_reads(clip, method):
    """Not the rows of a random mixture of all (B, B) scores."""
    model, inputs = clip
    both = method(model).attribute_tokens(inputs, objective=objectives.pairwise)
    for b in range(2):
        one = {name: value[b : b + 1] for name, value in inputs.items()}
        for name, tokens in method(model).attribute_tokens(one).items():
            assert tokens.any()
            close(both[name][b], tokens[0], 1e-6)


@pytest.mark.parametrize("target", [0, 1, torch.tensor([1, 0])])
def test_scores_across_examples_are_refused(clip, target):
    model, inputs = clip
    with pytest.raises(ReadoutError, match="pairwise"):
        GenericAttention(model).attribute(inputs, target=target)


class Classifier(nn.Module):
    """One attention layer; class 0 is masked with -inf, class 1 has no weights."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.head.weight.data[1] = 0

    def forward(self, tokens):
        x = tokens + self.attention(tokens, tokens, tokens)[0]
        logits = self.head(x)
        minus = torch.full_like(logits[..., :1], -torch.inf)
        return torch.cat([minus, logits[..., 1:]], -1)  # (B, n, 3)


def test_masked_outputs_are_no_fault():
    torch.manual_seed(0)
    model, tokens = Classifier().eval(), torch.randn(2, 5, 8)
    assert GenericAttention(model).attribute_tokens(tokens, (4, 2))["tokens"].isfinite().all()
    assert AttentionRollout(model).attribute_tokens(tokens)["tokens"].isfinite().all()


def test_an_output_without_gradient_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ReadoutError, match="readout"):
        GenericAttention(Classifier().eval()).attribute(torch.randn(2, 5, 8), target=(4, 1))


class Folded(nn.Module):
    """Two channels folded into the batch, as time series models do: (B C, n, D)."""

    def __init__(self, need_weights):
        super().__init__()
        self.attention, self.need_weights = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            need_weights,
        )
        self.head = nn.Linear(8, 3)

    def forward(self, series):  # (B, C, n, D)
        x = series.flatten(0, 1)
        x = x + self.attention(x, x, x, need_weights=self.need_weights)[0]
        return self.head(x.unflatten(0, series.shape[:2]).mean((1, 2)))


def test_lanes_and_heads_in_one_axis():
    """With `need_weights` the map is (B C heads, n, n): channels are windows, not heads."""
    torch.manual_seed(0)
    plainer, model = Folded(False).double().eval(), Folded(True).double().eval()
    model.load_state_dict(plainer.state_dict())
    series = torch.randn(2, 2, 5, 8, dtype=torch.double)
    expected = GenericAttention(plainer).attribute_tokens(series, target=1)["series"]
    found = GenericAttention(model).attribute_tokens(series, target=1)["series"]
    assert found.shape == (2, 10)
    close(found, expected)


class Positions(nn.Module):
    """Sine positions by an outer product, as XLNet makes them."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, tokens):
        outer = torch.einsum("i,d->id", torch.arange(5.0), torch.arange(8.0) / 8)
        x = tokens + outer.sin()
        return self.head((x + self.attention(x, x, x)[0])[:, 0])


def test_an_outer_product_is_no_score():
    torch.manual_seed(0)
    tokens = GenericAttention(Positions().eval()).attribute_tokens(torch.randn(2, 5, 8), target=1)
    assert tokens["tokens"].shape == (2, 5)
    assert (tokens["tokens"][:, 0] >= 1).all()


def test_relevance_that_overflows_is_refused():
    torch.manual_seed(0)
    model, tokens = Positions().eval(), torch.randn(2, 5, 8)

    def huge(output, target):
        return output[:, target] * 3e38 * output.detach().abs().amax() * 1e3

    with pytest.raises(AttnError, match="finite"):
        GenericAttention(model).attribute(tokens, target=1, objective=huge)


class SomeAsk(Trap):
    """The last two words alone ask the image, and stand before the others afterwards."""

    def __init__(self):
        super().__init__("image_", "before", "cross", "after")

    def forward(self, words, image):
        image = image + self.image_(image, image)
        words = words + self.before(words, words)
        others, asking = words[:, :3], words[:, 3:]
        words = torch.cat([asking + self.cross(asking, image), others], 1)
        words = words + self.after(words, words)
        return self.head(words[:, 1])


@pytest.mark.parametrize("method", [AttentionRollout, GenericAttention])
def test_where_some_tokens_ask_across(method):
    """The rule holds for them alone, and moves with them (a Q-Former's queries ask the image)."""
    model, inputs = ready(SomeAsk), (random(1, 5, 6), random(1, 3, 6, seed=1))
    A, G = plain.maps_and_gradients(model, lambda out: out[0, 1], *inputs)
    tokens = method(model).attribute_tokens(inputs, target=1)
    asking = slice(3, 5)
    if method is AttentionRollout:
        image, before, cross, after = (plain.fuse_heads(a) for a in A)
        image, before, after = (
            plain.row_normalised(a + plain.eye(len(a))) for a in (image, before, after)
        )
        own = before[asking, asking]
        expected = torch.zeros(5, 3, dtype=torch.double)
        expected[asking] = own.T @ cross @ image  # Eq. 12: no rollout afterwards
    else:
        image, before, cross, after = (plain.gae_map(*pair) for pair in zip(A, G, strict=True))
        after, before = after + plain.eye(5), before + plain.eye(5)
        own = plain.residual_normalised(before)[asking, asking]
        change = own.T @ cross @ plain.residual_normalised(image + plain.eye(3))
        expected = torch.zeros(5, 3, dtype=torch.double)
        expected[asking] = change
    moved = [3, 4, 0, 1, 2]
    close(tokens["words"][0], (after @ before[moved])[1])
    across = expected[moved] if method is AttentionRollout else after @ expected[moved]
    close(tokens["image"][0], across[1])


class Translator(Trap):
    """A padded target asks a padded source."""

    def __init__(self):
        super().__init__("of_source", "of_target", "cross", "last")

    def forward(self, target, source, spoken, written):
        spoken, written = (mask[:, None, None].bool() for mask in (spoken, written))
        source = source + self.of_source(source, source, mask=written)
        target = target + self.of_target(target, target, mask=spoken)
        target = target + self.cross(target, source, mask=written)
        target = target + self.last(target, target, mask=spoken)
        return self.head(target[:, 0])


@pytest.mark.parametrize("n", [3, 4], ids=["of the target", "none"])
def test_padding_that_asks_across_changes_no_rollout(n):
    """Eq. 12's transpose would hand on to the real tokens what the padding asked."""
    model, target, source = ready(Translator), random(1, 4, 6), random(1, 5, 6, seed=1)
    method, there = AttentionRollout(model), torch.ones(1, 5)
    spoken = (torch.arange(4) < n).long()[None]
    padded = method.attribute_tokens((target, source), 1, (spoken, there))
    alone = method.attribute_tokens((target[:, :n], source), 1, (spoken[:, :n], there))
    close(padded["source"], alone["source"])
    close(padded["target"][:, :n], alone["target"])
    assert not padded["target"][:, n:].any()
    A, _ = plain.maps_and_gradients(
        model, lambda out: out[0, 1], target[:, :n], source, spoken[:, :n], there
    )
    of_source, of_target, cross, _ = (plain.fuse_heads(a) for a in A)
    rolled = [plain.row_normalised(a + plain.eye(len(a))) for a in (of_target, of_source)]
    close(padded["source"][0], (rolled[0].T @ cross @ rolled[1])[0])


class Latents(Trap):
    """A learned query asks learned latents, which have asked the input (Perceiver)."""

    def __init__(self):
        super().__init__("encode", "decode")
        self.latents = nn.Parameter(torch.randn(1, 3, 6))
        self.query = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, media):
        latents, query = (x.expand(len(media), -1, -1) for x in (self.latents, self.query))
        latents = latents + self.encode(latents, media)
        return self.head((query + self.decode(query, latents))[:, 0])


def test_raw_attention_says_that_its_map_reads_no_input():
    model, media = ready(Latents), random(2, 5, 6)
    with pytest.warns(UserWarning, match="'media' got no relevance.*are shown read other tokens"):
        tokens = RawAttention(model).attribute_tokens(media, target=1)
    for b in range(2):
        A, _ = plain.maps_and_gradients(model, lambda out: out[0, 1], media[b : b + 1])
        close(tokens["queries"][b], plain.fuse_heads(A[1])[0])
        close(tokens["media"][b], torch.zeros(5, dtype=torch.double))
        rolled = AttentionRollout(model).attribute_tokens(media, target=1)["media"]
        expected = plain.fuse_heads(A[1]) @ plain.fuse_heads(A[0])
        close(rolled[b], expected[0])


class Prompted(Trap):
    """Learned queries ask the image and stand in front of the words (BLIP-2)."""

    def __init__(self):
        super().__init__("cross", "language")
        self.learned = nn.Parameter(torch.randn(1, 3, 6))

    def forward(self, words, image):
        queries = self.learned.expand(len(words), -1, -1)
        x = torch.cat([queries + self.cross(queries, image), words], 1)
        return self.head((x + self.language(x, x))[:, -1])


def test_rollout_of_a_stream_that_begins_with_another_s_tokens():
    """What the queries have read of the image goes on with them."""
    model, inputs = ready(Prompted), (random(1, 4, 6), random(1, 5, 6, seed=1))
    A, _ = plain.maps_and_gradients(model, lambda out: out[0, 1], *inputs)
    cross, language = (plain.fuse_heads(a) for a in A)
    row = plain.row_normalised(language + plain.eye(7))[-1]
    method = AttentionRollout(model)
    tokens = method.attribute_tokens(inputs, target=1)
    close(tokens["image"][0], row[:3] @ cross)
    close(tokens["queries"][0], row[:3])
    close(tokens["words"][0], row[3:])
    maps = method.relevance_maps(inputs, target=1)
    close(maps["words", "image"][0, -1], row[:3] @ cross)


def test_the_only_one_of_several_images_has_channels_of_its_own():
    """(B, 1, 3, H, W): the axis of the images is not the one that is divided by."""
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
    ).eval()
    images = torch.randn(2, 1, 3, 16, 16)
    expected = GenericAttention(model).attribute(images[:, 0], target=1)
    found = GenericAttention(lambda images: model(images[:, 0])).attribute(images, target=1)
    close(found[:, 0], expected, 1e-6)
    close(found[0, 0, 0], found[0, 0, 2], 1e-6)


class Sized(Trap):
    """What kind of image it is is added to all of its patches, before each layer (Mllama)."""

    def __init__(self):
        super().__init__("a", "b")
        self.first, self.second = nn.Embedding(4, 6), nn.Embedding(4, 6)

    def forward(self, patches, kind_ids):
        x = patches + self.first(kind_ids)
        x = x + self.a(x, x)
        x = x + self.second(kind_ids)
        x = x + self.b(x, x)
        return self.head(x[:, 0])


def test_ids_that_are_added_to_all_tokens_are_none_of_them():
    model, patches, kinds = ready(Sized), random(2, 5, 6), torch.tensor([[3], [1]])
    method = GenericAttention(model)
    tokens = method.attribute_tokens((patches, kinds), 1)
    assert set(tokens) == {"patches"}
    for b in range(2):
        A, G = plain.maps_and_gradients(
            model, lambda out: out[0, 1], patches[b : b + 1], kinds[b : b + 1]
        )
        close(tokens["patches"][b], plain.gae(A, G)[0])
    of_patches, of_kinds = method.attribute((patches, kinds), 1)
    close(of_patches.sum(-1), tokens["patches"])
    assert not of_kinds.any()
    assert set(method.attribute({"patches": patches, "kind_ids": kinds}, 1)) == {"patches"}
