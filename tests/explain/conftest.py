"""A folder of its own for every command, a picture, and models saved in folders."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from captum_attn.evaluation.models import load
from captum_attn.toy.scenes import scenes
from tests.explain.command import SIZES


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


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """A model that gives every token one of three tags."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tagger")
    tokenizer = load("topics", []).tokenizer
    names = {"id2label": {0: "O", 1: "LOC", 2: "PER"}, "label2id": {"O": 0, "LOC": 1, "PER": 2}}
    config = transformers.BertConfig(**SIZES, vocab_size=len(tokenizer), **names)
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
