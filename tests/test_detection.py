"""The detection helper against the models' own post-processing and one `attribute` per query."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from captum.attr import InputXGradient, Occlusion
from torch import Tensor, nn

from captum_attn import (
    AttentionRollout,
    AttnLRP,
    GenericAttention,
    HeterogenousAttention,
    RawAttention,
    TransformerLRP,
    objectives,
)
from captum_attn.detection import Detections, explain_detections, explain_missed
from captum_attn.errors import AttnError, InputError, OptionError, TargetError
from tests.plain import close
from tests.zoo import set_weights

METHODS = [RawAttention, AttentionRollout, GenericAttention, HeterogenousAttention]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
NAMES = {0: "cat", 1: "dog", 2: "owl", 3: "fox", 4: "elk"}
SOFTMAX, SIGMOID = ("Detr", "TableTransformer", "Yolos"), ("ConditionalDetr",)
every_model = pytest.mark.parametrize("name", SOFTMAX + SIGMOID)


@cache
def detector(name: str) -> nn.Module:
    """A tiny detector of 6 queries and 5 classes, in float64."""
    if name == "Yolos":
        settings: dict[str, Any] = {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
            "intermediate_size": 32, "image_size": [32, 48], "num_detection_tokens": 6,
        }  # fmt: skip
    else:
        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
            out_features=["stage2"],
        )  # fmt: skip
        settings = {
            "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
            "backbone_config": backbone, "num_queries": 6, "d_model": 24,
            "encoder_layers": 2, "encoder_ffn_dim": 32, "encoder_attention_heads": 4,
            "decoder_layers": 2, "decoder_ffn_dim": 32, "decoder_attention_heads": 4,
        }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**settings, id2label=NAMES)
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    set_weights(model)
    return model.eval().double()


def images(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 3, 32, 48, generator=generator, dtype=torch.float64)


def output_of(model: nn.Module, *inputs: Any, **named: Any) -> Any:
    with torch.no_grad():
        return model(*inputs, **named)


def scores_of(name: str, output: Any) -> Tensor:
    """(B, Q), the probability of each query's likeliest class."""
    if name in SIGMOID:
        return output.logits.sigmoid().amax(-1)
    return output.logits.softmax(-1)[..., :-1].amax(-1)


def uneven(name: str) -> float:
    """A threshold that keeps different numbers of queries in two images, of each at least one."""
    scores = scores_of(name, output_of(detector(name), images()))
    for level in sorted(scores.flatten().tolist()):
        one, two = (scores > level).sum(1).tolist()
        if one != two and min(one, two) > 0:
            return level
    raise AssertionError(scores)


# ------------------------------------------------------------------ what is detected
@every_model
def test_detections_are_the_model_s_own(name: str) -> None:
    """As transformers' post-processing gives them, which may list a query under two labels."""
    model, level = detector(name), uneven(name)
    sizes = torch.tensor([[64, 96], [100, 30]])
    found = explain_detections(RawAttention(model), images(), threshold=level, target_sizes=sizes)
    processor = getattr(
        transformers, {"TableTransformer": "Detr"}.get(name, name) + "ImageProcessor"
    )()
    output = output_of(model, images())
    theirs = processor.post_process_object_detection(output, level, target_sizes=sizes)
    assert len(found[0]) != len(found[1])
    for own, their in zip(found, theirs, strict=True):
        best: dict[tuple, tuple] = {}
        rows = zip(their["boxes"], their["scores"], their["labels"], strict=True)
        for box, score, label in sorted(rows, key=lambda row: float(row[1])):
            best[tuple(box.tolist())] = (float(score), int(label))
        order = sorted(best.items(), key=lambda item: -item[1][0])
        torch.testing.assert_close(own.boxes, torch.tensor([b for b, _ in order]).double())
        torch.testing.assert_close(own.scores, torch.tensor([s for _, (s, _) in order]).double())
        assert own.labels.tolist() == [label for _, (_, label) in order]
        assert own.names == [NAMES[label] for label in own.labels.tolist()]
        assert not own.boxes.requires_grad and not own.scores.requires_grad
    assert [own.maps.shape[1:] for own in found] == [(64, 96), (100, 30)]


