"""The command line: every option with every word that is none of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from captum_attn.cli.app import TRACEBACK, run
from captum_attn.errors import OptionError
from tests.fuzz.public import Public

FOLDER = Path(tempfile.mkdtemp(prefix="captum_attn_fuzz_"))
PICTURE = FOLDER / "a.png"
Image.new("RGB", (32, 32)).save(PICTURE)


def folder(name: str, config: bytes, weights: bytes = b"x") -> None:
    (FOLDER / name).mkdir()
    (FOLDER / name / "config.json").write_bytes(config)
    (FOLDER / name / "pytorch_model.bin").write_bytes(weights)


BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
TIMM = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"num_classes": 3}}
CONFIGS: dict[str, Any] = {
    "no_json": b"{", "null": b"null", "a_list": b"[]", "not_utf8": b"\xff", "deep": b"[" * 99_999,
    "empty": b"", "no_kind": {}, "no_weights": BERT, "no_timm_weights": TIMM,
    "timm_list": TIMM | {"architecture": ["x"]}, "timm_cfg": TIMM | {"pretrained_cfg": 3},
    "timm_args": TIMM | {"model_args": {"depth": "x"}}, "kind_list": BERT | {"model_type": []},
    "made_of_3": BERT | {"architectures": 3}, "hidden": BERT | {"hidden_size": "x"},
    "another_hub": TIMM | {"architecture": "hf-hub:a/b"},
    "wide": BERT | {"hidden_size": -1},
}  # fmt: skip
for name, config in CONFIGS.items():
    folder(name, config if isinstance(config, bytes) else json.dumps(config).encode())


def command(name: str, *first: str) -> Any:
    """A command as a function of its options; `_` is its argument."""

    def call(**options: str) -> int:
        said = io.StringIO()
        given = [part for key, value in options.items() if key != "_" for part in
                 (f"--{key.replace('_', '-')}", value)]  # fmt: skip
        words = [name, *first, *given, *([options["_"]] if "_" in options else [])]
        before = os.environ.get(TRACEBACK)
        os.environ[TRACEBACK] = "1"
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = run(words)
        finally:
            os.environ.pop(TRACEBACK)
            if before is not None:
                os.environ[TRACEBACK] = before
        lines = [line for line in said.getvalue().splitlines() if line.startswith("captum-attn: ")]
        if code == 2 and len(lines) == 1:
            raise OptionError(lines[0])
        assert code == 0 and not lines, (code, said.getvalue())
        return code

    return call


def evaluated() -> Mapping[str, str]:
    out = FOLDER / "out"
    shutil.rmtree(out, ignore_errors=True)
    return {
        "model": "digit-vit", "limit": "1", "out": str(out), "methods": "RawAttention",
        "metrics": "energy_inside",
    }  # fmt: skip


MODELS = "model"
PUBLIC = [
    Public(
        "captum-attn evaluate", command("evaluate"), evaluated,
        {
            "model": MODELS, "methods": "methods", "metrics": "metrics", "perturbation": "options",
            "target": "class-minus_one,empty", "limit": "whole_word", "seed": "whole_word-zero",
            "batch_size": "whole_word", "device": "device", "data": "place", "masks": "place",
            "out": "out_folder",
        },
        {"model": "|", "data": "|", "masks": "|", "methods": "|", "metrics": "|", "out": "out|",
         "target": "target",
         "batch_size": "batch"},
    ),
    Public(
        "captum-attn explain-image", command("explain-image"),
        lambda: {"_": str(PICTURE), "model": "digit-vit", "out": str(FOLDER / "x.png")},
        {"_": "place", "model": MODELS, "method": "methods", "target": "class", "out": "out_file",
         "device": "device"},
        {"_": "|", "model": "|", "out": "out|"},
    ),
    Public(
        "captum-attn explain-text", command("explain-text"),
        lambda: {"_": "a goal", "model": "topics"},
        {"_": "no_text", "model": MODELS, "method": "methods-integrated", "target": "class",
         "top": "whole_word-digits",
         "labels": "labels", "out": "out_file", "device": "device"},
        {"_": "|", "model": "|", "out": "out|", "labels": "|"},
    ),
    Public("captum-attn dashboard", command("dashboard"), dict,
           {"models": "labels", "port": "whole_word"}, {"models": "|"}),
]  # fmt: skip
