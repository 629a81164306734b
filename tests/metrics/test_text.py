"""Text: tokens removed, and human rationales; scikit-learn as the oracle."""

import numpy as np
import pytest
import torch
from sklearn.metrics import auc, f1_score, precision_recall_curve
from torch import nn

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics import (
    RandomAttribution,
    comprehensiveness,
    perturbation_auc,
    rationale_auprc,
    rationale_f1,
    rationale_iou_f1,
    sufficiency,
    token_removal_auc,
)
from tests.metrics import plain


class Bag(nn.Module):
    """A bag of words: two classes, of even and of odd ids."""

    def forward(self, input_ids, attention_mask):
        odd = input_ids % 2
        parts = [((odd == c) * input_ids * attention_mask).sum(1) for c in (0, 1)]
        return torch.stack(parts, 1).double() / 10


@pytest.fixture
def encoding():
    ids = torch.tensor([[2, 3, 4, 7, 6, 1, 8, 5, 9, 10], [3, 1, 2, 9, 5, 0, 0, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture
def maps(encoding):
    return {"input_ids": torch.rand(2, 10, dtype=torch.float64)}


def probability(ids, kept, target):
    mask = torch.zeros(1, len(ids), dtype=torch.long)
    mask[0, kept] = 1
    return float(Bag()(ids[None], mask).softmax(-1)[0, target])


@pytest.mark.parametrize("measure", [comprehensiveness, sufficiency])
def test_erasers_equations(encoding, maps, measure):
    target = Bag()(**encoding).argmax(1)
    found = measure(Bag(), encoding, maps)
    for i in range(2):
        ids = encoding["input_ids"][i]
        words = [j for j in range(10) if ids[j] > 0]
        ranked = [words[r] for r in plain.order_of(maps["input_ids"][i, words])]
        falls = []
        for share in (0.0, 0.01, 0.05, 0.1, 0.2, 0.5):
            k = max(1, round(share * len(words))) if share else 0
            kept = ranked[k:] if measure is comprehensiveness else ranked[:k] or words[:1]
            whole = probability(ids, words, target[i])
            falls.append(whole - probability(ids, kept, target[i]))
        assert float(found[i]) == pytest.approx(sum(falls) / 6)


def test_the_authors_bins_leave_the_empty_rationale_out(encoding, maps):
    bins = (0.01, 0.05, 0.1, 0.2, 0.5)
    six = comprehensiveness(Bag(), encoding, maps)
    five = comprehensiveness(Bag(), encoding, maps, steps=bins)
    torch.testing.assert_close(five * 5, six * 6)


def test_token_removal_is_the_perturbation_test_in_the_attention(encoding, maps):
    found = token_removal_auc(Bag(), encoding, maps, [0, 1])
    steps = [t / 10 for t in range(11)]
    torch.testing.assert_close(
        found, perturbation_auc(Bag(), encoding, maps, [0, 1], steps=steps, fill="remove")
    )
    for i in range(2):
        ids = encoding["input_ids"][i]
        words = [j for j in range(10) if ids[j] > 0]
        ranked = [words[r] for r in plain.order_of(maps["input_ids"][i, words])]
        hits = []
        for step in steps:
            kept = ranked[round(step * len(words)) :] or words[:1]
            hits.append(float(probability(ids, kept, i) > 0.5))
        assert float(found[i]) == pytest.approx(plain.trapezoid(hits, steps))


# ------------------------------------------------------------------------------- rationales
SCORES = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.7, 0.0]])
HUMAN = torch.tensor([[1, 1, 1, 0, 0, 0]])


def test_f1_by_hand():
    assert rationale_f1(SCORES, HUMAN).item() == pytest.approx(2 / 3)  # 0, 2, 4 against 0, 1, 2
    assert rationale_f1(SCORES, HUMAN, fraction=1 / 3).item() == pytest.approx(2 * 2 / (2 + 3))
    assert rationale_f1(SCORES, HUMAN, fraction=0.01).item() == pytest.approx(2 / (1 + 3))
    masked = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert rationale_f1(SCORES, HUMAN, masked).item() == pytest.approx(2 * 2 / 6)
    half = rationale_f1(SCORES, HUMAN, masked, fraction=0.5)  # two of the four that count
    assert half.item() == pytest.approx(2 * 2 / (2 + 3))
    ties = torch.zeros(1, 6)  # the first three
    assert rationale_f1(ties, HUMAN).item() == 1.0


