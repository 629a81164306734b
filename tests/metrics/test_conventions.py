"""What is easily got wrong: units of unlike size, padding, nothing left to attend, GAE's steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_attn import evaluate
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation import METRICS, Batch
from captum_attn.metrics import (
    Mean,
    RandomAttribution,
    Remove,
    abpc,
    aopc,
    perturbation_curve,
    pointing_game,
    rationale_iou_f1,
    rationale_spans,
    segmentation,
    sufficiency,
    token_removal_auc,
)


# ------------------------------------------------------------------ chance is chance
def brightness(images: Tensor) -> Tensor:
    return images.double().flatten(1).mean(1)


@pytest.mark.parametrize("units", ["superpixels", "patches that do not divide"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_random_maps_have_an_abpc_of_0(units: str, reduce: str) -> None:
    images = torch.rand(60, 1, 16, 16) + 0.5
    mask = torch.arange(256).view(1, 1, 16, 16).sqrt().floor().long()  # of 1, 3, 5, ... pixels
    options = {"feature_mask": mask} if units == "superpixels" else {"patch_size": 5}
    found = abpc(
        brightness, images, RandomAttribution(None).attribute(images), measure="logit",
        reduce=reduce, perturbations_per_eval=21, **options,
    )  # fmt: skip
    assert abs(float(found.mean())) < 4 * float(found.std()) / 60**0.5
    positive = abpc(
        brightness, images, torch.rand(60, 1, 16, 16), measure="logit", reduce=reduce,
        perturbations_per_eval=21, **options,
    )  # fmt: skip
    large = abs(float(positive.mean())) > 4 * float(positive.std()) / 60**0.5
    assert large == (reduce == "sum")  # the sum over a large unit, whatever it shows


def test_the_score_of_a_unit_is_its_mean() -> None:
    maps = torch.tensor([[[3.0, 2.0], [2.0, 2.0]]])
    mask = torch.tensor([[0, 1], [1, 1]])  # one pixel of 3, three of 2
    found = perturbation_curve(
        brightness, torch.tensor([[[[4.0, 1.0], [1.0, 1.0]]]]), maps, measure="logit", steps=2,
        feature_mask=mask,
    )  # fmt: skip
    assert found.values.tolist() == [[7 / 4, 3 / 4, 0.0]]


# ------------------------------------------------------------------ padding
class Embedded(nn.Module):
    """Embeddings (B, n, D) -> (B,): the sum over the attended tokens."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return (inputs_embeds.double().sum(-1) * attention_mask).sum(1)


def padded() -> dict[str, Tensor]:
    embeddings = torch.arange(1.0, 25).view(2, 4, 3)
    return {
        "inputs_embeds": embeddings,
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("unit", ["token", "element"])
def test_padding_of_embeddings_is_no_part_of_the_example(fill: str, unit: str) -> None:
    inputs = padded()
    maps = torch.rand(2, 4, 3)
    maps[1, 2:] = 9.0  # the most relevant of all, were they there
    options = {"measure": "logit", "steps": 2, "fill": fill, "unit": unit}
    found = perturbation_curve(Embedded(), inputs, {"inputs_embeds": maps}, **options)
    alone = {name: value[1:, :2] for name, value in inputs.items()}
    expected = perturbation_curve(Embedded(), alone, {"inputs_embeds": maps[1:, :2]}, **options)
    torch.testing.assert_close(found.values[1:], expected.values)


def test_masks_belong_to_their_input() -> None:
    """An attention mask of the ids is not one of as many regions, which have their own."""
    both = {
        "input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 0]]),
        "visual_feats": torch.ones(1, 3, 2),
    }  # fmt: skip

    def regions(visual_feats: Tensor, **_: Tensor) -> Tensor:
        return visual_feats.double().sum((1, 2))

    maps = {"visual_feats": torch.rand(1, 3, 2)}
    found = perturbation_curve(regions, both, maps, measure="logit", steps=3)
    assert found.values.tolist() == [[6.0, 4.0, 2.0, 0.0]]
    own = {**both, "visual_attention_mask": torch.tensor([[1, 0, 1]])}
    found = perturbation_curve(regions, own, maps, measure="logit", steps=2)
    assert found.values.tolist() == [[6.0, 4.0, 2.0]]


def test_padding_of_images() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4)
    mask = torch.zeros(1, 4, 4)
    mask[:, :2, :2] = 1

    def model(pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        return pixel_values.double().sum((1, 2, 3))

    inputs = {"pixel_values": images, "pixel_mask": mask}
    found = perturbation_curve(
        model, inputs, {"pixel_values": images}, measure="logit", steps=4, fill="mean"
    )  # fmt: skip
    mean = (0 + 1 + 4 + 5) / 4
    expected = [120, 115 + mean, 111 + 2 * mean, 110 + 3 * mean, 110 + 4 * mean]
    assert found.values.tolist() == [expected]
    whole = Mean(torch.ones(1, 1, 4, 4)).baseline(images)
    assert float(whole) == 7.5


# ------------------------------------------------------------------ nothing left to attend
@pytest.fixture(scope="module")
def berts() -> dict[str, nn.Module]:
    transformers = pytest.importorskip("transformers")
    made = {}
    for form in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, num_labels=3, initializer_range=0.5, attn_implementation=form,
        )  # fmt: skip
        made[form] = transformers.BertForSequenceClassification(config).eval()
    return made


