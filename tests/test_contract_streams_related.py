"""The contract table of several streams, for the methods that the papers compare with."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_attn import (
    AttCAT,
    AttentionFlow,
    AttentionGradCam,
    BeyondIntuition,
    DeepIntegratedExplanations,
    GradEclip,
    GradSam,
    Odam,
    TransformerInputSampling,
    TransitionAttention,
    VitCX,
)
from captum_attn.errors import AttnError
from tests.conftest import pairs
from tests.test_contract import close
from tests.test_contract_streams import asked, single
from tests.zoo_streams import CASES, STREAMS

METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "gradcam": (AttentionGradCam, {}),
    "gradsam": (GradSam, {}),
    "attcat": (AttCAT, {}),
    "bi_head": (BeyondIntuition, {"n_steps": 2, "baselines": 0.5}),
    "bi_token": (BeyondIntuition, {"n_steps": 2, "baselines": 0.5, "perception": "token"}),
    "tam": (TransitionAttention, {"n_steps": 2, "baselines": 0.5}),
    "dix": (DeepIntegratedExplanations, {"n_steps": 2}),
    "flow": (AttentionFlow, {}),
    "eclip": (GradEclip, {}),
    "odam": (Odam, {}),
    "tis": (TransformerInputSampling, {"perturbations_per_eval": 64}),
}
DETECTORS = {"detr", "detr_six_layers", "conditional_detr", "table_transformer", "yolos"}
IN_ONE_SEQUENCE = {"llava_right", "llava_left", "llava_next", "idefics3", "idefics3_one_image"}
ONE_STREAM = {"visualbert", "vilt", "vilt_retrieval", "yolos"}
# What the method has no meaning for, and what its error says.
REFUSED = {
    "odam": (set(STREAMS) - DETECTORS, "meant for detectors"),
    "tis": (
        set(STREAMS) - DETECTORS - ONE_STREAM | {"vilt_retrieval"},
        "one stream of tokens|always 1",
    ),
    "eclip": (set(STREAMS) - ONE_STREAM - {"clip"} - IN_ONE_SEQUENCE, "meant for the two towers"),
    # its tokens are no tensor (B, n, D) that a module is given
    **{
        method: ({"perceiver_text"}, "scaled along a path")
        for method in ("bi_head", "bi_token", "tam")
    },
}
# Grad-CAM and raw attention show the decoder, which reads latents, and none of the inputs.
SHOWS_NOTHING = {("perceiver_text", "gradcam")}


@cache
def explainer(name: str, method: str) -> Any:
    return METHODS[method][0](STREAMS[name].model())


def tokens_of(name: str, method: str, **arguments: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return explainer(name, method).attribute_tokens(**arguments, **METHODS[method][1])


@cache
def explained(name: str, method: str) -> dict[str, Tensor]:
    case = STREAMS[name]
    return tokens_of(name, method, **asked(case, case.sample()))


def skip_refused(name: str, method: str) -> None:
    names, said = REFUSED.get(method, (set(), ""))
    if name in names:
        with pytest.raises(AttnError, match=said):
            explained(name, method)
        pytest.skip("refused, as it should be")


@pairs(STREAMS, METHODS)
def test_batch_equals_one_by_one(name: str, method: str) -> None:
    skip_refused(name, method)
    case, tokens = STREAMS[name], explained(name, method)
    sample = case.sample()
    assert {stream: values.shape for stream, values in tokens.items()} == {
        stream: (3, n) for stream, n in case.streams.items()
    }
    found = any(bool(values.any()) for values in tokens.values())
    assert found == ((name, method) not in SHOWS_NOTHING)
    for stream, real in (sample.real or {}).items():
        assert (tokens[stream][~real] == 0).all()
    _, arguments = single(case, sample, 1)
    alone = tokens_of(name, method, **arguments)
    for stream, values in tokens.items():
        assert values.isfinite().all()
        scale = float(values.abs().max()) or 1.0
        close(alone[stream] / scale, values[1:2] / scale, 1e-4)


@pairs([case.name for case in CASES if case.padded and case.alone], METHODS)
def test_padding_changes_nothing(name: str, method: str) -> None:
    skip_refused(name, method)
    case, tokens = STREAMS[name], explained(name, method)
    sample = case.sample()
    assert sample.real is not None
    trimmed, target = case.collate(case.raw()[1:2]), case.target_of(sample)
    if isinstance(target, list):  # the same token, at its place in the shorter text
        target = [(case.target_of(trimmed)[0][0], target[1][1])]
    given = {"inputs": trimmed.inputs, "target": target, "objective": case.objective}
    alone = tokens_of(name, method, **given)
    for stream, values in tokens.items():
        real, scale = sample.real.get(stream), float(values.abs().max()) or 1.0
        found = values[1] if real is None else values[1][real[1]]
        close(found / scale, alone[stream][0] / scale, 1e-4)


@pytest.mark.parametrize("name", ["clip", "detr", "yolos"])
def test_vit_cx_of_the_image_of_several_streams(name: str) -> None:
    """The other inputs are as they are; a batch is as its examples alone.

    In float64: pixels that the masks hardly cover are a quotient of two numbers near 0.
    """
    case = STREAMS[name]
    sample, explain = case.sample().to(torch.float64), VitCX(case.fresh().double())
    options = {"threshold": 0.6, "perturbations_per_eval": 1}
    if name == "clip":  # a row of the scores is of all texts: one example at a time
        sample = sample.one(1)
    together = explain.attribute(**asked(case, sample), **options)["pixel_values"]
    assert together.isfinite().all() and together.any()
    if name != "clip":
        _, arguments = single(case, sample, 1)
        alone = explain.attribute(**arguments, **options)["pixel_values"]
        scale = float(together.abs().max())
        close(alone / scale, together[1:2] / scale, 1e-4)
