"""Detection: Algorithm 1 step by step, and AP where it is known or pycocotools says it."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics import (
    coco_average_precision,
    coco_bootstrap,
    coco_results,
    detections,
    query_masks,
    segment_detections,
)

SIZE = 128


def square(top, left, side):
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def annotations(objects):
    """COCO annotations of (image, category, mask)."""
    entries = []
    for number, (image, category, mask) in enumerate(objects, 1):
        runs = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        entries.append(
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "iscrowd": 0,
                "area": int(mask.sum()),
                "bbox": coco_mask.toBbox(runs).tolist(),
                "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
            }
        )
    images = sorted({image for image, *_ in objects})
    return {
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in images],
        "annotations": entries,
        "categories": [{"id": c, "name": str(c)} for c in sorted({c for _, c, _ in objects})],
    }


OBJECTS = [(1, 7, square(0, 0, 50)), (1, 8, square(20, 20, 100)), (2, 7, square(60, 60, 20))]
TRUTH = annotations(OBJECTS)


def results_of(masks, scores=(0.9, 0.8, 0.7)):
    found = []
    for (image, category, _), mask, score in zip(OBJECTS, masks, scores, strict=True):
        found += coco_results(image, mask[None], [category], [score])
    return found


# ------------------------------------------------------------------------------ Algorithm 1
def test_queries_over_a_half_are_kept():
    probabilities = torch.tensor(
        [[0.6, 0.1, 0.3], [0.1, 0.5, 0.4], [0.1, 0.2, 0.7], [0.2, 0.7, 0.1]]
    )
    found = detections(probabilities.log())
    assert found.queries.tolist() == [0, 3] and found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.scores, torch.tensor([0.6, 0.7]))
    each = detections(torch.tensor([[2.0, -1.0], [-1.0, -2.0]]), no_object=False)
    assert each.queries.tolist() == [0] and each.scores[0] == torch.tensor(2.0).sigmoid()
    assert detections(probabilities.log(), threshold=0.3).queries.tolist() == [0, 1, 3]


def test_masks_step_by_step():
    maps = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    found = query_masks(maps, (8, 12), image_size=(8, 10), original_size=(11, 13))
    named = torch.tensor([[1.0, 0, 0], [0, 0, 0]])  # Otsu leaves the 9
    expected = torch.zeros(11, 13)
    for row in range(11):
        for column in range(13):
            y, x = row * 8 // 11, column * 10 // 13  # nearest, in the model's input
            v, u = max((y + 0.5) / 4 - 0.5, 0), max((x + 0.5) / 4 - 0.5, 0)
            r, c = int(v), int(u)
            value = sum(
                float(named[min(r + i, 1), min(c + j, 2)])
                * (1 - abs(v - r - i)) * (1 - abs(u - c - j))
                for i in (0, 1) for j in (0, 1)
            )  # fmt: skip
            expected[row, column] = float(1 / (1 + np.exp(-value)) > 0.5)
    assert torch.equal(found[0], expected.bool())
    assert 0 < int(found.sum()) < found.numel()


def test_the_lower_threshold_finds_more():
    maps = torch.rand(4, 8, 8)
    otsu, lower = (query_masks(maps, (32, 32), threshold=t) for t in ("otsu", "0.3otsu"))
    assert (lower | ~otsu).all() and (lower.sum((1, 2)) > otsu.sum((1, 2))).all()


def test_constant_maps_and_no_maps_give_no_masks():
    assert not query_masks(torch.ones(2, 4, 4), (16, 16)).any()
    assert query_masks(torch.ones(0, 4, 4), (16, 16), original_size=(9, 9)).shape == (0, 9, 9)


def test_the_whole_of_it_takes_captum_attributions():
    logits = torch.full((3, 3), -5.0)
    logits[1, 0] = logits[2, 1] = 5.0
    logits[0, 2] = 5.0
    grids = {(1, 0): torch.rand(4, 4), (2, 1): torch.rand(4, 4)}
    asked = []

    def on_input(query, label):
        asked.append((query, label))
        pixels = grids[query, label].repeat_interleave(8, 0).repeat_interleave(8, 1)
        return (pixels / 3).expand(1, 3, 32, 32)

    found, masks = segment_detections(logits, on_input, (32, 32), grid=(4, 4))
    assert asked == [(1, 0), (2, 1)] and found.labels.tolist() == [0, 1]
    assert torch.equal(masks, query_masks(torch.stack(list(grids.values())), (32, 32)))
    _, same = segment_detections(logits, lambda q, c: grids[q, c], (32, 32))
    assert torch.equal(masks, same)
    none, empty = segment_detections(logits - 20 * torch.eye(3)[2], on_input, (32, 32))
    assert len(none.queries) == 2 and len(empty) == 2


def test_no_detection_is_no_mask():
    sure_of_nothing = torch.tensor([[0.0, 9.0]])
    found, masks = segment_detections(sure_of_nothing, None, (32, 32))
    assert len(found.queries) == 0 and masks.shape == (0, 32, 32)
    assert coco_results(1, masks, found.labels, found.scores) == []


# ------------------------------------------------------------------------------------- AP
def test_perfect_masks():
    found = coco_average_precision(TRUTH, results_of([m for *_, m in OBJECTS]))
    assert found == pytest.approx(
        {"AP": 1.0, "AP_medium": 1.0, "AP_large": 1.0, "AR": 1.0, "AR_medium": 1.0, "AR_large": 1.0}
    )


def test_a_known_overlap_counts_at_the_thresholds_below_it():
    # One object, found with an intersection over union of 0.5: 0.2, 0.25, ..., 0.5 of 16
    truth = annotations([(1, 7, square(0, 0, 50))])
    half = square(0, 0, 50)
    half[25:] = False
    found = coco_average_precision(truth, coco_results(1, half[None], [7], [0.9]))
    assert found["AP"] == pytest.approx(7 / 16) and found["AR"] == pytest.approx(7 / 16)
    strict = coco_average_precision(truth, coco_results(1, half[None], [7], [0.9]), min_iou=0.5)
    assert strict["AP"] == pytest.approx(1 / 10)
    assert found["AP_large"] == -1.0 and found["AP_medium"] == pytest.approx(7 / 16)


def test_the_numbers_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    objects, results = [], []
    for image in range(1, 6):
        for _ in range(3):
            top, left, side = rng.integers(0, 60), rng.integers(0, 60), rng.integers(15, 68)
            category = int(rng.integers(1, 3))
            objects.append((image, category, square(top, left, side)))
            near = square(top + rng.integers(0, 12), left, side)
            results += coco_results(image, near[None], [category], [float(rng.random())])
    truth = annotations(objects)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        oracle = COCOeval(coco, coco.loadRes([dict(r) for r in results]), "segm")
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    found = coco_average_precision(truth, results, min_iou=0.5)
    for name, place in {"AP": 0, "AP_medium": 4, "AP_large": 5, "AR": 8, "AR_medium": 10,
                        "AR_large": 11}.items():  # fmt: skip
        assert found[name] == pytest.approx(oracle.stats[place])
    assert 0 < found["AP"] < 1


def test_the_bootstrap_draws_whole_images():
    """Every draw is the number of a data set in which the drawn images are written out."""
    objects = [(i, 7 + i % 2, square(5 * i, 30, 40 + i)) for i in range(6)]
    objects += [(0, 8, square(80, 80, 40)), (3, 7, square(90, 0, 30))]
    results = []
    for k, (image, category, mask) in enumerate(objects):
        near = mask.roll(3 * (k % 5), dims=1)
        results += coco_results(image, near[None], [category], [0.9 - 0.01 * k])
    results += coco_results(2, square(0, 60, 30)[None], [7], [0.95])  # on nothing
    truth = annotations(objects)
    drawn = coco_bootstrap(truth, results, resamples=8, seed=3)
    rng = np.random.default_rng(3)
    for r in range(8):
        picks = rng.integers(6, size=6).tolist()
        again = [(place, c, m) for place, i in enumerate(picks) for n, c, m in objects if n == i]
        found = [
            {**one, "image_id": place}
            for place, i in enumerate(picks)
            for one in results
            if one["image_id"] == i
        ]
        for name, value in coco_average_precision(annotations(again), found).items():
            assert float(drawn[name][r]) == pytest.approx(value)
    assert drawn["AP"].std() > 0.01
    same = coco_bootstrap(truth, results[::-1], resamples=8, seed=3)
    assert torch.equal(same["AR"], drawn["AR"])
    with pytest.raises(OptionError, match="resamples"):
        coco_bootstrap(truth, results, resamples=1)


def test_results_are_joined_and_stored_as_text(tmp_path):
    results = results_of([m for *_, m in OBJECTS])
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(TRUTH))
    back = json.loads(json.dumps(results))
    whole = coco_average_precision(TRUTH, results)
    assert coco_average_precision(path, back[1:] + back[:1]) == whole
    wrong = results[:2] + coco_results(2, square(0, 0, 20)[None], [7], [0.99])
    assert coco_average_precision(TRUTH, wrong)["AP"] < 0.9
    first = coco_average_precision(TRUTH, wrong, image_ids=[1])
    assert first["AP"] == pytest.approx(1.0)


def test_nothing_found_is_nothing_recalled():
    found = coco_average_precision(TRUTH, [])
    assert found["AP"] == found["AR_large"] == 0.0
    assert coco_average_precision(annotations(OBJECTS[:1]), [])["AP_large"] == -1.0


def test_it_prints_nothing(capsys):
    coco_average_precision(TRUTH, results_of([m for *_, m in OBJECTS]))
    assert capsys.readouterr().out == ""


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="those of one image"):
        detections(torch.zeros(1, 3, 4))
    with pytest.raises(InputError, match="maps: expected"):
        query_masks(torch.zeros(4, 4), (8, 8))
    with pytest.raises(InputError, match="does not lie"):
        query_masks(torch.zeros(1, 4, 4), (8, 8), image_size=(9, 8))
    with pytest.raises(InputError, match="explain: expected"):
        segment_detections(torch.tensor([[9.0, 0.0]]), lambda q, c: torch.zeros(4), (8, 8))
    with pytest.raises(InputError, match="NaN"):
        segment_detections(
            torch.tensor([[9.0, 0.0]]), lambda q, c: torch.full((4, 4), torch.nan), (8, 8)
        )
    with pytest.raises(InputError, match="as many masks"):
        coco_results(1, torch.zeros(2, 4, 4), [1], [0.5])
    with pytest.raises(OptionError, match="min_iou"):
        coco_average_precision(TRUTH, [], min_iou=0.0)
    with pytest.raises(InputError, match=r"images \[9\] are not in the annotations"):
        coco_average_precision(TRUTH, coco_results(9, square(0, 0, 9)[None], [7], [0.5]))
    with pytest.raises(InputError, match="cannot read COCO annotations"):
        coco_average_precision(tmp_path / "no.json", [])
    with pytest.raises(InputError, match=r"have no \['annotations'\]"):
        coco_average_precision(TRUTH | {"annotations": []}, [])
