"""The questions, regions and words of the demo's LXMERT, its packaged weights and its training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captum_attn.errors import InputError
from captum_attn.toy.digit_vqa import (
    BACKGROUND,
    PRESENCE,
    SIDE,
    WEIGHTS,
    YES,
    Regions,
    build_digit_vqa,
    load_digit_vqa,
    questions,
    region_features,
    regions,
    save_digit_vqa,
)
from captum_attn.toy.scenes import SceneBatch, scenes
from captum_attn.toy.vocabulary import DIGITS, VOCABULARY, WORDS, split_words, tokenize
from tutorials.training.train_vqa import accuracy, train


@pytest.fixture(scope="module")
def batch() -> SceneBatch:
    return scenes(1000, split="test", seed=7)


@pytest.fixture(scope="module")
def found(batch: SceneBatch) -> Regions:
    return regions(batch, seed=7)


# ------------------------------------------------------------ words


def test_a_question_is_one_token_per_word_padded_to_the_longest() -> None:
    encoded = tokenize(["Is there an 8?", "do you see a seven on the left ?"])
    words = ["[CLS]", "is", "there", "a", "8", "?", "[SEP]", *["[PAD]"] * 4]
    assert encoded["input_ids"][0].tolist() == [VOCABULARY[word] for word in words]
    assert encoded["attention_mask"].tolist() == [[1] * 7 + [0] * 4, [1] * 11]


def test_every_word_has_an_id_of_its_own() -> None:
    assert sorted(VOCABULARY.values()) == list(range(len(WORDS) + 4))
    assert VOCABULARY["[PAD]"] == 0  # the embedding that LXMERT keeps at zero


@pytest.mark.parametrize("text", ["is there a cat or a dog ?", "is there a 12 ?", "a [MASK] ?"])
def test_unknown_words_are_named_beside_the_known_ones(text: str) -> None:
    with pytest.raises(InputError, match="unknown words: .*use only is, there, a,.*zero, one"):
        tokenize(text)


def test_the_unknown_words_are_named_once() -> None:
    with pytest.raises(InputError, match="unknown words: 'cat', 'or', 'dog'; use only"):
        split_words("is there a cat or a cat or a dog ?")


@pytest.mark.parametrize("text, count", [("", 0), ("  ", 0), ("a " * 15, 15)])
def test_questions_of_no_or_too_many_words_are_refused(text: str, count: int) -> None:
    with pytest.raises(InputError, match=f"has {count} words; give it 1 to 14"):
        tokenize(text)


def test_no_question_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no question was given"):
        tokenize([])


# ------------------------------------------------------------ regions


def test_a_digits_box_holds_its_ink_and_little_more(batch: SceneBatch, found: Regions) -> None:
    for i in range(100):
        for digit, mask in zip(batch.labels[i], batch.masks[i], strict=True):
            x1, y1, x2, y2 = found.boxes[i, found.digits[i] == digit][0].tolist()
            rows, columns = mask.nonzero().unbind(1)
            room = [
                columns.min() - x1, rows.min() - y1, x2 - columns.max() - 1, y2 - rows.max() - 1
            ]  # fmt: skip
            assert all(-1e-4 <= side <= 3 + 1e-4 for side in room)
            # 1 pixel at least, but for ink that ends at the edge of the scene
            edges = [x1, y1, 64 - x2, 64 - y2]
            assert all(s >= 1 - 1e-4 or e == 0 for s, e in zip(room, edges, strict=True))


def test_background_holds_hardly_any_ink(batch: SceneBatch, found: Regions) -> None:
    background = found.digits == BACKGROUND
    assert (background.sum(1) == 4).all()
    ink = region_features(batch.masks.any(1)[:, None].float(), found.boxes)["visual_feats"].mean(2)
    assert ink[background].mean() < 0.01 and (ink[background] < 0.1).float().mean() > 0.99
    assert ink[~background].min() > 0.15
    # and is as wide and as high as a digit's box, so that the size gives little away
    size = found.boxes[..., 2:] - found.boxes[..., :2]
    for axis in (0, 1):
        low, high = size[background][:, axis].quantile(torch.tensor([0.1, 0.9]))
        of_digits = size[~background][:, axis]
        assert ((low < of_digits) & (of_digits < high)).float().mean() > 0.9


def test_regions_stand_in_random_order(found: Regions) -> None:
    shown = (found.digits != BACKGROUND).float()
    assert (shown.sum(1) == 2).all()
    assert (shown.mean(0) - 1 / 3).abs().max() < 0.06  # standard deviation 0.015


def test_features_are_the_mean_of_bilinear_samples() -> None:
    """RoIAlign against its definition: 3 x 3 samples per cell, pixel centres at one half."""
    image = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    box = torch.tensor([10.3, 5.0, 31.7, 40.2], dtype=torch.float64)
    found = region_features(image, box[None, None])

    def sample(x: float, y: float) -> float:
        x, y = x - 0.5, y - 0.5
        i, j = int(y), int(x)
        dy, dx = y - i, x - j
        top = (1 - dx) * image[0, 0, i, j] + dx * image[0, 0, i, j + 1]
        low = (1 - dx) * image[0, 0, i + 1, j] + dx * image[0, 0, i + 1, j + 1]
        return float((1 - dy) * top + dy * low)

    x1, y1, x2, y2 = box.tolist()
    for cell in (0, 7, 42, 99):
        row, column = divmod(cell, 10)
        samples = [
            sample(x1 + (x2 - x1) * (column + (a + 0.5) / 3) / 10,
                   y1 + (y2 - y1) * (row + (b + 0.5) / 3) / 10)
            for a in range(3) for b in range(3)
        ]  # fmt: skip
        expected = sum(samples) / 9
        assert found["visual_feats"][0, 0, cell].item() == pytest.approx(expected, abs=1e-12)
    assert found["visual_pos"][0, 0].tolist() == pytest.approx([v / 64 for v in (x1, y1, x2, y2)])
    flat = region_features(image[:, :, :32], box[None, None])["visual_pos"][0, 0]
    assert flat.tolist() == pytest.approx([x1 / 64, y1 / 32, x2 / 64, y2 / 32])


def test_equal_seeds_give_equal_regions_and_questions(batch: SceneBatch, found: Regions) -> None:
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        again = regions(batch, seed=7)
        asked = questions(again, seed=7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, again, strict=True))
    assert asked.texts == questions(found, seed=7).texts
    assert not torch.equal(found.boxes, regions(batch, seed=8).boxes)
    assert asked.texts != questions(found, seed=8).texts
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------ questions


def read(text: str) -> tuple[int, str]:
    """The digit and the side that a question names."""
    words = text.split()
    digits = [k for k in range(10) if DIGITS[k] in words or str(k) in words]
    sides = [side for side in ("left", "right", "top", "bottom") if side in words]
    assert len(digits) == 1 and len(sides) <= 1
    return digits[0], sides[0] if sides else ""


def test_the_answers_are_right(found: Regions) -> None:
    """Worked out from the text and the boxes, without what the questions say of themselves."""
    asked = questions(found, seed=7)
    for i, text in enumerate(asked.texts):
        digit, side = read(text)
        assert (digit, side) == (asked.digits[i], asked.sides[i])
        places = {
            int(d): ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            for d, box in zip(found.digits[i], found.boxes[i].tolist(), strict=True)
            if d != BACKGROUND
        }
        right = digit in places
        if side:
            axis = 0 if side in ("left", "right") else 1
            first, last = sorted(places, key=lambda d: places[d][axis])
            assert places[last][axis] - places[first][axis] > 15  # nobody need guess the side
            right = digit == (first if side in ("left", "top") else last)
        assert bool(asked.answers[i] == YES) == right


@pytest.mark.slow
def test_the_words_do_not_tell_the_answer() -> None:
    yes, cells = [], []
    for seed in range(10):
        asked = questions(regions(scenes(1000, seed=seed), seed), seed)
        yes.append(asked.answers.float())
        cells += zip(asked.sides, asked.digits.tolist(), strict=True)
    answers = torch.cat(yes)
    assert abs(answers.mean() - 0.5) < 0.02
    for side in ("", "left", "right", "top", "bottom"):
        for digit in range(10):
            some = answers[torch.tensor([cell == (side, digit) for cell in cells])]
            assert len(some) > 60
            assert abs(some.mean() - 0.5) < 4 * 0.5 / len(some) ** 0.5


def test_the_picture_does_not_tell_the_answer(found: Regions) -> None:
    yes = torch.stack([questions(found, seed).answers.float() for seed in range(20)])
    assert abs(yes.mean(0).std() - 0.5 / 20**0.5) < 0.01  # in every scene as coins fall


def test_every_form_of_question_is_asked(found: Regions) -> None:
    asked = questions(found, seed=7)
    assert abs(sum(map(bool, asked.sides)) - 500) < 80
    for form in PRESENCE + SIDE:
        start = form.split("{")[0]
        assert any(text.startswith(start) for text in asked.texts)
    assert {word for text in asked.texts for word in split_words(text)} == set(WORDS)
    about_side = [i for i, side in enumerate(asked.sides) if side and asked.answers[i] != YES]
    there = [bool((found.digits[i] == asked.digits[i]).any()) for i in about_side]
    assert abs(sum(there) / len(there) - 0.75) < 0.12


def test_questions_do_not_follow_the_scenes_random_numbers(batch: SceneBatch) -> None:
    """With one seed throughout: which of the two digits is asked for is not its scene's parity."""
    found = regions(batch, seed=7)
    asked = questions(found, seed=7)
    yes = asked.answers == YES
    shown = found.digits[yes]
    first = shown[(shown != BACKGROUND).cumsum(1).eq(1) & (shown != BACKGROUND)]
    drawn = torch.stack([(first == asked.digits[yes]).float(), batch.labels[yes, 0] % 2])
    assert torch.corrcoef(drawn)[0, 1].abs() < 0.2  # standard deviation 0.045


