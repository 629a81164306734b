"""The script of the tables: its numbers are those of plain loops, its questions fit together."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from captum_attn import RawAttention
from captum_attn.toy.digit_vit import load_digit_vit
from tests.benchmarks import vit_tables
from tests.benchmarks.vit_tables import CASES, Row


def found(row: Row, name: str, n: int) -> vit_tables.Found:
    case = CASES[name]
    with tqdm(disable=True) as bar:
        return vit_tables.evaluate(row, case, case.load(), case.draw(n, 0), bar)


def plain_row(name: str, n: int) -> list[float]:
    """The numbers of raw attention, question by question and pixel by pixel."""
    case = CASES[name]
    model, asked = case.load(), case.draw(n, 0)
    right = total = 0
    both = torch.zeros(2, 2)  # background and object; intersection and union
    areas: dict[bool, list[float]] = {True: [], False: []}
    for image, targets, masks in zip(*asked, strict=True):
        for target, mask in zip(targets, masks, strict=True):
            attribution = RawAttention(model).attribute(image[None], target=int(target))
            relevance = attribution[0].detach().double().sum(0)
            named = relevance > relevance.mean()
            right += int((named == mask).sum())
            total += mask.numel()
            for i, on in enumerate((False, True)):
                inter, union = (named == on) & (mask == on), (named == on) | (mask == on)
                both[i] += torch.tensor([int(inter.sum()), int(union.sum())])
            for descending, values in areas.items():
                order = relevance.flatten().argsort(descending=descending, stable=True)
                kept = []
                for step in range(10):
                    less = image.clone().flatten(1)
                    less[:, order[: round(step / 10 * len(order))]] = 0
                    with torch.no_grad():
                        output = model(less.view_as(image)[None])[0]
                    kept.append(
                        float(output[target] > 0)
                        if name == "digits"
                        else float(output.argmax() == target)
                    )
                values.append((sum(kept) - (kept[0] + kept[-1]) / 2) / 9)
    iou = float((both[:, 0] / both[:, 1]).mean())
    means = [sum(values) / len(values) for values in areas.values()]
    return [right / total, iou, *means]


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_plain_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit_tables, "BATCH", 4)  # more than one batch, and an incomplete one
    values, _errors = vit_tables.summary(found(Row(RawAttention), name, 5))
    accuracy, _average_precision, iou, positive, negative = values.tolist()
    assert [accuracy, iou, positive, negative] == pytest.approx(plain_row(name, 5), abs=1e-6)


class Oracle:
    """Knows the masks, and which of them is asked for, or always takes the first one."""

    def __init__(self, model: torch.nn.Module) -> None:
        pass

    def attribute(self, images: Tensor, target: Tensor, name: str, follows: bool) -> Tensor:
        asked = CASES[name].draw(6, 0)
        maps = []
        for image, asked_for in zip(images, target, strict=True):
            i = next(i for i, known in enumerate(asked.images) if torch.equal(known, image))
            k = int((asked.targets[i] == asked_for).nonzero()) if follows else 0
            maps.append(asked.masks[i, k].float())
        return torch.stack(maps)[:, None].expand_as(images)


@pytest.mark.parametrize("name", CASES)
def test_the_masks_themselves_segment_without_a_fault(name: str) -> None:
    row = Row(Oracle, {"name": name, "follows": True})
    values, errors = vit_tables.summary(found(row, name, 6))
    assert values[:3].tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert errors[:3].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)
    assert values[4] > values[3] + 0.3  # the object is what the answer depends on


def test_a_map_that_does_not_follow_the_question_fails_every_other_one() -> None:
    segmentation = found(Row(Oracle, {"name": "digits", "follows": False}), "digits", 6)
    first, other = segmentation.segmentation.ious.view(6, 2).unbind(1)
    assert (first == 1).all() and (other < 0.6).all()


def test_the_jackknife_of_a_mean_and_of_a_ratio() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 400, generator=rng, dtype=torch.float64)

    def value(chosen: Tensor) -> Tensor:
        return torch.stack([x[chosen].mean(), x[chosen].sum() / (1 + y[chosen]).sum()])

    (mean, ratio), (of_mean, of_ratio) = vit_tables.jackknife(value, 400)
    assert float(mean) == pytest.approx(float(x.mean()))
    assert float(of_mean) == pytest.approx(float(x.std()) / 20)
    residual = (x - ratio * (1 + y)) / (1 + y).mean()  # the delta method
    assert float(of_ratio) == pytest.approx(float(residual.std()) / 20, rel=0.02)


def test_what_counts_as_answered() -> None:
    output = torch.tensor([[0.1, 2.0, -3.0], [-0.1, 2.0, 3.0]])
    assert vit_tables.over_one_half(output, torch.tensor([0, 0])).tolist() == [1.0, 0.0]
    digits, asked = CASES["digits"], CASES["digits"].draw(50, 0)
    model = load_digit_vit()
    with torch.no_grad():
        named = model(asked.images).sigmoid().gather(1, asked.targets) > 0.5
    share = vit_tables.answered(digits, model, asked)
    assert share == pytest.approx(float(named.double().mean()))


def test_the_script_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert vit_tables.main(["--models", "textures", "--images", "3"]) == 0
    printed = capsys.readouterr().out
    assert "3 held-out images, 3 questions" in printed
    found = [re.findall(r"([+-]?[\d.]+) ± [\d.]+", line) for line in printed.splitlines()]
    names = [line.split(" | ")[0][2:] for line in printed.splitlines()]
    lines = [(name, cells) for name, cells in zip(names, found, strict=True) if cells]
    rows = [str(row) for row in vit_tables.ROWS]
    assert [name for name, _ in lines] == rows + [name for name in rows if name != "VTranM"]
    assert all(len(cells) == len(vit_tables.NAMES) for _, cells in lines)
    numbers, ahead = dict(lines[: len(rows)]), dict(lines[len(rows) :])
    for name, differences in ahead.items():
        for own, other, difference in zip(
            numbers["VTranM"], numbers[name], differences, strict=True
        ):
            assert float(own) - float(other) == pytest.approx(float(difference), abs=0.16)
    # one stream: the positive correction is GAE's rule; and the ablations are other methods
    assert numbers["HeterogenousAttention, correction=positive"] == numbers["GenericAttention"]
    assert len({tuple(cells) for name, cells in numbers.items() if "VTranM" in name}) == 5


def test_the_picture_is_small(tmp_path) -> None:
    path = tmp_path / "textures.png"
    assert vit_tables.main(["--models", "textures", "--picture", str(path)]) == 0
    assert 10_000 < path.stat().st_size < 300_000
