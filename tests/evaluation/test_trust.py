"""Model folders of strangers: no file of theirs runs code, and what is broken says so."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from captum_attn.errors import InputError
from captum_attn.evaluation import models
from captum_attn.evaluation.models import load
from captum_attn.evaluation.trust import FORCED, LIFTED, only_weights, read_settings, read_weights

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
CONFIGS = {
    "text": {"model_type": "bert", "architectures": ["BertForSequenceClassification"],
             "vocab_size": 20, **TINY},
    "language": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 20,
                 "n_embd": 8, "n_layer": 1, "n_head": 2},
    "image": {"model_type": "vit", "architectures": ["ViTForImageClassification"],
              "image_size": 32, "patch_size": 16, **TINY},
    "timm": {"architecture": "vit_tiny_patch16_224", "num_classes": 3,
             "pretrained_cfg": {"num_classes": 3}, "model_args": {"depth": 1}},
}  # fmt: skip


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "code has run"


def folder(tmp_path: Path, config: dict) -> Path:
    found = tmp_path / "model"
    found.mkdir()
    (found / "config.json").write_text(json.dumps(config))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "goal"]
    (found / "vocab.txt").write_text("\n".join(tokens))
    (found / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (found / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    return found


def written(kind: str, mark: Path) -> bytes:
    """A hostile file, alone, below a state dict, or as torch writes it."""
    hostile = Hostile(mark)
    if kind == "pickle":
        return pickle.dumps(hostile)
    path = mark.parent / "written.bin"
    torch.save(
        {"state_dict": hostile} if kind == "below" else {"a": torch.ones(1), "b": hostile}, path
    )
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["pickle", "torch", "below"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_pickle_in_place_of_weights(name, kind, tmp_path, mark):
    at = folder(tmp_path, CONFIGS[name])
    (at / "pytorch_model.bin").write_bytes(written(kind, mark))
    with pytest.raises(InputError, match="cannot"):
        load(str(at))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["text", "language", "image"])
def test_a_hostile_adapter_beside_the_weights(name, tmp_path, mark):
    at = folder(tmp_path, CONFIGS[name])
    (at / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(at), "task_type": None})
    )
    for file in ("adapter_model.bin", "pytorch_model.bin"):
        (at / file).write_bytes(written("torch", mark))
    with pytest.raises(InputError):
        load(str(at))
    assert not mark.exists()


@pytest.mark.parametrize("asked", [
    {"pretrained": True}, {"checkpoint_path": "evil.bin"}, {"pretrained_cfg": {"file": "evil.bin"}},
    {"pretrained_cfg_overlay": {"file": "evil.bin"}, "pretrained": True},
])  # fmt: skip
def test_a_timm_folder_that_names_other_files(asked, tmp_path, mark):
    (tmp_path / "evil.bin").write_bytes(written("torch", mark))
    config = CONFIGS["timm"] | {"model_args": {"depth": 1} | asked}
    at = folder(tmp_path, config)
    torch.save({}, at / "pytorch_model.bin")
    with pytest.raises(InputError, match="model_args has"):
        load(str(at))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["local-dir:{at}", "hf-hub:{at}", "{at}"])
def test_timm_takes_names_of_its_own_alone(name, tmp_path, mark):
    at = folder(tmp_path, CONFIGS["timm"])
    (at / "pytorch_model.bin").write_bytes(written("torch", mark))
    with pytest.raises(InputError, match="no architecture"):
        load(f"timm/{name.format(at=at)}")
    with pytest.raises(InputError, match="no architecture"):
        (at / "config.json").write_text(
            json.dumps(CONFIGS["timm"] | {"architecture": name.format(at=at)})
        )
        load(str(at))
    assert not mark.exists()


def test_an_older_timm_that_unpickles_whatever_it_finds(monkeypatch, tmp_path, mark):
    import timm

    (tmp_path / "old.bin").write_bytes(written("torch", mark))
    monkeypatch.setattr(models, "only_kept", lambda *_: False)  # the hub has it
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained: torch.load(tmp_path / "old.bin", weights_only=False),
    )
    with pytest.raises(InputError, match="timm cannot load the weights"):
        load("timm/vit_tiny_patch16_224")
    assert not mark.exists()


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
class Config(BertConfig): pass
class Model(BertForSequenceClassification): pass
class Tokenizer(BertTokenizer): pass
"""


@pytest.mark.parametrize("kind", ["bert", "unheard-of"])
def test_code_that_a_folder_brings(kind, tmp_path, mark, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked
    code = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model",
            "AutoTokenizer": ["evil.Tokenizer", None]}  # fmt: skip
    at = folder(tmp_path, CONFIGS["text"] | {"model_type": kind, "auto_map": code})
    (at / "evil.py").write_text(CODE.format(mark=str(mark)))
    (at / "tokenizer_config.json").write_text(json.dumps({"auto_map": code}))
    torch.save({}, at / "pytorch_model.bin")
    with pytest.raises(InputError):
        load(str(at))
    assert not mark.exists()


def test_attention_of_the_hub_is_code_too(tmp_path):
    at = folder(tmp_path, CONFIGS["text"] | {"_attn_implementation": "someone/kernels",
                                             "attn_implementation": "someone/kernels"})  # fmt: skip
    with pytest.raises(InputError):
        load(str(at))


def test_a_model_without_some_of_its_weights_would_be_random(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(vocab_size=20, **TINY))
    weights = {k: v for k, v in model.state_dict().items() if "classifier" not in k}
    at = folder(tmp_path, CONFIGS["text"])
    torch.save(weights, at / "pytorch_model.bin")
    with pytest.raises(InputError, match="lacks weights of its model: classifier"):
        load(str(at))
    torch.save(model.state_dict(), at / "pytorch_model.bin")
    assert load(str(at)).tokenizer is not None


@pytest.mark.parametrize("wrapped", [{}, {"state_dict": None}, {"model": None}])
def test_a_timm_folder_of_plain_weights(wrapped, tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    weights = {f"module.{k}" if wrapped else k: v for k, v in model.state_dict().items()}
    at = folder(tmp_path, CONFIGS["timm"])
    torch.save(dict.fromkeys(wrapped, weights) or weights, at / "pytorch_model.bin")
    found = load(str(at)).model
    assert torch.equal(found.head.weight, model.head.weight) and not found.training


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv(LIFTED, "1")
    monkeypatch.delenv(FORCED, raising=False)
    with pytest.raises(RuntimeError), only_weights():
        assert os.environ[FORCED] == "1" and LIFTED not in os.environ
        raise RuntimeError
    assert os.environ[LIFTED] == "1" and FORCED not in os.environ


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 99_999, b'"a"'])
def test_settings_that_are_none(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputError, match="config.json"):
        read_settings(tmp_path / "config.json")


def test_weights_that_are_none(tmp_path):
    for value in (3, [torch.ones(1)], {"a": 3}, {"state_dict": {"a": "b"}}):
        torch.save(value, tmp_path / "w.bin")
        with pytest.raises(InputError, match="expected tensors by name"):
            read_weights(tmp_path / "w.bin")
