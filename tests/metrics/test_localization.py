"""Localisation: masks where the numbers are known, scikit-learn and scikit-image as oracles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import threshold_otsu
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics import (
    RandomAttribution,
    binary_map,
    energy_inside,
    otsu_threshold,
    pointing_game,
    segmentation,
)


@pytest.fixture
def maps():
    return torch.rand(5, 3, 8, 10, dtype=torch.float64)


@pytest.fixture
def masks():
    return torch.rand(5, 8, 10) < 0.3


def test_a_perfect_map(masks):
    found = segmentation(masks.double() * 3 - 1, masks)
    assert found.compute() == {"pixel_accuracy": 1.0, "mIoU": 1.0, "mAP": 1.0}


def test_a_map_of_the_background(masks):
    found = segmentation(1 - masks.double(), masks)
    assert found.pixel_accuracy == 0.0 and found.mean_iou == 0.0
    assert found.mean_average_precision == pytest.approx(0.5)


def test_counts_worked_out_by_hand():
    maps = torch.tensor([[[4.0, 3.0], [0.0, 1.0]]])  # mean 2: the first row is object
    masks = torch.tensor([[[1, 0], [1, 0]]])
    found = segmentation(maps, masks)
    assert found.correct.tolist() == [2] and found.labelled.tolist() == [4]
    assert found.intersection.tolist() == [[1, 1]] and found.union.tolist() == [[3, 3]]
    assert found.mean_iou == pytest.approx(1 / 3)
    ignored = segmentation(maps, torch.tensor([[[1, -1], [1, 0]]]))
    assert ignored.correct.tolist() == [2] and ignored.labelled.tolist() == [3]
    assert ignored.union.tolist() == [[2, 2]]


@pytest.mark.parametrize("threshold", ["mean", "otsu", "0.3otsu", 0.7])
def test_numbers_of_scikit_learn(maps, masks, threshold):
    found = segmentation(maps, masks, threshold=threshold)
    together = [], []
    for i in range(5):
        map_, mask = maps[i].sum(0).numpy(), masks[i].numpy().ravel()
        map_ = (map_ - map_.min()) / (map_.max() - map_.min())
        if threshold in ("otsu", "0.3otsu"):  # scikit-image's, of the bins' numbers: whole bins
            bins = np.minimum((map_ * 256).astype(int), 255)
            last = threshold_otsu(hist=(np.bincount(bins.ravel(), minlength=256), np.arange(256)))
            named = (bins > last * (0.3 if threshold == "0.3otsu" else 1)).ravel()
        else:
            named = (map_ > (map_.mean() if threshold == "mean" else threshold)).ravel()
        assert np.array_equal(binary_map(maps, threshold=threshold)[i].numpy().ravel(), named)
        assert float(found.accuracies[i]) == pytest.approx(accuracy_score(mask, named))
        iou = jaccard_score(mask, named, average="macro")
        assert float(found.ious[i]) == pytest.approx(iou)
        scores = np.concatenate([1 - map_.ravel(), map_.ravel()])
        labels = np.concatenate([~mask, mask])
        assert float(found.precision[i]) == pytest.approx(average_precision_score(labels, scores))
        together[0].append(mask)
        together[1].append(named)
    mask, named = (np.concatenate(values) for values in together)
    assert found.pixel_accuracy == pytest.approx(accuracy_score(mask, named))
    assert found.mean_iou == pytest.approx(jaccard_score(mask, named, average="macro"))
    assert found.mean_average_precision == pytest.approx(float(found.precision.mean()))


def test_otsu_cuts_after_the_last_background_bin():
    """Held against OpenCV, which GAE's code calls, on maps that are whole numbers as there."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for power in (1, 3, 6):
        whole = (255 * rng.random((25, 34)) ** power).astype(np.uint8)
        whole[0, :2] = 0, 255
        last, expected = cv2.threshold(whole, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        map_ = torch.from_numpy(whole.astype(float))[None]
        assert np.array_equal(binary_map(map_, threshold="otsu")[0].numpy(), expected > 0)
        lower = cv2.threshold(whole, int(0.3 * last), 255, cv2.THRESH_BINARY)[1]
        assert np.array_equal(binary_map(map_, threshold="0.3otsu")[0].numpy(), lower > 0)
        level = otsu_threshold(map_)[:, None, None]
        assert torch.equal(map_ >= level, binary_map(map_, threshold="otsu"))


def test_the_last_background_bin_stays_background():
    map_ = torch.tensor([[[0.0, 0.001, 0.003, 1.0]]])
    for threshold in ("otsu", "0.3otsu"):
        assert binary_map(map_, threshold=threshold).tolist() == [[[False, False, False, True]]]
    assert otsu_threshold(map_).tolist() == [1 / 256]
    assert otsu_threshold(8 * map_ - 3).tolist() == pytest.approx([8 / 256 - 3])
    assert otsu_threshold(torch.full((1, 2, 2), 7.0)).tolist() == [7.0]


def test_parts_of_a_data_set_add_up_exactly(maps, masks):
    whole = segmentation(maps, masks)
    parts = segmentation(maps[:2], masks[:2]) + segmentation(maps[2:], masks[2:])
    assert len(parts) == 5 and parts.compute() == whole.compute()
    assert whole[torch.tensor([4, 0])].correct.tolist() == whole.correct[[4, 0]].tolist()
    assert whole[:2].compute() == segmentation(maps[:2], masks[:2]).compute()
    # The data set's IoU is of all pixels, not the mean over the images.
    assert whole.mean_iou != pytest.approx(float(whole.ious.mean()), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(power=st.integers(-3, 5), shift=st.integers(-100, 100), seed=st.integers(0, 1000))
def test_scale_and_shift_do_not_count(power, shift, seed):
    rng = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 7, (2, 6, 6), generator=rng).double()
    masks = torch.rand(2, 6, 6, generator=rng) < 0.5
    masks[:, 0, 0] = True
    one, other = segmentation(maps, masks), segmentation(maps * 2.0**power + shift, masks)
    assert one.compute() == other.compute()  # powers of two leave ties what they are


def test_a_constant_map_names_nothing(masks):
    for value in (0.0, 2.5):
        for threshold in ("mean", "otsu", "0.3otsu", 0.2):
            constant = torch.full((5, 8, 10), value)
            assert not binary_map(constant, threshold=threshold).any()
            found = segmentation(constant, masks, threshold=threshold)
            assert found.mean_average_precision == pytest.approx(0.5)
            assert found.pixel_accuracy == pytest.approx(float((~masks).double().mean()))


def test_a_class_that_is_nowhere_was_found_without_fault():
    nothing = torch.zeros(1, 4, 4, dtype=torch.long)
    found = segmentation(torch.ones(1, 4, 4), nothing)
    assert found.mean_iou == 1.0


def test_pointing_game():
    maps = torch.zeros(2, 6, 6)
    maps[0, 1, 1] = maps[1, 5, 5] = 2.0
    masks = torch.zeros(2, 1, 6, 6, dtype=torch.long)
    masks[:, :, 1, 1:3] = 1
    assert pointing_game(maps, masks).tolist() == [1.0, 0.0]
    assert pointing_game(maps, masks, tolerance=4).tolist() == [1.0, 0.0]
    assert pointing_game(maps, masks, tolerance=5).tolist() == [1.0, 1.0]  # 3 and 4 away
    zero = torch.zeros(2, 6, 6)  # the first pixel of a tie
    assert pointing_game(zero, masks).tolist() == [0.0, 0.0]
    masks[1, 0, 0, 0] = 1
    assert pointing_game(zero, masks).tolist() == [0.0, 1.0]


def test_energy_inside():
    maps = torch.tensor([[[3.0, 1.0], [-5.0, 0.0]]])
    masks = torch.tensor([[[1, 0], [1, 0]]])
    assert energy_inside(maps, masks).tolist() == [0.75]
    assert energy_inside(maps, torch.tensor([[[1, -1], [0, 0]]])).tolist() == [1.0]
    assert energy_inside(-maps.abs(), masks).tolist() == [0.0]


def test_random_maps_score_as_chance():
    images = torch.rand(60, 1, 16, 16)
    masks = torch.zeros(60, 16, 16)
    masks[:, 4:12, 4:12] = 1  # a quarter of the area
    maps = RandomAttribution(None).attribute(images)
    inside = energy_inside(maps, masks)
    assert float(inside.mean()) == pytest.approx(0.25, abs=4 * float(inside.std() / 60**0.5))
    found = segmentation(maps, masks)
    assert found.pixel_accuracy == pytest.approx(0.5, abs=0.02)
    # The object, and the background: 1/8 of the pixels over 5/8, 3/8 over 7/8
    assert found.mean_iou == pytest.approx((1 / 5 + 3 / 7) / 2, abs=0.02)


def test_containers_of_one(maps, masks):
    expected = segmentation(maps, masks).compute()
    for container in ({"pixel_values": maps}, (maps,), maps.sum(1)):
        assert segmentation(container, masks).compute() == pytest.approx(expected)
    with pytest.raises(InputError, match=r"pass the one that is meant"):
        segmentation((maps, maps), masks)


def test_bad_input(maps, masks):
    measures = segmentation, pointing_game, energy_inside
    for measure in measures:
        with pytest.raises(InputError, match="masks: expected the shape"):
            measure(maps, masks[:, :4])
        with pytest.raises(InputError, match="got 2"):
            measure(maps, masks.long() * 2)
        with pytest.raises(InputError, match="of example 3 have NaN"):
            measure(torch.cat([maps[:3], maps[3:] / 0 * 0]), masks)
        with pytest.raises(InputError, match="expected maps"):
            measure(maps[0, 0], masks)
        with pytest.raises(InputError, match="expected maps"):
            measure(maps[:0], masks[:0])
    for measure in measures[1:]:
        with pytest.raises(InputError, match="example 2 has a mask without an object"):
            measure(maps, masks & (torch.arange(5) != 2)[:, None, None])
    with pytest.raises(InputError, match="example 0 has a mask in which no pixel counts"):
        segmentation(maps, -torch.ones(5, 8, 10))
    for threshold in ("median", 1.5, -0.1, None):
        with pytest.raises(OptionError, match="threshold"):
            segmentation(maps, masks, threshold=threshold)
    with pytest.raises(OptionError, match="tolerance"):
        pointing_game(maps, masks, tolerance=-1)
