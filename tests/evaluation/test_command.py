"""``captum-attn evaluate`` on the package's models and on others from a folder."""

import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from captum_attn import GenericAttention
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation import command, evaluate
from captum_attn.evaluation.models import load


def run(*arguments):
    app = typer.Typer()
    app.command()(command.evaluate_command)
    app([str(a) for a in arguments], standalone_mode=False)


def values(out):
    stored = json.loads((out / "results.json").read_text())
    return {(v["method"], v["metric"]): v for v in stored["values"]}


@pytest.fixture
def picture(tmp_path):
    """A digit on paper, its mask, and a folder of each."""
    pixels = np.full((40, 20), 255, dtype=np.uint8)
    pixels[5:35, 8:12] = 0
    for name, value in (("images", pixels), ("masks", pixels == 0)):
        (tmp_path / name / "1").mkdir(parents=True)
        Image.fromarray(value.astype(np.uint8)).save(tmp_path / name / "1" / "one.png")
    return tmp_path


def test_the_digit_vit_on_its_own_scenes(tmp_path, capsys):
    arguments = [
        "--model", "digit-vit", "--out", tmp_path, "--limit", 5, "--batch-size", 2,
        "--methods", "GenericAttention, HeterogenousAttention(correction='full')",
        "--metrics", "aopc(steps=3), energy_inside", "--perturbation", "patch_size=8",
    ]  # fmt: skip
    run(*arguments)
    printed = capsys.readouterr().out
    found = values(tmp_path)
    loaded = load("digit-vit")
    rows = loaded.examples(5, 0)
    expected = evaluate(
        loaded.model, rows, {"g": GenericAttention},
        {"a": ("aopc", {"steps": 3, "patch_size": 8}), "energy_inside": "energy_inside"},
        batch_size=2, show_progress=False,
    )  # fmt: skip
    gae = found["GenericAttention", "aopc(steps=3)"]
    assert gae["value"] == pytest.approx(expected.value("g", "a").value)
    assert gae["standard_error"] == pytest.approx(expected.value("g", "a").standard_error)
    full = "HeterogenousAttention(correction='full')"
    assert full in printed and "in 3 groups" in printed
    assert found[full, "energy_inside"]["value"] > 0.2
    with pytest.raises(OptionError, match="has results already"):
        run(*arguments)
    run(*arguments, "--resume")
    assert values(tmp_path) == found
    assert [row[2]["groups"] for row in rows] == [0, 0, 1, 1, 2]


def test_a_folder_of_pictures_with_masks(picture):
    loaded = load("digit-vit")
    path = picture / "masks/1/one.png"
    mask, image = loaded.read_mask(path), loaded.read(picture / "images/1/one.png")
    assert mask.shape == (64, 64) and (image[0] > 0.5).eq(mask).float().mean() > 0.97
    run("--model", "digit-vit", "--data", picture / "images", "--masks", picture / "masks",
        "--methods", "RandomAttribution", "--metrics", "energy_inside",
        "--out", picture / "out")  # fmt: skip
    found = values(picture / "out")["RandomAttribution", "energy_inside"]
    assert found["value"] == pytest.approx(float(mask.float().mean()), abs=0.03)
    assert found["standard_error"] is None