def test_f1_and_auprc_of_scikit_learn():
    scores, human = torch.randn(6, 12, dtype=torch.float64), torch.rand(6, 12) < 0.4
    human[:, 0] = True
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[2:, 9:] = 0
    f1, auprc = rationale_f1(scores, human, mask), rationale_auprc(scores, human, mask)
    for i in range(6):
        on = mask[i].bool().numpy()
        s, h = scores[i].numpy()[on], human[i].numpy()[on]
        chosen = np.zeros(len(s), bool)
        chosen[np.argsort(-s, kind="stable")[: h.sum()]] = True
        assert float(f1[i]) == pytest.approx(f1_score(h, chosen))
        precision, recall, _ = precision_recall_curve(h, s)
        assert float(auprc[i]) == pytest.approx(auc(recall, precision))


def test_a_perfect_and_a_worst_map():
    assert rationale_auprc(HUMAN.double(), HUMAN).item() == 1.0
    assert rationale_f1(HUMAN.double(), HUMAN).item() == 1.0
    assert rationale_iou_f1(HUMAN.double(), HUMAN).item() == 1.0
    assert rationale_f1(1 - HUMAN.double(), HUMAN).item() == 0.0
    assert rationale_iou_f1(1 - HUMAN.double(), HUMAN).item() == 0.0


def test_spans_by_hand():
    # Marked: 0-2. Chosen: 0; 2; 4. No run overlaps by half.
    assert rationale_iou_f1(SCORES, HUMAN).item() == 0.0
    # One third is enough for two of the three, which find the one that is marked.
    found = rationale_iou_f1(SCORES, HUMAN, min_iou=1 / 3).item()
    precision, recall = 2 / 3, 1.0
    assert found == pytest.approx(2 * precision * recall / (precision + recall))
    runs = torch.tensor([[5.0, 4.0, 0.0, 0.0, 3.0, 2.0]])
    marked = torch.tensor([[1, 1, 1, 0, 0, 1]])
    # 0-1 against 0-2 is 2/3, 4-5 against 5 is 1/2.
    assert rationale_iou_f1(runs, marked).item() == 1.0
    assert rationale_iou_f1(runs, marked, min_iou=0.6).item() == pytest.approx(0.5)


def test_embeddings_are_summed_and_scale_does_not_count():
    scores = torch.randn(2, 6, 4)
    human = HUMAN.expand(2, -1)
    for measure in (rationale_f1, rationale_auprc, rationale_iou_f1):
        torch.testing.assert_close(measure(scores, human), measure(scores.sum(-1), human))
        torch.testing.assert_close(measure(3 * scores.sum(-1), human), measure(scores, human))


def test_random_scores_are_chance():
    ids = torch.arange(4000).view(200, 20)
    human = torch.zeros(200, 20)
    human[:, 3:8] = 1
    found = rationale_f1(RandomAttribution(None).attribute(ids), human)
    assert float(found.mean()) == pytest.approx(0.25, abs=4 * float(found.std() / 200**0.5))


def test_bad_input():
    for measure in (rationale_f1, rationale_auprc, rationale_iou_f1):
        with pytest.raises(InputError, match="rationales: expected one value per token"):
            measure(SCORES, HUMAN[:, :4])
        with pytest.raises(InputError, match="mask: expected one value per token"):
            measure(SCORES, HUMAN, HUMAN[:, :4])
        with pytest.raises(InputError, match="example 0 has no marked token"):
            measure(SCORES, HUMAN, 1 - HUMAN)
        with pytest.raises(InputError, match="example 0 have NaN"):
            measure(SCORES / 0 * 0, HUMAN)
        with pytest.raises(InputError, match="batch is empty"):
            measure(SCORES[:0], HUMAN[:0])
    for fraction in (0, 1.2):
        with pytest.raises(OptionError, match="fraction"):
            rationale_f1(SCORES, HUMAN, fraction=fraction)
