"""The command lines of the training scripts: they train, say how well, and save what they say."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from captum_attn.toy.clothing import packaged_clothing
from captum_attn.toy.clothing_vit import load_clothing_vit
from captum_attn.toy.digit_detr import load_digit_detr
from captum_attn.toy.digit_vit import load_digit_vit
from captum_attn.toy.digit_vqa import load_digit_vqa
from captum_attn.toy.texture_vit import load_texture_vit

FEW = {"batch_size": 8, "held_out": 8}
SCRIPTS = {
    "train_digits": (load_digit_vit, {"scenes_per_epoch": 8}, "both digits right in"),
    "train_textures": (load_texture_vit, {"images_per_epoch": 8}, "the texture is right in"),
    "train_clothing": (load_clothing_vit, {"pictures_per_epoch": 8}, "the class is right in"),
    "train_detector": (load_digit_detr, {"scenes_per_epoch": 8}, "on held-out scenes AP"),
    "train_vqa": (load_digit_vqa, {"steps": 1}, "right answers: all"),
}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_saves_the_model_of_its_last_epoch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = importlib.import_module(f"tutorials.training.{name}")
    load, sizes, said = SCRIPTS[name]
    path = tmp_path / "weights.safetensors"
    if name == "train_clothing":  # the whole set need not be installed
        monkeypatch.setattr(script, "clothing", lambda split: packaged_clothing())
    short = partial(script.train, **FEW, **sizes)
    monkeypatch.setattr(script, "train", short)
    monkeypatch.setattr(sys, "argv", [name, "--out", str(path), "--epochs", "2", "--seed", "3"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"epoch   1  {said}") and lines[1].startswith(f"epoch   2  {said}")
    assert lines[-1] == f"wrote {path}"
    *_, (last, _) = short(epochs=2, seed=3)
    saved = load(path).state_dict()
    for key, weights in last.state_dict().items():
        torch.testing.assert_close(saved[key], weights, rtol=1e-3, atol=1e-3)  # half precision
