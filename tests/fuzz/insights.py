"""The dashboard without its page: what it is made of, and what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from captum_attn import insights
from captum_attn.insights.hosts import checked_hosts
from captum_attn.insights.uploads import read_picture
from captum_attn.insights.visualizer import checked_port
from tests.fuzz.models import detector, vit
from tests.fuzz.public import Public
from tests.insights.models import TinyTokenizer, TinyWriter, made

MODEL = vit()


def arguments() -> Mapping[str, Any]:
    return {
        "models": MODEL, "classes": ["a", "b", "c"], "features": insights.ImageFeature("Photo"),
        "dataset": [insights.Batch(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))],
        "num_examples": 2,
    }  # fmt: skip


SESSION = insights.AttributionVisualizer(**arguments())


def of_batch(**parts: Any) -> Any:
    given = {"inputs": torch.rand(2, 3, 8, 8), "labels": torch.tensor([0, 1])} | parts
    return insights.AttributionVisualizer(**{**arguments(), "dataset": [insights.Batch(**given)]})


def asked(call: str) -> Any:
    def made(**given: Any) -> Any:
        return getattr(SESSION, call)(example=SESSION.examples[0], **given)

    return made


def explained(option: str) -> Any:
    return lambda value: SESSION.explain(
        "ViT", SESSION.examples[0], "Integrated Gradients", {option: value}
    )


def detects() -> Mapping[str, Any]:
    return {
        "models": detector(), "feature": insights.ImageFeature("Photo"), "threshold": 0.0,
        "dataset": [insights.Batch(torch.rand(1, 3, 8, 8))], "activation": "softmax",
    }  # fmt: skip


def writes() -> Mapping[str, Any]:
    return {"model": WRITER, "tokenizer": TinyTokenizer(), "prompts": [PROMPT]}


PROMPT, WRITER = "the old man", made(TinyWriter)
DETECTING = insights.DetectionVisualizer(**detects())
WRITING = insights.GenerationVisualizer(**writes())


def of_detector(call: str) -> Any:
    def made(**given: Any) -> Any:
        asked = {"model": "Detector", "example": DETECTING.examples[0], **given}
        return getattr(DETECTING, call)(**asked)

    return made


def of_writer(call: str) -> Any:
    return lambda **given: getattr(WRITING, call)(**{"prompt": PROMPT, **given})


def loaded(given: Any) -> Any:
    """A model and its tokenizer from what loads them."""
    return insights.GenerationVisualizer(lambda: given).next_tokens(PROMPT)


NAMED = {"name": "texts-text,empty_text,empty_list,nones", "baseline_transforms": "callable?",
         "input_transforms": "callable?", "visualization_transform": "callable?"}  # fmt: skip
ONE_TEXT = "texts-text,empty_text"
TAB = {"methods": "anything?", "presets": "mapping?", "note": ONE_TEXT}
SAID = {"name": "name", "baseline_transforms": "baseline", "input_transforms": "input_transforms"}
PUBLIC = [
    Public(
        "AttributionVisualizer", insights.AttributionVisualizer, arguments,
        {
            "models": "callable", "classes": "texts-mixed,empty_list",
            "features": "anything", "dataset": "anything", "score_func": "callable?",
            "use_label_for_attr": "flag",
            "num_examples": "count",
        } | TAB,
        {"dataset": "dataset"},
    ),
    Public(
        "DetectionVisualizer", insights.DetectionVisualizer, detects,
        {
            "models": "callable", "feature": "anything", "dataset": "anything",
            "threshold": "share", "activation": "choice-auto", "id2label": "mapping?",
            "num_examples": "count",
        } | TAB,
    ),
    Public("detect", of_detector("detect"), dict,
           {"model": "choice", "threshold": "share-none"}),
    Public("explain a detection", of_detector("explain"),
           lambda: {"query": 0, "method": "GAE"},
           {"query": "index", "method": "choice", "options": "mapping?"},
           {"query": "quer"}),
    Public(
        "GenerationVisualizer", insights.GenerationVisualizer, writes,
        {
            "model": "callable", "tokenizer": "anything", "prompts": "texts-mixed,empty_list",
            "name": ONE_TEXT,
        } | TAB,
    ),
    Public("what loads a language model", loaded, lambda: {"given": (WRITER, TinyTokenizer())},
           {"given": "anything"}, {"given": "model|tokenizer"}),
    Public("next_tokens", of_writer("next_tokens"), dict,
           {"prompt": "texts-text", "top": "count"}),
    Public("explain a token", of_writer("explain"), lambda: {"token": 4, "method": "GAE"},
           {"prompt": "texts-text", "token": "index", "method": "choice", "leave_out": "flag",
            "options": "mapping?"},
           {"token": "token|target"}),
    Public("write", of_writer("write"), lambda: {"count": 1, "method": "GAE"},
           {"prompt": "texts-text", "count": "count", "method": "choice", "leave_out": "flag"}),
    Public("with_token", of_writer("with_token"), lambda: {"token": 4},
           {"prompt": "texts-text", "token": "index"}),
    Public("a batch", of_batch, dict, {"inputs": "anything-volume", "labels": "anything?-numbers"},
           {"inputs": "dataset", "labels": "dataset"}),
    Public("ImageFeature", insights.ImageFeature, lambda: {"name": "a"},
           NAMED | {"upload": "callable?", "patch_size": "count?"}, SAID),
    Public("TextFeature", insights.TextFeature, lambda: {"name": "a"},
           NAMED | {"tokenize": "callable?", "special_ids": "anything-empty_list"}, SAID),
    Public("RegionFeature", insights.RegionFeature, lambda: {"name": "a"}, NAMED, SAID),
    Public("EmptyFeature", insights.EmptyFeature, dict, NAMED, SAID),
    Public("GeneralFeature", insights.GeneralFeature, lambda: {"name": "a", "categories": ["b"]},
           {"name": NAMED["name"], "categories": "texts-empty_list,mixed"}),
    Public("predict", asked("predict"), lambda: {"model": "ViT"},
           {"model": "choice", "top": "count"}),
    Public("explain", asked("explain"), lambda: {"model": "ViT", "method": "Raw Attention"},
           {"model": "choice", "method": "choice"}),
    Public("n_steps", explained("n_steps"), lambda: {"value": 5},
           {"value": "count?-empty_text,true"}, {"value": "n_steps"}),
    Public("register", insights.register, dict, {}),
    Public("read_picture", read_picture, dict, {"path": "path"}, {"path": "|"}),
    Public("hosts", lambda hosts: checked_hosts(hosts), dict,
           {"hosts": "texts-empty_list"}),
    Public("port", lambda port: checked_port(port), dict, {"port": "count?-zero"}),
]  # fmt: skip
