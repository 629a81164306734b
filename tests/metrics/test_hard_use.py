"""No raw error and no number that is none, whatever is passed to a public metric function."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_attn import metrics
from captum_attn.errors import AttnError, InputError, OptionError, TargetError
from tests.metrics import hard

CALLS, WRONG = hard.calls(), hard.wrong_values()


def test_every_public_function_is_called() -> None:
    made = {"Blur", "Constant", "Curve", "DetectedQueries", "Fill", "Hide", "Mean", "NoisyLinear",
            "Remove", "ParameterRandomization", "Segmentation", "Spans", "TO_90",
            "TO_100"}  # fmt: skip
    assert set(CALLS) == set(metrics.__all__) - made


@pytest.mark.parametrize("name", CALLS)
def test_the_right_call_is_right(name: str) -> None:
    function, arguments = CALLS[name]
    assert hard.outcome(lambda: function(**arguments)) == ("fine", hard.outcome(
        lambda: function(**arguments))[1])  # fmt: skip


@pytest.mark.parametrize("name", [n for n in CALLS if n != "segment_detections"])  # it makes some
def test_a_default_device_changes_nothing(name: str) -> None:
    """On "meta" every tensor of the package's that names no device would have no numbers."""
    function, arguments = CALLS[name]

    def elsewhere() -> Any:
        with torch.device("meta"):
            return function(**arguments)

    assert hard.outcome(elsewhere) == hard.outcome(lambda: function(**arguments))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(data=st.data())
def test_wrong_values_are_refused(data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(CALLS)))
    function, arguments = CALLS[name]
    names = st.sampled_from(hard.arguments_of(function, arguments))
    chosen = data.draw(st.lists(names, min_size=1, max_size=3, unique=True))
    labels = {argument: data.draw(st.sampled_from(sorted(WRONG))) for argument in chosen}
    wrong = {argument: WRONG[label] for argument, label in labels.items()}
    kind, text = hard.outcome(lambda: function(**{**arguments, **wrong}))
    assert kind in ("fine", "refused", "model"), (name, labels, kind, text)


@pytest.mark.slow
def test_every_wrong_value_of_every_argument() -> None:
    found = [(*case, kind, text) for *case, kind, text in hard.tried()]
    bad = [case for case in found if case[3] in ("raw", "nan")]
    assert not bad, bad[:10]
    assert Counter(kind for *_, kind, _ in found)["refused"] > 10_000


# ------------------------------------------------------------------ a NaN is never a number
NAN = float("nan")


@pytest.mark.parametrize("measure", ["accuracy", "sigmoid_accuracy", "probability", "logit"])
@pytest.mark.parametrize("target", [0, 1, None])
def test_outputs_that_are_nan(measure: str, target: int | None) -> None:
    def broken(images: torch.Tensor) -> torch.Tensor:
        return hard.Pixels()(images) * NAN

    with pytest.raises(InputError, match="output has NaN"):
        metrics.perturbation_auc(
            broken, torch.ones(2, 3, 4, 4), hard.maps(), target, measure=measure
        )  # fmt: skip


def test_one_nan_among_the_classes_is_enough() -> None:
    def broken(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[NAN, 5.0]]).expand(len(images), -1)

    with pytest.raises(InputError, match="output has NaN"):
        metrics.perturbation_auc(broken, torch.ones(2, 3, 4, 4), hard.maps(), 1)


def test_logits_of_a_detector_that_are_nan() -> None:
    logits = torch.randn(4, 3)
    logits[2, 1] = NAN
    for no_object in (True, False):
        with pytest.raises(InputError, match="query 2 has NaN"):
            metrics.detections(logits, no_object=no_object)
    with pytest.raises(InputError, match="query 2 has NaN"):
        metrics.segment_detections(logits, lambda q, c: hard.maps()[0, 0], (8, 8))


def test_marks_and_masks_that_are_nan() -> None:
    masks, scores = torch.full((2, 4, 4), NAN), torch.rand(2, 5)
    for measure in (metrics.segmentation, metrics.pointing_game, metrics.energy_inside,
                    metrics.relevance_rank, metrics.top_k_intersection):  # fmt: skip
        with pytest.raises(InputError, match="masks: expected finite marks"):
            measure(hard.maps(), masks)
    marked, half = torch.eye(2, 5), torch.ones(2, 5)
    half[0, 0] = NAN
    for rationale in (metrics.rationale_f1, metrics.rationale_auprc, metrics.rationale_iou_f1):
        with pytest.raises(InputError, match="rationales: expected finite"):
            rationale(scores, marked * NAN)
        with pytest.raises(InputError, match="mask: expected finite"):
            rationale(scores, marked, half)
    with pytest.raises(InputError, match="attention mask 'attention_mask': expected finite"):
        metrics.comprehensiveness(
            hard.Words(), hard.IDS | {"attention_mask": half}, {"input_ids": scores}, 0
        )  # fmt: skip
    with pytest.raises(OptionError, match="steps"):
        metrics.aopc(**hard.IMAGES, attributions=hard.maps(), steps=[0.0, NAN])


def test_masks_of_black_and_white_pictures() -> None:
    marked = hard.marked()
    for measure in (metrics.segmentation, metrics.energy_inside, metrics.relevance_rank):
        plain, picture = (measure(hard.maps(), m) for m in (marked, marked * 255))
        assert all(
            torch.equal(a, b)
            for a, b in zip(hard.numbers(plain), hard.numbers(picture), strict=True)
        )
    void = marked.clone()
    void[0, 0, 0] = 255  # 0, 1 and 255: is it the object, or what does not count?
    with pytest.raises(InputError, match="255 among them"):
        metrics.pointing_game(hard.maps(), void)


def test_a_mask_that_is_added_to_the_scores_is_no_attention_mask() -> None:
    added = {**hard.IDS, "attention_mask": torch.tensor([[0.0, 0, 0, -1e9, -1e9]] * 2)}
    with pytest.raises(InputError, match="expected 1 for tokens"):
        metrics.sufficiency(hard.Words(), added, {"input_ids": torch.rand(2, 5)}, 0)


# ------------------------------------------------------------------ what the error says
def test_a_multi_hot_target_is_told_what_to_pass() -> None:
    for target in (torch.eye(2), torch.eye(2).long(), torch.eye(2).bool()):
        with pytest.raises(TargetError, match="repeat the example for each of its classes"):
            metrics.aopc(hard.Pixels(), torch.ones(2, 3, 4, 4), hard.maps(), target)

    def mean_of_present(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * target).sum(1) / target.sum(1)

    several = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = metrics.aopc(
        hard.Pixels(), torch.ones(2, 3, 4, 4), hard.maps(), several, measure=mean_of_present
    )  # fmt: skip
    each = metrics.aopc(
        hard.Pixels(), torch.ones(2, 3, 4, 4), hard.maps(), [0, 1], measure="logit"
    )  # fmt: skip
    torch.testing.assert_close(found, each)


def test_a_misspelt_option_is_named() -> None:
    for measure in (metrics.aopc, metrics.saco, metrics.abpc, metrics.sufficiency):
        with pytest.raises(OptionError, match="no option 'pathc_size': expected some of .*patch"):
            measure(**hard.IMAGES, attributions=hard.maps(), pathc_size=2)
    with pytest.raises(OptionError, match="abpc removes"):
        metrics.abpc(**hard.IMAGES, attributions=hard.maps(), order="least")
    with pytest.raises(OptionError, match="insertion inserts anyway"):
        metrics.insertion(**hard.IMAGES, attributions=hard.maps(), insert=True)
    assert issubclass(OptionError, AttnError)