def test_models_of_transformers(picture, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["intermediate_size"] = 16
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    loaded = load(str(tmp_path / "vit"))
    mask = loaded.read_mask(picture / "masks/1/one.png")
    image = loaded.read(picture / "images/1/one.png")
    assert image.shape == (3, 32, 32) and mask.dtype == torch.bool
    expected = np.zeros((40, 20))
    expected[5:35, 8:12] = 1
    assert abs(float(mask.float().mean()) - expected.mean()) < 0.02
    assert ((image[0] < 0) == mask).float().mean() > 0.9  # the ink is where the mask is
    run("--model", tmp_path / "vit", "--data", picture / "images", "--masks", picture / "masks",
        "--methods", "GenericAttention", "--metrics", "segmentation",
        "--out", tmp_path / "a")  # fmt: skip
    assert ("GenericAttention", "segmentation.mIoU") in values(tmp_path / "a")

    topics = load("topics").tokenizer
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    config = transformers.BertConfig(**sizes, vocab_size=len(topics), **names)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    topics.save_pretrained(tmp_path / "bert")
    (tmp_path / "t.tsv").write_text("good\ta fine and funny film\nbad\tdull\n")
    run("--model", tmp_path / "bert", "--data", tmp_path / "t.tsv", "--out", tmp_path / "b",
        "--methods", "GenericAttention, IntegratedGradients(n_steps=4)")  # fmt: skip
    found = values(tmp_path / "b")
    assert found["GenericAttention", "sufficiency"]["examples"] == 2
    assert len(found) == 2 * 5  # no rationales, so no metric of them


def test_topics_with_the_labels_of_the_file(tmp_path):
    (tmp_path / "t.tsv").write_text(
        "sport\tThe goalkeeper saved the penalty.\ncooking\tFold the flour into the eggs.\n"
    )
    run(
        "--model", "topics", "--data", tmp_path / "t.tsv", "--out", tmp_path / "out",
        "--methods", "GenericAttention, RandomAttribution", "--metrics", "comprehensiveness",
    )  # fmt: skip
    found = values(tmp_path / "out")
    assert (
        found["GenericAttention", "comprehensiveness"]["value"]
        > found["RandomAttribution", "comprehensiveness"]["value"]
    )


def test_the_textures_of_the_texture_vit(picture, tmp_path):
    run("--model", "texture-vit", "--out", tmp_path / "own", "--limit", 6, "--methods",
        "AttentionRollout, RandomAttribution", "--metrics", "segmentation")  # fmt: skip
    found = values(tmp_path / "own")
    rollout, chance = (
        found[m, "segmentation.mIoU"]["value"] for m in ("AttentionRollout", "RandomAttribution")
    )
    assert rollout > chance + 0.2 and chance < 0.45
    loaded = load("texture-vit")
    image, label, mask = loaded.examples(2, 0)[1]
    inside = load("texture-vit").model(image[None]).argmax(1)
    assert int(inside) == label and mask.shape == (64, 64)
    ink = loaded.read_mask(picture / "masks/1/one.png")
    picture_ = loaded.read(picture / "images/1/one.png")
    assert picture_.shape == (3, 64, 64) and float(ink.float().mean()) == pytest.approx(
        0.15, abs=0.02
    )
    assert ((picture_[0] < 0.5) == ink).float().mean() > 0.97


def test_the_sentences_of_the_topics(tmp_path):
    """Every sentence is there with its topic and its reason, and the model knows most of them."""
    loaded = load("topics")
    data = loaded.examples(None, 0)
    counts = {name: data.names.count(name) for name in set(data.names)}
    assert len(counts) == 6 and min(counts.values()) >= 10 and len(set(data.texts)) == len(data)
    batch = data.collate_fn([data[i] for i in range(len(data))])
    with torch.no_grad():
        right = loaded.model(**batch.inputs).argmax(1) == batch.target
    assert right.float().mean() > 0.8
    share = batch.truth["rationales"].sum(1) / batch.truth["rationale_mask"].sum(1)
    assert float(share.min()) > 0 and float(share.max()) < 0.6
    run("--model", "topics", "--out", tmp_path, "--limit", 16, "--methods",
        "GenericAttention(discard_self=True), RandomAttribution", "--metrics",
        "rationale_f1, rationale_auprc")  # fmt: skip
    found = values(tmp_path)
    ours, chance = (
        found[m, "rationale_auprc"]["value"]
        for m in ("GenericAttention(discard_self=True)", "RandomAttribution")
    )
    assert ours > chance + 0.1


def test_independent_classes_are_measured_by_their_sigmoid(tmp_path):
    run("--model", "digit-vit", "--out", tmp_path, "--limit", 2, "--methods", "RandomAttribution",
        "--perturbation", "patch_size=32")  # fmt: skip
    named = {metric.split("(")[0]: metric for _, metric in values(tmp_path)}
    assert named["positive_auc"] == "positive_auc(measure='sigmoid_accuracy')"
    assert named["log_odds"] == "log_odds(measure='log_sigmoid')"


def test_texts_are_measured_by_what_is_marked_in_them(tmp_path):
    (tmp_path / "t.tsv").write_text("sport\tA late goal.\tgoal\ncooking\tFold the eggs.\teggs\n")
    run("--model", "topics", "--data", tmp_path / "t.tsv", "--out", tmp_path / "out",
        "--methods", "RandomAttribution")  # fmt: skip
    assert {metric for _, metric in values(tmp_path / "out")} == {
        "token_removal_auc", "comprehensiveness", "sufficiency", "aopc", "log_odds",
        "rationale_f1", "rationale_auprc",
    }  # fmt: skip


def test_timm_brings_its_own_transform(picture, monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained: create(name, depth=1, num_classes=2)
    )
    monkeypatch.setattr("captum_attn.evaluation.models.only_kept", lambda name, file: False)
    loaded = load("timm/vit_tiny_patch16_224")
    image = loaded.read(picture / "images/1/one.png")
    mask = loaded.read_mask(picture / "masks/1/one.png")
    assert image.shape == (3, 224, 224) and mask.shape == (224, 224)
    # resized and cropped alike: the ink is where the mask is
    assert ((image[0] < 0) == mask).float().mean() > 0.97 and mask.float().mean() > 0.1


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        (
            ["--model", "timm/vit"],
            OptionError,
            "--data: only digit-vit, texture-vit, clothing-vit, topics",
        ),
        (["--model", "digit-vit", "--data", "nowhere"], InputError, "no folder or file"),
        (["--model", "digit-vit", "--masks", "m"], OptionError, "--masks are for a folder"),
        (["--model", "digit-vit", "--methods", "A, A"], OptionError, "A is there twice"),
        (["--model", "digit-vit", "--methods", "A +"], OptionError, "--methods: cannot read"),
        (["--model", "digit-vit", "--methods", "A(x=y)"], OptionError, "expected plain values"),
        (["--model", "digit-vit", "--metrics", "a.b"], OptionError, "expected names or name"),
        (["--model", "digit-vit", "--perturbation", "8"], OptionError, "expected option=value"),
        (["--model", "digit-vit", "--device", "moon"], OptionError, "--device: 'moon' cannot"),
        (["--model", "digit-vit", "--limit", 2, "--methods", "Magic"], OptionError, "has 'Magic'"),
        (["--model", "digit-vit", "--data", __file__], OptionError, "is for images"),
        (["--model", "no/such/folder", "--data", "."], InputError, "no folder at 'no/such/folder'"),
    ],
)
def test_mistakes_are_one_line(arguments, error, said, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=said):
        run(*arguments, "--out", tmp_path)
    assert not list(tmp_path.iterdir())