def test_boxes_without_target_sizes_are_those_of_the_input() -> None:
    model = detector("Detr")
    (found,) = explain_detections(RawAttention(model), images(1), threshold=0)
    boxes = output_of(model, images(1)).pred_boxes[0, found.queries]
    x, y, w, h = boxes.unbind(-1)
    corners = torch.stack([48 * (x - w / 2), 32 * (y - h / 2), 48 * (x + w / 2), 32 * (y + h / 2)])
    torch.testing.assert_close(found.boxes, corners.T)
    assert len(found) == 6 and found.maps.shape == (6, 32, 48)
    assert (found.scores.diff() <= 0).all()


def test_limits() -> None:
    model = detector("Detr")
    method = RawAttention(model)
    every = explain_detections(method, images(), threshold=0)
    two = explain_detections(method, images(), threshold=0, max_detections=2)
    for all_, some in zip(every, two, strict=True):
        assert torch.equal(some.queries, all_.queries[:2]) and torch.equal(some.maps, all_.maps[:2])
    level = float(every[0].scores[2])  # a detection is above the threshold, not at it
    assert len(explain_detections(method, images(), threshold=level)[0]) == 2


# ------------------------------------------------------------------ what explains it
@every_method
@every_model
def test_each_detection_is_explained_as_by_a_call_of_its_own(name: str, method: type) -> None:
    """As with all images' j-th (query, class), and as alone, to the last digits."""
    model, batch = detector(name), images()
    explain = method(model)
    found = explain_detections(explain, batch, threshold=uneven(name))
    assert len(found[0]) != len(found[1])
    for j in range(max(map(len, found))):
        targets = [
            (int(own.queries[i]), int(own.labels[i]))
            for own in found
            for i in [j if j < len(own) else 0]
        ]
        laid = explain.attribute(batch, target=targets).sum(1)
        tokens = explain.attribute_tokens(batch, target=targets)
        for b, own in enumerate(found):
            if j < len(own):
                close(own.maps[j], laid[b])
                assert set(own.tokens) == set(tokens)
                for stream, rows in tokens.items():
                    close(own.tokens[stream][j], rows[b])
                alone = explain.attribute(batch[b : b + 1], target=targets[b]).sum(1)[0]
                close(own.maps[j], alone)
    if method is GenericAttention:
        assert not torch.equal(found[0].maps[0], found[1].maps[0])


@every_model
def test_the_grid_is_what_nearest_interpolation_shows(name: str) -> None:
    """Feature cells and patches of 8 x 8 pixels."""
    explain = GenericAttention(detector(name))
    (found,) = explain_detections(explain, images(1), threshold=0, interpolation="nearest")
    assert found.grid is not None and found.grid.shape == (len(found), 4, 6)
    laid = found.grid.repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(found.maps, laid)
    target = int(found.queries[0]), int(found.labels[0])
    nearest = explain.attribute(images(1), target=target, interpolation="nearest")
    close(found.maps[0], nearest.sum(1)[0])


def test_a_method_of_pixels_has_maps_and_no_tokens() -> None:
    model, batch = detector("Detr"), images()
    (found, _) = explain_detections(AttnLRP(model), batch, threshold=0, max_detections=1)
    assert found.tokens == {} and found.grid is None
    target = (int(found.queries[0]), int(found.labels[0]))
    close(found.maps[0], AttnLRP(model).attribute(batch[:1], target=target).sum(1)[0])