def test_no_token_left_is_the_same_for_every_attention(berts: dict[str, nn.Module]) -> None:
    ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][2, 4:] = 0
    maps = {"input_ids": torch.rand(3, 7)}
    found = {}
    for form, model in berts.items():
        curve = perturbation_curve(model, inputs, maps, 1, fill="remove", steps=7)
        found[form] = torch.cat([curve.values, sufficiency(model, inputs, maps, 1)[:, None]], 1)
        first = inputs["attention_mask"].clone()
        first[:, 1:] = 0
        with torch.no_grad():
            alone = model(ids, attention_mask=first).logits.double().softmax(-1)[:, 1]
        torch.testing.assert_close(curve.values[:, -1], alone)
    torch.testing.assert_close(found["eager"], found["sdpa"], atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------ GAE's own steps
def test_gaes_steps_delete_tokens_and_positions_close_up(berts: dict[str, nn.Module]) -> None:
    """As its code does it: the kept tokens alone, [CLS] and [SEP] among them, one by one."""
    ids = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    kinds = torch.arange(12).ge(6).long().expand(2, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds}
    inputs["attention_mask"][1, 9:] = 0
    maps = {"input_ids": torch.rand(2, 12)}
    words = inputs["attention_mask"].bool().clone()
    words[0, [0, 11]] = words[1, [0, 8]] = False
    model = berts["sdpa"]
    found = perturbation_curve(
        model, inputs, maps, 1, steps="gae", fill="delete", removable=words
    )  # fmt: skip
    steps = [0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1]
    assert found.fractions.tolist() == steps
    for i, end in ((0, 11), (1, 8)):
        own = maps["input_ids"][i, 1:end]
        for step, value in zip(steps, found.values[i], strict=True):
            kept = own.argsort()[: int((1 - step) * len(own))] + 1  # the most relevant go first
            places = [0, *sorted(kept.tolist()), end]
            with torch.no_grad():
                logits = model(ids[i, places][None], token_type_ids=kinds[i, places][None]).logits
            assert float(value) == pytest.approx(float(logits.double().softmax(-1)[0, 1]), abs=1e-6)
    area = token_removal_auc(model, inputs, maps, 1, steps="gae", removable=words)
    assert area.shape == (2,) and ((area >= 0) & (area <= 1)).all()
    gaps = perturbation_curve(model, inputs, maps, 1, steps="gae", fill="remove", removable=words)
    assert (gaps.values[:, 1:-1] - found.values[:, 1:-1]).abs().max() > 1e-5
    with pytest.raises(OptionError, match="inputs by name"):
        perturbation_curve(model, ids, maps["input_ids"], 1, inputs["attention_mask"],
                           fill=Remove(0, close="start"))  # fmt: skip


# ------------------------------------------------------------------ directions
def test_the_better_way_is_that_of_the_option_wherever_it_is_given() -> None:
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.rand(4, 1, 2, 2)
    pairs = [(x, 0) for x in data]
    for name, way in (("aopc", "higher"), ("deletion", "lower"), ("log_odds", "lower")):
        other = {"higher": "lower", "lower": "higher"}[way]
        for options, expected in (
            ({}, way), ({"order": "least"}, other), ({"insert": True}, other),
            ({"order": "least", "insert": True}, way),
        ):  # fmt: skip
            for metric, shared in (((name, options), {}), (name, options)):
                found = evaluate(
                    model, pairs, [RandomAttribution], {"m": metric}, perturbation=shared,
                    show_progress=False, resamples=100,
                )  # fmt: skip
                assert found.values("m")[0].better == expected
    with pytest.raises(OptionError, match="abpc"):
        evaluate(model, pairs, [RandomAttribution], "abpc", perturbation={"order": "least"},
                 show_progress=False)  # fmt: skip

    def turned(examples: list) -> Batch:
        return Batch(torch.stack([x for x, _ in examples]), options={"order": "least"})

    with pytest.raises(InputError, match="turns round what is better"):
        evaluate(model, pairs, [RandomAttribution], "aopc", target=0, collate_fn=turned,
                 show_progress=False)  # fmt: skip


# ------------------------------------------------------------------ marks that do not count
def test_the_peak_is_one_of_the_pixels_that_count() -> None:
    maps = torch.tensor([[[9.0, 1.0], [3.0, 2.0]]])
    assert pointing_game(maps, torch.tensor([[[-1, 0], [1, 0]]])).tolist() == [1.0]
    assert pointing_game(maps, torch.tensor([[[0, 0], [1, 0]]])).tolist() == [0.0]
    assert segmentation(maps, torch.tensor([[[-1, 0], [1, 0]]])).labelled.tolist() == [3]


def test_spans_of_a_data_set_are_erasers() -> None:
    """F1 of the mean precision and the mean recall, which is not the mean of the F1s."""
    scores = torch.tensor([[9.0, 8, 7, 1, 0, 0], [1.0, 9, 0, 8, 0, 7]])
    marked = torch.tensor([[1, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]])
    found = rationale_spans(scores, marked, fraction=0.5)
    assert found.precision.tolist() == pytest.approx([1, 1 / 3])
    assert found.recall.tolist() == pytest.approx([1 / 2, 1])
    precision, recall = (1 + 1 / 3) / 2, (1 / 2 + 1) / 2
    of_data = 2 * precision * recall / (precision + recall)
    assert found.f1 == pytest.approx(of_data) != pytest.approx(float(found.f1s.mean()))
    assert torch.equal(found.f1s, rationale_iou_f1(scores, marked, fraction=0.5))
    assert (found[:1] + found[1:]).f1 == found.f1 and len(found) == 2

    def explain(inputs: dict, target: object, _: object) -> dict:
        return {"ids": scores[inputs["ids"][:, 0]]}

    data = [{"ids": torch.full((6,), i), "labels": 0, "rationales": marked[i]} for i in (0, 1)]
    model = nn.Module()
    model.forward = lambda ids: torch.ones(len(ids), 2)  # type: ignore[method-assign]
    metric = ("rationale_iou_f1", {"fraction": 0.5})
    for given in (metric, (rationale_iou_f1, {"fraction": 0.5})):
        table = evaluate(
            model.eval(), data, explain, {"m": given}, show_progress=False, batch_size=1
        )
        assert table.values("m")[0].value == pytest.approx(of_data)
        assert table.values("m")[0].better == "higher"


def test_measures_of_the_field_are_known_by_name() -> None:
    images = torch.rand(12, 1, 8, 8)
    masks = torch.rand(12, 8, 8) < 0.4
    names = ["top_k_intersection", "relevance_rank", "sparseness", "sensitivity_n"]
    metrics = [("top_k_intersection", {"k": 9}), *names[1:3], ("sensitivity_n", {"subsets": 5})]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    data = [(x, 0, m) for x, m in zip(images, masks, strict=True)]
    table = evaluate(model, data, [RandomAttribution], metrics, show_progress=False, resamples=100)
    assert table.columns == names and all(
        table.values(name)[0].better == "higher" for name in names
    )
    assert float(table.value("Random Attribution", "sparseness").value) == pytest.approx(
        1 / 3, abs=0.1
    )
    assert set(names) <= set(METRICS)
    assert np.isfinite([table.values(name)[0].value for name in names]).all()
    with pytest.raises(OptionError, match="aopc has no option 'stpes'"):
        evaluate(model, data, [RandomAttribution], ("aopc", {"stpes": 5}))
    assert aopc.__name__ == "aopc"
