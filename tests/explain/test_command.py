"""``captum-attn explain-text`` and ``explain-image``: the package's models, and folders."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from captum_attn import GenericAttention
from captum_attn.cli.app import run
from captum_attn.demo.image import load_picture
from captum_attn.demo.scenes import scenes
from captum_attn.errors import InputError, TargetError
from captum_attn.evaluation.models import load
from captum_attn.explain.asked import ask
from captum_attn.explain.words import encoded

TEXT = "The band toured Europe by train and played in small villages."
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES["intermediate_size"] = 16


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def scene(tmp_path):
    """A picture of a 5 above a 4, four times as large as the model takes it."""
    pixels = (255 * scenes(1, split="test", seed=0).images[0, 0].numpy()).astype(np.uint8)
    Image.fromarray(pixels).resize((256, 256)).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def printed(capsys, *arguments) -> str:
    assert run([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def rows(table: str) -> dict[str, list[float]]:
    """The printed words with their numbers."""
    found = re.findall(r"^  (\S+) +(-?[\d.e-]+(?: +-?[\d.e-]+)*)$", table, re.M)
    return {word: [float(v) for v in values.split()] for word, values in found}


# ---------------------------------------------------------------------------------- text
def test_the_words_of_the_predicted_topic_and_of_another(tmp_path, capsys):
    said = printed(capsys, "explain-text", TEXT, "--model", "topics", "--out", "why.html")
    assert re.search(r"^predicted: music 0\.\d\d, travel 0\.\d\d, ", said)
    assert "why music (0." in said and "written to why.html" in said
    found = rows(said)
    assert next(iter(found)) == "band"  # the most relevant first
    values = [value for (value,) in found.values()]
    assert values == sorted(values, reverse=True) and len(values) == 10
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert "villages" in page and "why music" in page

    said = printed(capsys, "explain-text", TEXT, "--model", "topics", "--target", "Travel",
                   "--top", 2)  # fmt: skip
    assert "why travel (0." in said and list(rows(said)) == ["toured", "band"]
    assert "... 12 words in all" in said and "written" not in said


def test_several_methods_stand_side_by_side(capsys):
    methods = ["--method", "AttentionRollout, GenericAttention(discard_self=True)"]
    methods += ["--method", "IntegratedGradients(n_steps=5)"]
    said = printed(capsys, "explain-text", TEXT, "--model", "topics", *methods, "--top", 12)
    names = ["AttentionRollout", "GenericAttention(discard_self=True)"]
    assert re.search(r" +".join(map(re.escape, [*names, "IntegratedGradients(n_steps=5)"])), said)
    found = rows(said)
    loaded = load("topics", [])
    inputs = loaded.tokenizer(TEXT, return_tensors="pt")
    target = loaded.classes["music"]
    gae = GenericAttention(loaded.model).attribute(inputs, target=target, discard_self=True)
    band = inputs.tokens().index("band")
    assert found["band"][1] == pytest.approx(float(gae["input_ids"][0, band]), rel=0.01)
    assert min(found["europe"]) < 0 < found["europe"][0]  # only Integrated Gradients has a sign


def test_pieces_of_a_word_are_added_up(capsys):
    said = printed(capsys, "explain-text", "Goalkeepers!", "--model", "topics")
    loaded = load("topics", [])
    inputs = loaded.tokenizer("Goalkeepers!", return_tensors="pt")
    asked = ask(loaded, inputs)
    gae = GenericAttention(loaded.model).attribute(inputs, target=asked.target, discard_self=True)
    assert inputs.tokens() == ["[CLS]", "goalkeeper", "##s", "!", "[SEP]"]
    expected = float(gae["input_ids"][0, 1:3].sum())
    assert rows(said)["goalkeepers"] == [pytest.approx(expected, rel=0.01)]


def test_own_topics(capsys):
    said = printed(capsys, "explain-text", "The soprano sang.", "--model", "topics",
                   "--labels", "football, opera")  # fmt: skip
    assert said.startswith("predicted: opera 1.00, football 0.00\n") and "why opera" in said


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A text classifier of transformers with names of its own."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = load("topics", []).tokenizer
    names = {"id2label": {0: "1", 1: "bad"}, "label2id": {"1": 0, "bad": 1}}
    config = transformers.BertConfig(**SIZES, vocab_size=len(tokenizer), **names)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_from_a_folder(bert, capsys):
    said = printed(capsys, "explain-text", "a fine film", "--model", bert, "--target", "BAD",
                   "--method", "GenericAttention, RawAttention", "--out", "why.png")  # fmt: skip
    assert re.search(r"^predicted: (1|bad) 0\.\d\d, (1|bad) 0\.\d\d$", said, re.M)
    assert "why bad (0." in said and set(rows(said)) == {"a", "fine", "film"}
    with Image.open("why.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 5


def test_a_name_goes_before_a_number(bert):
    loaded = load(str(bert))
    inputs = encoded(loaded, "a fine film")
    assert ask(loaded, inputs, "1").target == 0  # the class that is called "1"
    assert ask(loaded, inputs, "0").target == 0
    with pytest.raises(TargetError, match="has 2 outputs, 0 to 1; got 2"):
        ask(loaded, inputs, "2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A language model with a byte-level tokenizer of its own."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("llama")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    lines = ["The tower is in the city of Paris", "the city of Rome"] * 3
    made.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_next_token_of_a_language_model(llama, capsys):
    said = printed(capsys, "explain-text", "The tower is in the city of", "--model", llama,
                   "--target", "Paris", "--method", "GenericAttention",
                   "--method", "IntegratedGradients(n_steps=3)")  # fmt: skip
    assert "why ' Paris' (0." in said  # behind a blank, as it would go on
    assert all(values[1] != 0 for values in rows(said).values())
    assert set(rows(said)) == {"The", "tower", "is", "in", "the", "city", "of"}
    loaded = load(str(llama))
    inputs = encoded(loaded, "The tower is in the city of")
    asked = ask(loaded, inputs, "Paris")
    position, token = asked.target
    assert position == inputs["input_ids"].shape[1] - 1
    assert loaded.tokenizer.decode([token]) == " Paris"
    with torch.no_grad():
        logits = loaded.model(**inputs).logits[0, -1]
    assert asked.probability == pytest.approx(float(logits.softmax(-1)[token]), rel=1e-4)
    assert ask(loaded, inputs).target == (position, int(logits.argmax()))
    with pytest.raises(TargetError, match="'Lyon' is .* tokens of this model"):
        ask(loaded, inputs, "Lyon")


def test_a_text_is_not_cut(llama):
    with pytest.raises(InputError, match="has 40 tokens, the model reads 32"):
        encoded(load(str(llama)), "x" * 40)


# ---------------------------------------------------------------------------------- pictures
def test_a_picture_side_by_side_as_the_digit_vit_takes_it(scene, capsys):
    methods = ["--method", "GenericAttention, RawAttention"]
    said = printed(capsys, "explain-image", scene, "--model", "digit-vit", *methods,
                   "--target", "4", "--out", "why.html")  # fmt: skip
    assert re.search(r"^predicted: 5 1\.00, 4 0\.99, ", said)  # each digit a question of its own
    assert "why 4 (0.99)?\nwritten to why.html" in said
    page = (scene.parent / "why.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1 and "GenericAttention, RawAttention" in page


def test_what_is_drawn_is_what_the_method_gives(scene, capsys, monkeypatch):
    import captum_attn.visualization as visualization

    drawn = {}
    draw = visualization.visualize_image

    def watched(maps, images, **options):
        drawn.update(maps=maps, images=images, **options)
        return draw(maps, images, **options)

    monkeypatch.setattr(visualization, "visualize_image", watched)
    said = printed(capsys, "explain-image", scene, "--model", "digit-vit")
    assert "written to explanation.png" in said
    pixels = load_picture(scene)
    expected = GenericAttention(load("digit-vit").model).attribute(pixels, target=5)
    torch.testing.assert_close(drawn["maps"]["GenericAttention"], expected)
    torch.testing.assert_close(drawn["images"], pixels)
    assert drawn["titles"] == ["why 5 (1.00)?"]


def test_a_vit_of_transformers_from_a_folder(scene, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    names = {"id2label": {0: "cat", 1: "tabby, tabby cat"}, "label2id": {"cat": 0, "tabby": 1}}
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, **names)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    said = printed(capsys, "explain-image", scene, "--model", "vit", "--target", "tabby cat")
    assert "why tabby, tabby cat (0." in said
    loaded = load("vit")
    image = loaded.read(scene)
    assert image.min() < -0.9  # normalised
    resized = Image.open(scene).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    seen = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    torch.testing.assert_close(loaded.shown(image), seen, atol=0.02, rtol=0)


def test_a_folder_of_timm(scene, tmp_path, capsys):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2).eval()
    names = {"label_names": ["cat", "dog"], "model_args": {"depth": 1}, "num_classes": 2}
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": model.pretrained_cfg}
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "config.json").write_text(json.dumps(config | names))
    torch.save(model.state_dict(), tmp_path / "dog" / "pytorch_model.bin")
    said = printed(capsys, "explain-image", scene, "--model", "dog", "--target", "dog")
    assert "why dog (0." in said
    loaded = load("dog")
    assert loaded.labels == {0: "cat", 1: "dog"}
    image = loaded.read(scene)[None]
    torch.testing.assert_close(loaded.model(image), model(image))
    assert loaded.shown(image[0]).min() >= 0 and loaded.shown(image[0]).max() <= 1


def test_the_texture_vit_names_its_classes(tmp_path, capsys):
    from captum_attn.demo.textures import textured_objects

    batch = textured_objects(1, seed=1)
    pixels = (255 * batch.images[0].permute(1, 2, 0).numpy()).round().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "object.png")
    loaded = load("texture-vit")
    torch.testing.assert_close(
        loaded.read(tmp_path / "object.png"), batch.images[0], atol=0.003, rtol=0
    )
    name = loaded.labels[int(batch.labels[0])]
    said = printed(capsys, "explain-image", "object.png", "--model", "texture-vit")
    assert said.startswith(f"predicted: {name} ")
    image, label, truth = loaded.examples(3, 0)[2]
    assert image.shape == (3, 64, 64) and truth.any() and label in loaded.labels


def test_the_thousand_classes_of_imagenet_have_names(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, depth=1))
    loaded = load("timm/vit_tiny_patch16_224")
    assert loaded.labels[281] == "tabby, tabby cat" and len(loaded.labels) == 1000


# ---------------------------------------------------------------------------------- mistakes
T, I = ["explain-text", "goal"], ["explain-image", "scene.png"]  # noqa: E741
TOPICS, DIGITS = [*T, "--model", "topics"], [*I, "--model", "digit-vit"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (T, "Missing option '--model'"),
        (["explain-image", "--model", "digit-vit"], "Missing argument 'FILE'"),
        (
            [*T, "--model", "no/such/folder"],
            "is neither one of the package's models (digit-vit, texture",
        ),
        ([*T, "--model", "digit-vit"], "'digit-vit' is for images: see captum-attn explain-image"),
        ([*I, "--model", "topics"], "'topics' is for text: see captum-attn explain-text"),
        ([*T, "--model", "digit-vit", "--labels", "a, b"], "--labels are for the model topics"),
        ([*TOPICS, "--target", "sprot"], "no class 'sprot': expected predicted, one of sport,"),
        ([*TOPICS, "--target", "8"], "has 8 outputs, 0 to 7; got 8"),
        ([*TOPICS, "--method", "Magic"], "--method: neither captum_attn nor captum.attr has"),
        ([*TOPICS, "--method", "GenericAttention("], "--method: cannot read"),
        ([*TOPICS, "--method", ""], "--method: expected at least one"),
        ([*TOPICS, "--method", "GenericAttention(powr=2)"], "powr"),
        ([*TOPICS, "--out", "why.txt"], "--out: expected a file ending in .png or .html, got"),
        ([*TOPICS, "--out", "no/such/why.png"], "no folder at 'no/such'; give --out a file in"),
        ([*TOPICS, "--top", "0"], "Invalid value for '--top'"),
        ([*TOPICS, "--device", "moon"], "--device: 'moon' cannot be used"),
        (["explain-text", " ", "--model", "topics"], "has no words"),
        (["explain-text", "goal " * 300, "--model", "topics"], "the model reads 256"),
        (["explain-image", "no.png", "--model", "digit-vit"], "no picture at 'no.png'"),
        ([*DIGITS, "--target", "3.5"], "expected predicted, one of 0, 1, 2"),
        ([*DIGITS, "--labels", "a, b"], "No such option: --labels"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, said, scene, capsys):
    assert run([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.startswith("captum-attn: ")
    assert captured.err.count("\n") == 1 and not captured.out
    assert [path.name for path in scene.parent.iterdir()] == ["scene.png"]


def test_a_picture_that_is_none(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for model in ("digit-vit", "texture-vit"):
        assert run(["explain-image", "broken.png", "--model", model]) == 2
        assert "cannot read 'broken.png' as an image" in capsys.readouterr().err


def test_an_encoder_decoder_is_refused(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=16, num_layers=1, d_ff=16, d_kv=8, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert run(["explain-text", "goal", "--model", "t5"]) == 2
    assert "'t5' is a T5ForConditionalGeneration: expected one for" in capsys.readouterr().err


def test_a_language_model_is_no_classifier_to_evaluate(llama, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("The city\n")
    assert run(["evaluate", "--model", str(llama), "--data", "t.txt", "--out", "out"]) == 2
    assert "is a language model: see captum-attn explain-text" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["explain-text", "explain-image"])
def test_help_reads_well(command, capsys):
    shown = printed(capsys, command, "--help")
    assert shown.startswith(f"Usage: captum-attn {command}")
    assert all(o in shown for o in ("--model", "--method", "--target", "--out", "[required]"))
    assert not re.search(r"[│╭\x1b]", shown)