def test_one_forward_and_shared_backward_passes() -> None:
    model, count = detector("Detr"), {"forward": 0, "backward": 0}

    def run(pixel_values: Tensor) -> Any:
        output = model(pixel_values)
        count["forward"] += 1
        if output.logits.requires_grad:
            output.logits.register_hook(lambda g: count.update(backward=count["backward"] + 1))
        return output

    explain = GenericAttention(run)
    explain.attribute(images(), target=(0, 0))  # the first call also observes the readout
    count.update(forward=0, backward=0)
    found = explain_detections(explain, images(), threshold=uneven("Detr"))
    assert count == {"forward": 1, "backward": max(map(len, found))}
    assert max(map(len, found)) < sum(map(len, found))


@pytest.mark.parametrize("kind", [AttnLRP, TransformerLRP])
def test_relevance_of_pixels_needs_no_tokens(kind: type) -> None:
    explain = kind(detector("Detr"))
    (found,) = explain_detections(explain, images(1), queries=[4, 1])
    assert found.tokens == {} and found.grid is None
    for query, label, laid in zip([4, 1], found.labels.tolist(), found.maps, strict=True):
        close(laid, explain.attribute(images(1), target=(query, label)).sum(1)[0])


def test_options_reach_the_method() -> None:
    model = detector("Detr")
    explain = HeterogenousAttention(model, layers="model.decoder.*")
    why = objectives.probability
    options = {"objective": why, "start_layer": 1, "correction": "full"}
    (found,) = explain_detections(explain, images(1), queries=[4], **options)
    alone = explain.attribute(images(1), target=(4, int(found.labels[0])), **options)
    close(found.maps[0], alone.sum(1)[0])
    assert (found.maps < 0).any()
    with pytest.raises(OptionError, match="unknown option 'power'"):
        explain_detections(explain, images(1), power=2)


@pytest.mark.parametrize("given", [[4, 1], [[4, 1], [0]], torch.tensor([[4, 1], [0, 3]])])
def test_given_queries(given: Any) -> None:
    model = detector("Detr")
    found = explain_detections(GenericAttention(model), images(), queries=given, threshold=1.0)
    rows = [given, given] if given == [4, 1] else [list(map(int, row)) for row in given]
    assert [own.queries.tolist() for own in found] == rows
    logits = output_of(model, images()).logits
    for b, own in enumerate(found):
        for j, query in enumerate(rows[b]):
            label = int(logits[b, query, :-1].argmax())
            assert int(own.labels[j]) == label
            alone = GenericAttention(model).attribute(images()[b : b + 1], target=(query, label))
            torch.testing.assert_close(own.maps[j], alone.sum(1)[0], atol=1e-12, rtol=1e-9)


# ------------------------------------------------------------------ nothing found
def test_nothing_above_the_threshold_is_an_empty_result() -> None:
    found = explain_detections(
        GenericAttention(detector("Detr")), images(), threshold=1.0, target_sizes=[(8, 9), (5, 6)]
    )
    assert [len(own) for own in found] == [0, 0]
    for own, size in zip(found, [(8, 9), (5, 6)], strict=True):
        assert own.boxes.shape == (0, 4) and own.maps.shape == (0, *size)
        assert own.labels.shape == own.scores.shape == own.queries.shape == (0,)
        assert own.names == [] and own.tokens == {} and own.grid is None


def test_nothing_in_one_of_two_images() -> None:
    model = detector("Detr")
    scores = scores_of("Detr", output_of(model, images()))
    level = float(scores.amax(1).min())
    found = explain_detections(GenericAttention(model), images(), threshold=level)
    assert sorted(len(own) == 0 for own in found) == [False, True]
    (own,) = [own for own in found if len(own)]
    b = found.index(own)
    target = int(own.queries[0]), int(own.labels[0])
    alone = GenericAttention(model).attribute(images()[b : b + 1], target=target).sum(1)[0]
    torch.testing.assert_close(own.maps[0], alone, atol=1e-12, rtol=1e-9)


# ------------------------------------------------------------------ sizes
def padded() -> dict[str, Tensor]:
    """The second image is 24 x 32, padded to 32 x 48."""
    mask = torch.zeros(2, 32, 48, dtype=torch.long)
    mask[0], mask[1, :24, :32] = 1, 1
    return {"pixel_values": images() * mask[:, None], "pixel_mask": mask}


