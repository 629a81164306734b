"""The detector's tab: its boxes, and the map of the chosen one."""

from __future__ import annotations

import pytest
import torch

from captum_attn import AttnLRP, GenericAttention, GradEclip, Odam, VitCX
from captum_attn.detection import explain_detections
from captum_attn.errors import InputError, OptionError
from captum_attn.insights import Batch, ImageFeature, TextFeature
from captum_attn.insights.detected import DetectionSession
from captum_attn.insights.toys import detector
from tests.insights.models import TinyDetector, images, made


def session(**options) -> DetectionSession:
    photo = ImageFeature("Photo", input_transforms=[lambda x: 2 * x - 1])
    asked = {"activation": "sigmoid", "threshold": 0.0, **options}
    return DetectionSession(made(TinyDetector), photo, [Batch(images(2))], **asked)


def test_a_map_is_that_of_explain_detections():
    tab = session(id2label={0: "cat", 1: "dog"})
    example = tab.examples[0]
    found = tab.detect("TinyDetector", example)
    assert len(found) == 3 and set(found.names) <= {"cat", "dog"} and not found.maps.any()
    query = int(found.queries[1])
    for method in (GenericAttention, AttnLRP, Odam):
        why = tab.explain("TinyDetector", example, query, method.get_name())
        (expected,) = explain_detections(
            method(tab.models["TinyDetector"]), 2 * example.inputs[0] - 1, queries=[query],
            activation="sigmoid",
        )  # fmt: skip
        torch.testing.assert_close(why.maps, expected.maps)
        assert why.maps.any()
        torch.testing.assert_close(why.boxes, found.boxes[1:2])


def test_what_has_no_meaning_for_a_detection_is_not_offered():
    offered = set(session().methods.values())
    assert Odam in offered and not offered & {GradEclip, VitCX}


def test_nothing_above_the_threshold_is_no_error():
    tab = session()
    assert len(tab.detect("TinyDetector", tab.examples[0], threshold=1.0)) == 0


def test_what_is_no_picture_is_refused():
    words = TextFeature("Text", None, None, list)
    with pytest.raises(InputError, match="feature: expected one ImageFeature"):
        DetectionSession(made(TinyDetector), words, [Batch(torch.ones(1, 3).long())])
    with pytest.raises(OptionError, match="threshold: .* got 2"):
        session(threshold=2)


def test_the_packages_own_detector_finds_both_digits():
    tab = detector()
    found = tab.detect("digit DETR", tab.examples[0])
    assert {f"a {name[-1]}" for name in found.names} == set(tab.examples[0].name.split(" and "))
