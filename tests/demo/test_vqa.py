"""The digit LXMERT explained: regions and words, signed inspections, pictures, the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from captum_attn import GenericAttention, HeterogenousAttention, objectives
from captum_attn.demo import vqa
from captum_attn.demo.pictures import draw_inspections, draw_vqa_case
from captum_attn.demo.vqa import (
    DIFFERENCE,
    INSPECTIONS,
    VQACase,
    explain_examples,
    explain_question,
    explain_questions,
)
from captum_attn.errors import InputError, OptionError
from captum_attn.toy.digit_vqa import BACKGROUND, NO, YES, load_digit_vqa, questions, regions
from captum_attn.toy.scenes import scenes
from captum_attn.toy.vocabulary import tokenize
from captum_attn.visualization._style import signed
from tests.benchmarks import vqa_share

BATCH = scenes(60, split="test", seed=11)
FOUND = regions(BATCH, seed=11)
ASKED = questions(FOUND, seed=11)


@pytest.fixture(scope="module")
def model():
    return load_digit_vqa()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return tokenize(ASKED.texts) | FOUND.inputs


@pytest.fixture(scope="module")
def examples(model) -> list[VQACase]:
    return list(explain_examples(model))


# ------------------------------------------------------------ the library on the model


def test_both_streams_are_explained(model, inputs, left_as_found) -> None:
    with left_as_found(model, inputs):
        found = GenericAttention(model).attribute(inputs, target=ASKED.answers)
    assert set(found) == {"input_ids", "visual_feats"}
    assert found["input_ids"].shape == inputs["input_ids"].shape
    assert found["visual_feats"].shape == inputs["visual_feats"].shape
    assert (found["input_ids"][inputs["attention_mask"] == 0] == 0).all()
    assert (found["visual_feats"].sum((1, 2)) > 0).all()


def test_a_batch_is_explained_as_its_examples_are(model, inputs) -> None:
    method = GenericAttention(model)
    together = method.attribute(inputs, target=ASKED.answers)
    for i in (0, 7, 31):
        one = tokenize(ASKED.texts[i]) | {k: v[i : i + 1] for k, v in FOUND.inputs.items()}
        alone = method.attribute(one, target=int(ASKED.answers[i]))
        n = one["input_ids"].shape[1]
        assert torch.allclose(alone["input_ids"][0], together["input_ids"][i, :n], atol=1e-5)
        assert torch.allclose(alone["visual_feats"][0], together["visual_feats"][i], atol=1e-5)


def test_the_difference_of_answers_is_the_difference_of_their_maps(model, inputs) -> None:
    """With correction="full" every attention call's map is linear in what is explained."""
    full = HeterogenousAttention(model)

    def maps(**asked) -> list[Tensor]:
        return [found for _, found in full.layer_maps(inputs, correction="full", **asked)]

    both = maps(objective=objectives.logit_difference(YES, NO))
    assert sum(found.abs().max() > 1e-3 for found in both) >= 4
    for difference, yes, no in zip(both, maps(target=YES), maps(target=NO), strict=True):
        assert torch.allclose(difference, yes - no, atol=1e-5)


def test_a_yes_is_found_in_the_asked_digits_region(model) -> None:
    found, asked = vqa_share.answered_yes(model, FOUND, ASKED)
    shares = vqa_share.evaluate(
        lambda inputs: GenericAttention(model).attribute(inputs, target=YES), found, asked
    )
    assert len(asked.texts) > 20
    assert shares.region.mean() > 0.85 and shares.ahead.mean() > 0.85
    assert shares.word.mean() > 0.4  # by chance 0.14


def test_the_sign_of_a_region_is_what_erasing_it_does(model) -> None:
    """What the inspection finds for yes takes yes away when it shows the ground, and so with no."""
    agree = []
    full = HeterogenousAttention(model)
    for i in range(30):
        one = tokenize(ASKED.texts[i]) | {k: v[i : i + 1] for k, v in FOUND.inputs.items()}
        relevance = full.attribute(one, objective=INSPECTIONS[DIFFERENCE], correction="full")
        on_regions = relevance["visual_feats"][0].sum(-1)
        top = int(on_regions.abs().argmax())
        erased = one["visual_feats"].clone()
        erased[0, top] = BATCH.images[i].median()
        with torch.no_grad():
            before, after = (
                torch.matmul(model(**x).question_answering_score[0], torch.tensor([-1.0, 1.0]))
                for x in (one, one | {"visual_feats": erased})
            )
        agree.append(bool((before > after) == (on_regions[top] > 0)))
    assert sum(agree) / len(agree) > 0.7


# ------------------------------------------------------------ one question