@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr"])
def test_padding_is_cut_off(name: str) -> None:
    model, inputs = detector(name), padded()
    explain = GenericAttention(model)
    found = explain_detections(explain, inputs, queries=[2])
    boxes = output_of(model, **inputs).pred_boxes[:, 2]
    for b, (height, width) in enumerate([(32, 48), (24, 32)]):
        centre, extent = boxes[b, :2], boxes[b, 2:]
        corners = torch.cat([centre - extent / 2, centre + extent / 2])
        scale = torch.tensor([width, height, width, height])
        torch.testing.assert_close(found[b].boxes[0], corners * scale)
        target = [(2, int(own.labels[0])) for own in found]
        laid = explain.attribute(inputs, target=target)["pixel_values"].sum(1)[b]
        close(found[b].maps[0], laid[:height, :width])


def test_target_sizes_scale_maps_without_their_padding() -> None:
    explain, inputs = GenericAttention(detector("Detr")), padded()
    small = explain_detections(explain, inputs, queries=[2])
    large = explain_detections(explain, inputs, queries=[2], target_sizes=[(64, 96), (48, 64)])
    for one, two in zip(small, large, strict=True):
        torch.testing.assert_close(two.boxes, 2 * one.boxes)
        scaled = F.interpolate(one.maps[None], scale_factor=2.0, mode="bilinear")[0]
        torch.testing.assert_close(two.maps, scaled)


@pytest.mark.parametrize("place", [(0, 0), (31, 47)])
def test_a_mask_that_is_no_rectangle_is_refused(place: tuple[int, int]) -> None:
    inputs = padded()
    inputs["pixel_mask"][1][place] ^= 1
    with pytest.raises(InputError, match="pixel_mask"):
        explain_detections(GenericAttention(detector("Detr")), inputs)


# ------------------------------------------------------------------ other detectors, other methods
def as_dict(output: Any) -> dict[str, Tensor]:
    return {"logits": output.logits, "pred_boxes": output.pred_boxes}


def as_tuple(output: Any) -> tuple[Tensor, Tensor]:
    return output.logits, output.pred_boxes


@pytest.mark.parametrize("form", [as_dict, as_tuple])
def test_a_callable_that_returns_logits_and_boxes(form: Callable) -> None:
    model = detector("Detr")
    expected = explain_detections(GenericAttention(model), images(), threshold=0.3)

    def run(pixels: Tensor) -> Any:
        return form(model(pixels))

    found = explain_detections(GenericAttention(run), images(), threshold=0.3)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own.maps, other.maps) and torch.equal(own.boxes, other.boxes)
        assert own.names == other.names


@pytest.mark.parametrize("mapping", [True, False])
def test_methods_of_captum(mapping: bool) -> None:
    """With a mask beside the images, and Occlusion's batches of several perturbations."""
    model = detector("Detr").float()
    try:
        inputs: Any = padded() if mapping else images().float()
        if mapping:
            inputs["pixel_values"] = inputs["pixel_values"].float()
        pixels = inputs["pixel_values"] if mapping else inputs
        mask = (inputs["pixel_mask"],) if mapping else None

        def logits(pixels: Tensor, *mask: Tensor) -> Tensor:
            return model(pixels, *mask).logits

        found = explain_detections(InputXGradient(model), inputs, queries=[3, 1])
        targets = [(3, int(own.labels[0])) for own in found]
        direct = InputXGradient(logits).attribute(pixels, targets, additional_forward_args=mask)
        for b, own in enumerate(found):
            h, w = own.maps.shape[1:]
            torch.testing.assert_close(own.maps[0], direct.sum(1)[b, :h, :w].detach())
            assert own.tokens == {} and own.grid is None and not own.maps.requires_grad
        window = {"sliding_window_shapes": (3, 16, 16), "strides": (3, 16, 16)}
        found = explain_detections(
            Occlusion(model), inputs, queries=[3], perturbations_per_eval=2, **window
        )
        direct = Occlusion(logits).attribute(
            pixels, target=targets, additional_forward_args=mask, **window
        )
        for b, own in enumerate(found):
            h, w = own.maps.shape[1:]
            torch.testing.assert_close(own.maps[0], direct.sum(1)[b, :h, :w])
    finally:
        model.double()


