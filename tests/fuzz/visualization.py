"""The pictures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

import captum_attn.visualization as v
from captum_attn.generation import Generation
from tests.fuzz.public import Public

SCALE = {"sign": "choice", "outlier_perc": "percent", "cmap": "choice?"}
TITLES = {"titles": "texts?"}
WORDS = ["[CLS]", "go", "##al", "[SEP]"]


def detected() -> SimpleNamespace:
    return SimpleNamespace(
        boxes=torch.tensor([[0.0, 0, 4, 4]]), scores=torch.tensor([0.9]), names=["cat"],
        maps=torch.rand(1, 8, 8), labels=torch.tensor([1]),
    )  # fmt: skip


def written() -> Generation:
    return Generation(
        {"input_ids": torch.rand(1, 2, 4)}, "input_ids", torch.tensor([[5, 6]]),
        torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1, 2, 3, 5]]),
        torch.ones(1, 4, dtype=torch.bool),
    )  # fmt: skip


def names(ids: list[int]) -> list[str]:
    return [f"t{i}" for i in ids]


def image() -> dict[str, Any]:
    return {"attributions": torch.rand(8, 8), "images": torch.rand(3, 8, 8)}


def layers() -> list[Any]:
    return [("a", torch.rand(1, 2, 5, 5)), ("b", torch.rand(1, 2, 5, 5))]


def saved(**options: Any) -> Any:
    picture = v.visualize_matrix(torch.rand(2, 2), ["a", "b"])
    return picture.png(**options) if "path" not in options else picture.save(**options)


def looked(**options: Any) -> Any:
    """The page of two layers, over tokens or over a picture."""
    over = {} if options.keys() & {"images", "grid"} else {"tokens": list("abcde")}
    return v.attention_page(**{"layer_maps": layers(), **over, **options})


PUBLIC = [
    Public(
        "unpack_patches", v.unpack_patches,
        lambda: {"patches": torch.rand(4, 24), "grid_thw": torch.tensor([[1, 2, 2]])},
        {
            "patches": "tensor", "grid_thw": "tensor", "merge_size": "count",
            "temporal_patch_size": "count", "channels": "count", "frames": "choice",
        },
    ),
    Public(
        "visualize_image", v.visualize_image, image,
        SCALE | TITLES | {
            "attributions": "tensor", "images": "tensor?", "method": "choice",
            "patch_size": "side?",
            "interpolation": "choice?", "alpha_overlay": "share", "captions": "captions?",
            "boxes": "tensor?", "show_original": "flag", "show_colorbar": "flag",
            "panel_size": "length",
        },
    ),
    Public(
        "visualize_image of patches", v.visualize_image, lambda: image() | {"patch_size": 4},
        {"interpolation": "choice?", "patch_size": "side?"},
    ),
    Public(
        "visualize_text", v.visualize_text,
        lambda: {"attributions": torch.rand(4), "tokens": WORDS},
        TITLES | {
            "attributions": "tensor", "tokens": "tokens", "text": "texts?-text,empty_text",
            "sign": "choice", "outlier_perc": "percent", "merge_pieces": "flag",
            "show_special": "flag", "captions": "captions?", "legend": "flag", "width": "length",
            "max_lines": "count",
        },
    ),
    Public(
        "text_records", v.text_records,
        lambda: {"attributions": torch.rand(4), "tokens": WORDS},
        {
            "attributions": "tensor", "tokens": "tokens", "text": "texts?-text,empty_text",
            "merge_pieces": "flag", "show_special": "flag",
            "pred_prob": "percent?-minus_one,nan,huge,nones",
            "attr_score": "percent?-minus_one,nan,huge,nones",
        },
    ),
    Public(
        "visualize_matrix", v.visualize_matrix,
        lambda: {"matrix": torch.rand(2, 2), "rows": ["a", "b"]},
        SCALE | TITLES | {
            "matrix": "tensor", "rows": "texts-mixed", "columns": "texts?-mixed", "mask": "tensor?",
        },
    ),
    Public(
        "visualize_signal", v.visualize_signal,
        lambda: {"attributions": torch.rand(2, 9), "signal": torch.rand(2, 9)},
        {k: SCALE[k] for k in ("sign", "outlier_perc")} | TITLES | {
            "attributions": "tensor", "signal": "tensor", "rate": "length?-far,huge",
            "channels": "texts?-mixed,empty_list", "width": "length",
        },
    ),
    Public(
        "visualize_generation", v.visualize_generation,
        lambda: {"written": written(), "tokenizer": names},
        SCALE | TITLES | {
            "written": "anything", "tokenizer": "callable", "sources": "mapping?",
        },
    ),
    Public(
        "visualize_layers", v.visualize_layers,
        lambda: {"layer_maps": layers(), "images": torch.rand(3, 8, 8)},
        SCALE | TITLES | {
            "layer_maps": "anything", "images": "tensor?", "row": "index?", "grid": "pair?",
            "examples": "count?", "interpolation": "choice", "columns": "count",
            "panel_size": "length",
        },
    ),
    Public(
        "visualize_layers by tokens", v.visualize_layers,
        lambda: {"layer_maps": layers(), "tokens": list("abcde")}, {"tokens": "tokens?"},
    ),
    Public(
        "visualize_heads", v.visualize_heads, lambda: {"layer_maps": layers()},
        TITLES | {
            "layer_maps": "anything", "row": "index?", "examples": "count?", "sign": "choice",
            "cmap": "choice?",
        },
    ),
    Public(
        "visualize_image_text", v.visualize_image_text,
        lambda: {
            "attributions": (torch.rand(4), torch.rand(8, 8)), "tokens": WORDS,
            "images": torch.rand(3, 8, 8),
        },
        TITLES | {
            "attributions": "anything", "tokens": "tokens", "images": "tensor", "boxes": "tensor?",
            "text": "texts?-text,empty_text", "sign": "choice", "outlier_perc": "percent",
            "patch_size": "side?", "interpolation": "choice?", "merge_pieces": "flag",
            "show_special": "flag", "shared_scale": "flag", "captions": "texts?",
            "legend": "texts-mixed", "width": "length",
        },
    ),
    Public(
        "visualize_words_on_image", v.visualize_words_on_image,
        lambda: {"relevance": torch.rand(4, 4), "tokens": WORDS, "image": torch.rand(3, 8, 8)},
        {
            "relevance": "tensor", "tokens": "tokens", "image": "tensor", "boxes": "tensor?",
            "grid": "pair?", "text": "texts?-text,empty_text", "merge_pieces": "flag",
            "show_special": "flag", "sign": "choice", "outlier_perc": "percent",
            "interpolation": "choice", "max_words": "count", "columns": "count",
            "panel_size": "length",
        },
        {"image": "image"},
    ),
    Public(
        "visualize_detections", v.visualize_detections,
        lambda: {"found": detected(), "images": torch.rand(3, 8, 8)},
        SCALE | TITLES | {
            "found": "anything", "images": "tensor", "masks": "tensor?", "method": "choice",
            "alpha_overlay": "share", "show_colorbar": "flag", "columns": "count",
            "panel_size": "length",
        },
    ),
    Public(
        "words_of", v.words_of, lambda: {"tokens": WORDS, "relevance": [1.0, 2, 3, 4]},
        {
            "tokens": "tokens", "relevance": "tensor", "special": "tensor?", "spans": "anything?",
            "text": "texts?-text,empty_text", "merge": "flag",
        },
    ),
    Public(
        "attention_page", looked, lambda: {"relevance": torch.rand(1, 5, 5)},
        {
            "layer_maps": "anything", "relevance": "tensor?", "tokens": "tokens",
            "example": "index", "row": "index?", "asking": "texts?",
            "title": "texts-text,empty_text", "max_megabytes": "length",
        },
    ),
    Public(
        "attention_page of a picture", looked, lambda: {"images": torch.rand(3, 8, 8)},
        {"images": "tensor", "grid": "pair?", "relevance": "tensor?"},
    ),
    Public("AttentionPage.save", lambda path: looked().save(path), dict, {"path": "path"}),
    Public("Picture", v.Picture, lambda: {"alt": "a"},
           {"alt": "texts-text,empty_text,empty_list,nones", "figsize": "pair?-half"}),
    Public("Picture.save", saved, lambda: {"path": "/tmp/never.txt"}, {"path": "path"}),
    Public("Picture.png", saved, lambda: {"dpi": 20}, {"dpi": "length"}),
]  # fmt: skip
