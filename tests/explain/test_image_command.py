"""``captum-attn explain-image``: the package's models, and folders."""

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
from captum_attn.evaluation.models import load
from tests.explain.command import SIZES, printed


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
    torch.testing.assert_close(drawn["maps"]["GenericAttention"][0], expected[0])
    torch.testing.assert_close(drawn["images"][0], pixels[0])
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
    from captum_attn.toy.textures import textured_objects

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
    monkeypatch.setattr("captum_attn.evaluation.models.only_kept", lambda name, file: False)
    loaded = load("timm/vit_tiny_patch16_224")
    assert loaded.labels[281] == "tabby, tabby cat" and len(loaded.labels) == 1000


def test_a_picture_that_is_none(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for model in ("digit-vit", "texture-vit"):
        assert run(["explain-image", "broken.png", "--model", model]) == 2
        assert "cannot read 'broken.png' as an image" in capsys.readouterr().err