@pytest.mark.parametrize("method", [GenericAttention, InputXGradient])
def test_progress(method: type, capsys: pytest.CaptureFixture) -> None:
    explain = method(detector("Detr"))
    explain_detections(explain, images(), queries=[3, 1], show_progress=True)
    text = capsys.readouterr().err
    assert f"{explain.get_name()} attribution" in text and "2/2" in text
    explain_detections(explain, images(), queries=[3, 1])
    assert not capsys.readouterr().err


# ------------------------------------------------------------------ softmax or sigmoid
class Fixed(nn.Module):
    """One attention over the pixels and `width` logits for each of 3 queries."""

    def __init__(self, width: int, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.embed = nn.Parameter(torch.randn(1, 3, 8)), nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.classes, self.boxes = nn.Linear(8, width), nn.Linear(8, 4)
        if config:
            self.config = SimpleNamespace(**config)

    def forward(self, pixel_values: Tensor, input_ids: Tensor | None = None) -> dict[str, Tensor]:
        tokens = self.embed(pixel_values).flatten(2).mT
        rows, _ = self.attention(self.queries.expand(len(tokens), -1, -1), tokens, tokens)
        return {"logits": self.classes(rows), "pred_boxes": self.boxes(rows).sigmoid()}


def scores_under(model: nn.Module, inputs: Any = None, **options: Any) -> Tensor:
    inputs = images(1).float() if inputs is None else inputs
    (found,) = explain_detections(RawAttention(model), inputs, queries=[0, 1, 2], **options)
    return found.scores


def test_what_the_number_of_logits_says() -> None:
    pixels = images(1).float()
    for width, as_given in ((4, "softmax"), (3, "sigmoid")):
        model = Fixed(width, num_labels=3).eval()
        logits = model(pixels)["logits"][0].detach()
        likely = logits.softmax(-1)[:, :-1] if width == 4 else logits.sigmoid()
        for activation in ("auto", as_given):
            found = scores_under(model, activation=activation)
            torch.testing.assert_close(found, likely.amax(-1))


@pytest.mark.parametrize(
    ("width", "config"),
    [(4, {}), (5, {"num_labels": 3}), (3, {"num_labels": 3, "use_focal_loss": False})],
)
def test_what_cannot_be_observed_is_asked_for(width: int, config: dict) -> None:
    model = Fixed(width, **config).eval()
    with pytest.raises(OptionError, match="activation.*'softmax'.*'sigmoid'"):
        scores_under(model)
    logits = model(images(1).float())["logits"][0].detach()
    torch.testing.assert_close(scores_under(model, activation="sigmoid"), logits.sigmoid().amax(-1))


def test_classes_that_are_texts_are_not_counted_by_the_config() -> None:
    """OWL-ViT has a logit for each text and says `num_labels = 2`, whatever they are."""
    model = Fixed(3, num_labels=2).eval()
    inputs = {"pixel_values": images(1).float(), "input_ids": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(OptionError, match="activation"):
        scores_under(model, inputs)
    assert len(scores_under(model, inputs, activation="sigmoid")) == 3


def test_names() -> None:
    model = Fixed(4).eval()
    method, options = RawAttention(model), {"activation": "softmax", "queries": [0, 1]}
    (found,) = explain_detections(method, images(1).float(), **options)
    assert found.names == [str(label) for label in found.labels.tolist()]
    label = int(found.labels[0])
    (found,) = explain_detections(method, images(1).float(), id2label={label: "yak"}, **options)
    assert found.names[0] == "yak"


# ------------------------------------------------------------------ what is refused
def boxless(output: Any) -> Any:
    return output.logits


def three_numbers(output: Any) -> Any:
    return output.logits, output.pred_boxes[..., :3]


def other_queries(output: Any) -> Any:
    return output.logits, output.pred_boxes[:, :4]


def nothing(output: Any) -> Any:
    return {"logits": output.logits}


@pytest.mark.parametrize("method", [GenericAttention, InputXGradient])
@pytest.mark.parametrize("form", [boxless, three_numbers, other_queries, nothing])
def test_outputs_without_boxes(form: Callable, method: type) -> None:
    model = detector("Detr")
    with pytest.raises(InputError, match=r"logits \(2, queries, classes\) and boxes"):
        explain_detections(method(lambda x: form(model(x))), images())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.5}, InputError, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ({"threshold": -0.1}, InputError, "threshold"),
        ({"threshold": float("nan")}, InputError, "threshold"),
        ({"threshold": True}, InputError, "threshold"),
        ({"threshold": "0.5"}, InputError, "threshold"),
        ({"activation": "tanh"}, OptionError, "activation: expected one of"),
        (
            {"max_detections": 0},
            InputError,
            "max_detections: expected a whole number",
        ),
        ({"max_detections": 2.0}, InputError, "max_detections"),
        ({"queries": [6]}, TargetError, r"queries: expected numbers in \[0, 6\), got \[6\]"),
        ({"queries": [-1]}, TargetError, "queries"),
        ({"queries": [0.5]}, TargetError, "queries"),
        ({"queries": [[0], [1], [2]]}, TargetError, "queries.*each of the 2 images"),
        ({"queries": [[0], 1]}, TargetError, "queries"),
        ({"target_sizes": [(3, 4)]}, InputError, "target_sizes.*each of the 2 images"),
        ({"target_sizes": [(3, 4), (0, 4)]}, InputError, "target_sizes"),
        ({"target_sizes": [(3, 4, 5), (1, 2, 3)]}, InputError, "target_sizes"),
        ({"interpolation": "cubic"}, OptionError, "interpolation"),
    ],
)
def test_bad_settings(options: dict, error: type[AttnError], message: str) -> None:
    with pytest.raises(error, match=message):
        explain_detections(GenericAttention(detector("Detr")), images(), **options)