def test_an_explained_question(model) -> None:
    i = int(((ASKED.answers == YES) & torch.tensor([not s for s in ASKED.sides])).nonzero()[0])
    text = f"Is there a {int(ASKED.digits[i])}?"
    case = explain_question(
        model, BATCH.images[i : i + 1], FOUND.boxes[i], text, inspections=list(INSPECTIONS)
    )
    question = case.case.questions[0]
    assert (case.answer, case.right, question.asked) == ("yes", "", text)
    assert [e.method for e in question.explanations] == ["GenericAttention", *INSPECTIONS]
    inputs = tokenize(text) | {name: x[i : i + 1] for name, x in FOUND.inputs.items()}
    with torch.no_grad():
        logits = model(**inputs).question_answering_score[0]
    assert question.probability == pytest.approx(logits[YES].sigmoid().item())
    gae, difference = question.explanations[:2]
    expected = GenericAttention(model).attribute(inputs, target=YES)
    assert torch.allclose(gae.relevance, expected["visual_feats"][0].sum(-1))
    assert [word.text for word in gae.words] == ["Is", "there", "a", text[11], "?"]
    assert all(text[word.start : word.end] == word.text for word in gae.words)
    on_words = expected["input_ids"][0, 1:-1].tolist()
    assert [word.relevance for word in gae.words] == pytest.approx(on_words)
    signed = HeterogenousAttention(model).attribute(
        inputs, objective=objectives.logit_difference(YES, NO), correction="full"
    )
    assert torch.allclose(difference.relevance, signed["visual_feats"][0].sum(-1))
    top = int(gae.relevance.argmax())
    assert FOUND.digits[i, top] == ASKED.digits[i]
    # What carries the answer, taken away first, takes it away sooner than chance does.
    assert gae.deletion < question.random_deletion


def test_removed_regions_show_the_ground_and_removed_words_are_not_read(model) -> None:
    inputs = tokenize("is there a 3 ?") | {name: x[:1] for name, x in FOUND.inputs.items()}
    keep = torch.ones(3, 6 + 5, dtype=torch.bool)
    keep[1, 2] = keep[2, 6 + 3] = False
    with torch.no_grad():
        found = vqa._probability(model, inputs, 0.25, YES, keep)
        blank = inputs["visual_feats"].clone()
        blank[0, 2] = 0.25
        # A word that is not read is no word at all but for the places of the others.
        masked = torch.tensor([[1, 1, 1, 1, 0, 1, 1]])
        changed = [inputs, inputs | {"visual_feats": blank}, inputs | {"attention_mask": masked}]
        logits = [model(**x).question_answering_score[0, YES] for x in changed]
    assert torch.allclose(found, torch.stack(logits).sigmoid(), atol=1e-5)


def test_a_no_is_deleted_by_what_speaks_for_no(model, monkeypatch) -> None:
    orders = []
    original = vqa.explain

    def watched(calls, score, units):
        orders.append({name: (call(), units(call())) for name, call in calls.items()})
        return original(calls, score, units)

    monkeypatch.setattr(vqa, "explain", watched)
    for answer, sign in ((NO, -1), (YES, 1)):
        i = int((ASKED.answers == answer).nonzero()[0])
        orders.clear()
        case = explain_question(model, BATCH.images[i : i + 1], FOUND.boxes[i], ASKED.texts[i])
        assert case.answer == ("no", "yes")[answer]
        (gae, same), (difference, order) = orders[0]["GenericAttention"], orders[1][DIFFERENCE]
        assert torch.equal(gae, same) and torch.equal(order, sign * difference)


def test_held_out_questions_are_explained_one_by_one(model) -> None:
    cases = list(explain_questions(model, count=2, seed=11))
    asked = questions(regions(scenes(2, seed=11), 11), 11)
    assert [case.case.text for case in cases] == asked.texts
    assert [case.right for case in cases] == [("no", "yes")[a] for a in asked.answers]
    assert [case.case.name for case in cases] == ["question_1", "question_2"]


def test_the_examples_are_of_four_kinds(examples) -> None:
    answers = [(case.answer, case.right) for case in examples]
    assert answers[:3] == [("yes", "yes"), ("no", "no"), ("no", "no")]
    assert all(answer != right for answer, right in answers[3:]) and len(answers) == 4