# ------------------------------------------------------------ model


def test_packaged_weights_answer_held_out_questions(found: Regions) -> None:
    right = accuracy(load_digit_vqa(), found, questions(found, seed=7))
    assert right.all > 0.95
    assert min(right.presence, right.side, right.yes, right.no) > 0.93
    assert abs(right.shuffled - 0.5) < 0.06


def test_accuracy_counts_each_kind() -> None:
    """A model that always says yes is right in all yes and no no."""
    found = regions(scenes(200, seed=9), seed=9)
    asked = questions(found, seed=9)
    model = build_digit_vqa()
    with torch.no_grad():
        model.answer_head.logit_fc[-1].weight.zero_()
        model.answer_head.logit_fc[-1].bias.copy_(torch.tensor([0.0, 1.0]))
    right = accuracy(model.train(), found, asked)
    share = asked.answers.float().mean().item()
    assert (right.yes, right.no) == (1.0, 0.0)
    assert right.all == right.shuffled == pytest.approx(share)
    side = torch.tensor([bool(side) for side in asked.sides])
    assert right.side == pytest.approx(asked.answers[side].float().mean().item())
    assert right.presence == pytest.approx(asked.answers[~side].float().mean().item())
    assert model.training


def test_packaged_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000


def test_padding_changes_no_answer() -> None:
    model, found = load_digit_vqa(), regions(scenes(1), seed=0)
    alone = model(**tokenize("is there a 3 ?"), **found.inputs).question_answering_score
    twice = {name: x.expand(2, -1, -1) for name, x in found.inputs.items()}
    longer = ["is there a 3 ?", "do you see a seven on the left ?"]
    padded = model(**tokenize(longer), **twice).question_answering_score
    assert torch.allclose(alone[0], padded[0], atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9")
def test_training_reproduces_itself(tmp_path: Path) -> None:
    def weights_after_a_few_steps(seed: int) -> bytes:
        state = torch.get_rng_state()
        runs = list(train(epochs=2, steps=2, batch_size=8, seed=seed, held_out=8))
        assert torch.equal(state, torch.get_rng_state())
        path = tmp_path / "weights.safetensors"
        save_digit_vqa(runs[-1][0], path)
        inputs = tokenize("is there a 3 ?") | regions(scenes(1)).inputs
        assert load_digit_vqa(path)(**inputs).question_answering_score.isfinite().all()
        return path.read_bytes()

    first = weights_after_a_few_steps(seed=0)
    assert first == weights_after_a_few_steps(seed=0)
    assert first != weights_after_a_few_steps(seed=1)