@pytest.mark.parametrize(
    "inputs", [torch.zeros(3, 32, 48), {"ids": torch.zeros(1, 3)}, "image", None, {}]
)
def test_inputs_without_an_image(inputs: Any) -> None:
    with pytest.raises(InputError, match=r"expected images \(B, C, H, W\)"):
        explain_detections(GenericAttention(detector("Detr")), inputs)


@pytest.mark.parametrize("head", ["classes", "boxes"])
def test_nan_in_the_output_is_no_empty_result(head: str) -> None:
    model = Fixed(4, num_labels=3).eval()
    with torch.no_grad():
        getattr(model, head).bias[1] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        explain_detections(RawAttention(model), images(1).float())


def test_half_precision_keeps_its_boxes() -> None:
    """In bfloat16 a box of 1,000 pixels would be known to 4 pixels only."""
    model = Fixed(4, num_labels=3).eval().bfloat16()
    options: dict[str, Any] = {"queries": [0], "target_sizes": [(1000, 1000)]}
    (found,) = explain_detections(RawAttention(model), images(1).bfloat16(), **options)
    box = model(images(1).bfloat16())["pred_boxes"][0, 0].float()
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    torch.testing.assert_close(found.boxes[0, :2], 1000 * (box[:2] - box[2:] / 2))


def test_the_model_is_left_as_found(left_as_found: Callable) -> None:
    model = detector("Detr")
    with left_as_found(model, images()):
        found = explain_detections(GenericAttention(model), images(), threshold=0.3)
    assert all(isinstance(own, Detections) for own in found)