@pytest.mark.parametrize(
    "boxes, message",
    [
        (torch.zeros(0, 4), "expected shape"),
        (torch.zeros(2, 3), "expected shape"),
        (torch.tensor([[4.0, 0.0, 4.0, 9.0]]), "0 <= x1 < x2 <= 64"),
        (torch.tensor([[0.0, 0.0, 65.0, 9.0]]), "0 <= x1 < x2 <= 64"),
        (torch.tensor([[0.0, -1.0, 5.0, 9.0]]), "0 <= x1 < x2 <= 64"),
        (torch.tensor([[0.0, torch.nan, 5.0, 9.0]]), "0 <= x1 < x2 <= 64"),
    ],
)
def test_boxes_that_are_none_are_refused(model, boxes: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        explain_question(model, BATCH.images[:1], boxes, "is there a 3 ?")


def test_unknown_words_and_inspections_are_refused(model) -> None:
    image, boxes = BATCH.images[:1], FOUND.boxes[0]
    with pytest.raises(InputError, match="unknown words: 'cat'"):
        explain_question(model, image, boxes, "is there a cat ?")
    with pytest.raises(OptionError, match="expected some of .*yes − no.*got.*product"):
        explain_question(model, image, boxes, "is there a 3 ?", inspections=["product"])


# ------------------------------------------------------------ pictures


def test_orange_is_for_yes_and_purple_for_no(examples) -> None:
    """A single relevant region: its frame, its filling and its label have its sign's colour."""
    case = examples[0]
    question = case.case.questions[0]
    inspected = next(e for e in question.explanations if e.method == DIFFERENCE)
    for value, colour in ((0.5, "#e08214"), (-0.5, "#8073ac")):
        relevance = torch.zeros(6)
        relevance[0] = value
        words = tuple(word._replace(relevance=0.0) for word in inspected.words)
        only = [inspected._replace(relevance=relevance, words=words)]
        shown = case._replace(
            case=case.case._replace(questions=[question._replace(explanations=only)])
        )
        picture = draw_inspections([shown])
        on_image = picture.axes[1]
        filled = [p for p in on_image.patches if p.get_fill() and p.get_facecolor()[3] > 0]
        (label,) = on_image.texts
        assert [to_hex(p.get_facecolor()) for p in filled] == [colour]
        assert label.get_text() == signed(value)
        assert to_hex(label.get_bbox_patch().get_facecolor()) == colour
        said = {text.get_text() for text in picture.axes[0].texts}
        assert {"for yes", "for no", question.asked} <= said


def test_pictures_have_a_row_per_explanation_or_question(examples, tmp_path: Path) -> None:
    sizes = []
    for count in (1, 3):
        draw_inspections(examples[:count]).save(tmp_path / "examples.png")
        with Image.open(tmp_path / "examples.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > 2 * sizes[0][1]
    draw_vqa_case(examples[0]).save(tmp_path / "case.png")  # two explanations
    with Image.open(tmp_path / "case.png") as picture:
        assert sizes[0][1] < picture.size[1] < sizes[1][1]


def test_the_tutorials_picture_is_written_small(tmp_path: Path) -> None:
    assert vqa_share.main(["--picture", str(tmp_path / "examples.png")]) == 0
    committed = Path(__file__).parents[2] / "tutorials" / "vqa_logical_inspection.png"
    sizes = []
    for path in (tmp_path / "examples.png", committed):
        with Image.open(path) as picture:
            sizes.append(picture.size)
        assert path.stat().st_size < 200_000
    assert sizes[0] == sizes[1]


# ------------------------------------------------------------ the benchmark


def test_equally_relevant_ones_share_a_point() -> None:
    relevance = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    right = torch.tensor([[False, False, True], [True, False, False], [True, True, False]])
    assert vqa_share.most_relevant(relevance, right).tolist() == pytest.approx([0.5, 1.0, 2 / 3])


def test_scores_of_a_made_up_relevance() -> None:
    """Relevance on the other digit and the side word: each score says so."""
    side = torch.tensor([bool(s) for s in ASKED.sides]) & (ASKED.answers == YES)
    rows = side.nonzero()[:, 0]
    digits, found = ASKED.digits[rows], type(FOUND)(*(x[rows] for x in FOUND))
    ids = tokenize([ASKED.texts[i] for i in rows])["input_ids"]
    other = ((found.digits != BACKGROUND) & (found.digits != digits[:, None])).float()
    side_words = torch.isin(ids, torch.tensor(vqa_share.SIDE_WORDS)).float()
    on_cls = torch.zeros_like(side_words)
    on_cls[:, 0] = 9.0  # is not a word
    share = vqa_share.score(other, side_words + on_cls, ids, found, digits)
    assert [part.float().mean().item() for part in share] == [0.0, 0.0, 0.0, 1.0]
    share = vqa_share.score(-other, -side_words + on_cls, ids, found, digits)
    assert share.ahead.float().mean() == 1.0
    assert share.region.float().mean() == pytest.approx(1 / 5)  # one of five that are not the other


def test_the_table_is_printed(capsys) -> None:
    arguments = ["--scenes", "40", "--methods", "RawAttention", "GenericAttention"]
    assert vqa_share.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("40 held-out scenes; right answers: all ")
    assert printed.count("| GenericAttention |") == printed.count("| chance | 16.7 ± 0.0 % |") == 3