# ------------------------------------------------------------------ what was missed
class Placed(nn.Module):
    """Queries at known places with known scores; what they see goes through one attention."""

    BOXES = ((0.25, 0.5, 0.5, 1.0), (0.25, 0.5, 0.5, 0.5), (0.9, 0.9, 0.2, 0.2))  # centre, size
    SCORES = ((0.7, 0.2), (0.1, 0.3), (0.2, 0.75))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        patches = F.unfold(pixels, 8, stride=8).mT  # (B, 6, 192)
        queries = patches.new_ones(len(pixels), 3, 192).cumsum(1) / 192
        seen = F.scaled_dot_product_attention(queries, patches, patches).mean(-1, keepdim=True)
        logits = torch.tensor(self.SCORES).to(seen).logit() + 1e-4 * seen
        boxes = torch.tensor([self.BOXES]).to(seen).expand(len(pixels), 3, 4)
        return {"logits": logits, "pred_boxes": boxes}


def test_the_query_that_came_nearest_to_a_missed_object() -> None:
    """A 32 x 48 image, its left half missed: the first query fills it, the second half of that."""
    explain, image = GenericAttention(Placed()), images(1)
    options: dict[str, Any] = {"activation": "sigmoid", "id2label": {0: "cat", 1: "dog"}}
    left, away = [0, 0, 24, 32], [40, 0, 48, 8]
    missed = explain_missed(explain, image, [left, left, away], ["dog", 0, "dog"], **options)
    # Both lie right at 0.5; nothing overlaps the last, whose closest is the lower right corner.
    assert missed.queries.tolist() == [1, 0, 2]
    assert missed.overlaps.tolist() == pytest.approx([0.5, 1.0, 0.0])
    assert missed.lies_right.tolist() == [True, True, False]
    assert missed.scores.tolist() == pytest.approx([0.3, 0.7, 0.75], abs=1e-3)
    assert missed.names == ["dog", "cat", "dog"] and missed.likeliest == ["dog", "cat", "dog"]
    boxes = [[0, 8, 24, 24], [0, 0, 24, 32], [38.4, 25.6, 48, 32]]
    torch.testing.assert_close(missed.boxes, torch.tensor(boxes).double())
    for j, target in enumerate([(1, 1), (0, 0), (2, 1)]):
        close(missed.maps[j], explain.attribute(image, target=target).sum(1)[0])
    assert str(missed).splitlines()[2].startswith("dog: query 2 is the closest (IoU 0.00) with dog")
    (strict,) = explain_missed(explain, image, left, "dog", min_overlap=0.6, **options).queries
    assert int(strict) == 0


@pytest.mark.parametrize(
    ("box", "label", "said"),
    [
        ((0, 0, 24), 0, "box: expected"),
        (torch.ones(1, 4).to_sparse(), 0, "box: expected"),
        (torch.tensor([[0, 0, 24, 32j]]), 0, "box: expected"),
        ((5, 0, 5, 9), 0, "x_min < x_max"),
        ((50, 0, 60, 9), 0, "of 48 x 32"),
        ((0.1, 0.1, 0.5, 0.5), 0, "multiply it"),
        ((0, 0, 24, 32), "dgo", "did you mean 'dog'"),
        ((0, 0, 24, 32), 2, "from 0 to 1"),
        ((0, 0, 24, 32), [0, 1], "one for each of 1 boxes"),
    ],
)
def test_missed_objects_that_are_none(box: Any, label: Any, said: str) -> None:
    with pytest.raises((InputError, TargetError), match=said):
        explain_missed(GenericAttention(Placed()), images(1), box, label, activation="sigmoid",
                       id2label={0: "cat", 1: "dog"})  # fmt: skip


def test_stand_ins_of_transformers_are_no_names() -> None:
    model = detector("Detr")
    known, model.config.id2label = model.config.id2label, NAMES | {0: "LABEL_0", 1: "LABEL_1"}
    try:
        (found,) = explain_detections(RawAttention(model), images(1), threshold=0)
    finally:
        model.config.id2label = known
    labels = found.labels.tolist()
    assert found.names == [NAMES[label] if label > 1 else str(label) for label in labels]
