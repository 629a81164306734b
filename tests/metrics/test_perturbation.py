"""The perturbation engine against closed forms and against a plain rewrite of the equations."""

import pytest
import torch
from captum.attr import IntegratedGradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_attn.errors import AttnError, InputError, OptionError, TargetError
from captum_attn.metrics import (
    TO_90,
    TO_100,
    RandomAttribution,
    Remove,
    abpc,
    aopc,
    deletion,
    insertion,
    log_odds,
    perturbation_auc,
    perturbation_curve,
)
from tests.metrics import plain

WEIGHTS = torch.tensor([0.5, -1.0, 3.0, 2.0], dtype=torch.float64)


def linear(x):
    return x @ WEIGHTS


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double())


@pytest.fixture
def images():
    return torch.randn(3, 2, 6, 4, dtype=torch.float64)


@pytest.fixture
def classifier():
    """Not linear, and every pixel matters to every class."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(96, 5)
    ).double()
    model.requires_grad_(False)
    return model


def without_patches(side, width, fill=0.0):
    """Removes patches of side x side from one image (C, H, W)."""

    def remove(x, patches):
        x = x.clone()
        for p in patches:
            top, left = p // (width // side) * side, p % (width // side) * side
            x[:, top : top + side, left : left + side] = fill
        return x

    return remove


def patch_scores(map_, side):
    return [
        float(map_[:, top : top + side, left : left + side].sum())
        for top in range(0, map_.shape[1], side)
        for left in range(0, map_.shape[2], side)
    ]


# ------------------------------------------------------------------------------- closed forms
def test_curve_of_a_linear_model():
    x = torch.ones(1, 4, dtype=torch.float64)
    curve = perturbation_curve(linear, x, WEIGHTS[None], steps=4, measure="logit")
    close(curve.fractions, [0.0, 0.25, 0.5, 0.75, 1.0])
    close(curve.values, [[4.5, 1.5, -0.5, -1.0, 0.0]])
    close(curve.intact, [4.5])
    least = perturbation_curve(linear, x, WEIGHTS[None], steps=4, measure="logit", order="least")
    close(least.values, [[4.5, 5.5, 5.0, 3.0, 0.0]])


def test_measures_of_a_linear_model():
    x, options = torch.ones(1, 4, dtype=torch.float64), {"steps": 4, "measure": "logit"}
    given = linear, x, WEIGHTS[None]
    close(aopc(*given, **options), [(0 + 3 + 5 + 5.5 + 4.5) / 5])
    close(deletion(*given, **options), [(4.5 / 2 + 1.5 - 0.5 - 1.0 + 0.0) / 4])
    close(insertion(*given, fill=0.0, **options), [(0 + 3 + 5 + 5.5 + 4.5 / 2) / 4])
    close(abpc(*given, **options), [(5.5 + 5.0 + 3.0 - (1.5 - 0.5 - 1.0)) / 4])
    auc = perturbation_auc(*given, steps=(0.0, 0.25, 0.5), measure="logit", divide_by_width=False)
    close(auc, [0.25 * (4.5 / 2 + 1.5 - 0.5 / 2)])
    auc = perturbation_auc(*given, steps=(0.0, 0.25, 0.5), measure="logit")
    close(auc, [(4.5 / 2 + 1.5 - 0.5 / 2) / 2])


def test_log_odds_where_the_log_probability_is_linear():
    cost = torch.tensor([0.25, 1.0, 0.5])

    def model(x):  # log p(0 | x) = -3 + cost . x exactly
        log_p = -3 + x @ cost.double()
        return torch.stack([log_p, torch.log1p(-log_p.exp())], 1)

    x = torch.ones(1, 3, dtype=torch.float64)
    found = log_odds(model, x, cost[None].double(), target=0, steps=3)
    close(found, [-(0 + 1.0 + 1.5 + 1.75) / 4])


def test_the_accuracy_of_independent_classes():
    """Both classes may be over one half at once, and neither."""

    def model(x):  # logits -0.5 ... 1.5 and -1.5 ... 2.5
        total = x.sum(1)
        return torch.stack([total - 0.5, 2 * total - 1.5], 1)

    x = torch.tensor([[0.75, 0.5, 0.25, 0.5]]).repeat(2, 1)
    maps = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(2, 1)
    curve = perturbation_curve(
        model, x, maps, torch.tensor([0, 1]), steps=4, measure="sigmoid_accuracy"
    )
    # what is left: 2, 1.25, 0.75, 0.5, 0; a logit of 0 is not over one half
    assert curve.values.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


def test_accuracy_is_of_the_target():
    def model(x):
        return torch.stack([x.sum(1), torch.full_like(x[:, 0], 1.5)], 1)

    x = torch.ones(2, 4)
    maps = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(2, -1)
    curve = perturbation_curve(model, x, maps, torch.tensor([0, 1]), steps=4, measure="accuracy")
    close(curve.values, [[1.0, 1, 1, 0, 0], [0.0, 0, 0, 1, 1]])
    predicted = perturbation_curve(model, x, maps, steps=4, measure="accuracy")
    close(predicted.values, [[1.0, 1, 1, 0, 0]] * 2)
    area = perturbation_auc(model, x, maps, steps=4)
    close(area, [(0.5 + 1 + 1 + 0 + 0) / 4] * 2)


# ------------------------------------------------------------------------------ plain rewrite
@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize("measure", ["probability", "logit", "log_probability", "sigmoid"])
def test_curve_is_that_of_the_plain_rewrite(images, classifier, order, insert, measure):
    maps, target = torch.randn(images.shape, dtype=torch.float64), torch.tensor([4, 0, 2])
    curve = perturbation_curve(
        classifier, images, maps, target, steps=7, order=order, insert=insert, measure=measure,
        patch_size=2, perturbations_per_eval=3,
    )  # fmt: skip
    read = {
        "probability": lambda y: y.softmax(-1),
        "logit": lambda y: y,
        "log_probability": lambda y: y.log_softmax(-1),
        "sigmoid": lambda y: y.sigmoid(),
    }[measure]
    for i, x in enumerate(images):
        expected = plain.curve(
            lambda x, i=i: read(classifier(x[None])[0])[target[i]],
            x, patch_scores(maps[i], 2), [t / 7 for t in range(8)], without_patches(2, 4),
            order, insert,
        )  # fmt: skip
        close(curve.values[i], expected)


def test_measures_are_those_of_the_plain_rewrite(images, classifier):
    maps = torch.randn(images.shape, dtype=torch.float64)
    predicted = classifier(images).argmax(1)
    options = {"patch_size": 2, "perturbations_per_eval": 5}
    found = {
        "aopc": aopc(classifier, images, maps, **options),
        "log_odds": log_odds(classifier, images, maps, **options),
        "deletion": deletion(classifier, images, maps, steps=6, **options),
        "abpc": abpc(classifier, images, maps, **options),
    }
    levels = [t / 20 for t in range(21)]
    for i, x in enumerate(images):

        def p(x, c=predicted[i]):
            return classifier(x[None])[0].softmax(-1)[c]

        scores, remove = patch_scores(maps[i], 2), without_patches(2, 4)
        most = plain.curve(p, x, scores, levels, remove)
        least = plain.curve(p, x, scores, levels, remove, "least")
        close(found["aopc"][i], plain.aopc(float(p(x)), most))
        close(found["log_odds"][i], plain.log_odds(float(p(x)), most))
        close(found["abpc"][i], plain.trapezoid(least, levels) - plain.trapezoid(most, levels))
        six = [t / 6 for t in range(7)]
        expected = plain.trapezoid(plain.curve(p, x, scores, six, remove), six)
        close(found["deletion"][i], expected)


def test_the_papers_end_points(images, classifier):
    maps = torch.randn(images.shape, dtype=torch.float64)
    for steps in (TO_90, TO_100):
        curve = perturbation_curve(classifier, images, maps, 1, steps=steps, measure="accuracy")
        expected = [
            plain.trapezoid(v.tolist(), list(steps)) / (steps[-1] - steps[0]) for v in curve.values
        ]
        close(perturbation_auc(classifier, images, maps, 1, steps=steps), expected)
    assert len(TO_90) == 10 and TO_90[-1] == 0.9 and TO_100[-1] == 1.0


# ------------------------------------------------------------------------------- batching
@pytest.mark.parametrize("per_eval", [1, 4, 50])
def test_a_batch_is_its_examples_one_by_one(images, classifier, per_eval):
    maps, target = torch.randn(images.shape, dtype=torch.float64), [1, 2, 0]
    together = aopc(classifier, images, maps, target, perturbations_per_eval=per_eval)
    alone = [aopc(classifier, images[i : i + 1], maps[i : i + 1], [target[i]]) for i in range(3)]
    close(together, torch.cat(alone))


def test_no_copy_runs_twice_and_no_forward_exceeds_the_limit():
    sizes = []

    def model(x):
        sizes.append(len(x))
        return linear(x)

    x = torch.ones(2, 4, dtype=torch.float64)
    aopc(model, x, WEIGHTS.expand(2, -1), measure="logit", perturbations_per_eval=3)
    # One forward is for the shape of the output; of 21 levels of 4 units, 5 differ.
    assert sizes[0] == 2 and sum(sizes[1:]) == 2 * 5
    assert max(sizes) <= 2 * 3


def test_additional_arguments_and_targets_follow_their_example():
    def model(x, scale, offset):
        return torch.stack([x.sum(1) * scale, x[:, 0] + offset], 1)

    x = torch.arange(8.0).view(2, 4)
    scale, maps = torch.tensor([1.0, 10.0]), x.clone()
    found = perturbation_curve(
        model, x, maps, [(0,), (0,)], (scale, 3), steps=4, measure="logit", perturbations_per_eval=2
    )
    close(found.values, [[6.0, 3, 1, 0, 0], [220.0, 150, 90, 40, 0]])


def test_no_gradients_and_nothing_left_behind(images, classifier, left_as_found):
    classifier.requires_grad_(True)
    maps = torch.randn(images.shape, dtype=torch.float64, requires_grad=True)
    with left_as_found(classifier, images, maps):
        found = aopc(classifier, images, maps)
    assert not found.requires_grad


def test_progress_bar(images, classifier, capsys):
    maps = torch.randn(images.shape, dtype=torch.float64)
    aopc(classifier, images, maps, show_progress=True)
    assert "Perturbation" in capsys.readouterr().err


# ------------------------------------------------------------------------------- properties
numbers = st.lists(st.integers(-3, 3), min_size=4, max_size=4)


@settings(max_examples=40, deadline=None)
@given(scores=numbers, scale=st.floats(0.01, 100), shift=st.floats(-5, 5))
def test_only_the_order_of_the_scores_counts(scores, scale, shift):
    x = torch.tensor([[0.3, 0.7, -0.2, 1.1]], dtype=torch.float64)
    maps = torch.tensor([scores], dtype=torch.float64)
    one, other = (aopc(linear, x, m, measure="logit") for m in (maps, maps * scale + shift))
    if len({s * scale + shift for s in scores}) == len(set(scores)):  # no tie made by rounding
        close(one, other)
    order = plain.order_of(scores)  # ties by index
    value, expected = float(linear(x)), []
    for t in range(21):
        kept = x.clone()
        kept[0, order[: round(t / 20 * 4)]] = 0.0
        expected.append(value - float(linear(kept)))
    close(one, [sum(expected) / 21])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_true_order_is_best(seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, generator=rng, dtype=torch.float64)
    random = torch.randn(2, 4, generator=rng, dtype=torch.float64)
    options = {"steps": 4, "measure": "logit"}
    best = aopc(linear, x, x * WEIGHTS, **options)
    assert (best >= aopc(linear, x, random, **options) - 1e-12).all()
    worst = aopc(linear, x, x * WEIGHTS, order="least", **options)
    assert (worst <= aopc(linear, x, random, **options) + 1e-12).all()


def test_all_zero_maps_are_removed_in_reading_order():
    x = torch.ones(1, 4, dtype=torch.float64)
    for order in ("most", "least"):
        found = perturbation_curve(linear, x, x * 0, steps=4, measure="logit", order=order)
        close(found.values, [[4.5, 4.0, 5.0, 2.0, 0.0]])


def test_random_attributions_score_as_chance():
    x = torch.rand(400, 4, dtype=torch.float64)
    maps = RandomAttribution(linear).attribute(x)
    found = abpc(linear, x, maps, measure="logit", steps=4)
    assert abs(float(found.mean())) < 4 * float(found.std() / 20)
    good = abpc(linear, x, x * WEIGHTS, measure="logit", steps=4)
    assert float(good.mean()) > 10 * float(good.std() / 20)


# --------------------------------------------------------------- units, containers and shapes
def test_maps_summed_over_channels_are_the_same_attributions(images, classifier):
    maps = torch.randn(images.shape, dtype=torch.float64)
    whole = aopc(classifier, images, maps, patch_size=2)
    for summed in (maps.sum(1), maps.sum(1, keepdim=True)):
        close(aopc(classifier, images, summed, patch_size=2), whole)


def test_pixels_go_with_all_their_channels(images, classifier):
    maps = torch.randn(images.shape, dtype=torch.float64)
    close(
        aopc(classifier, images, maps, unit="pixel"), aopc(classifier, images, maps, patch_size=1)
    )
    seen = []
    perturbation_curve(
        lambda x: seen.append(x) or x.flatten(1).sum(1), images, maps, steps=24, measure="logit"
    )
    copies = torch.cat(seen)
    gone = (copies == 0).all(1)
    assert torch.equal(gone, (copies == 0).any(1))
    assert sorted(set(gone.flatten(1).sum(1).tolist())) == list(range(25))


def test_patches_at_the_border_may_be_smaller():
    x = torch.ones(1, 1, 3, 5)
    maps = torch.zeros(1, 1, 3, 5)
    maps[..., 2, 4] = 1.0
    found = perturbation_curve(
        lambda x: x.flatten(1).sum(1), x, maps, unit="patch", patch_size=2, steps=6, measure="logit"
    )
    close(found.values, [[15.0, 14, 10, 6, 4, 2, 0]])


def test_patches_of_a_video_belong_to_their_frame():
    x = torch.ones(1, 2, 3, 4, 4)
    maps = torch.zeros(1, 2, 3, 4, 4)
    maps[:, :, 1, :2, 2:] = 1.0
    seen = []
    perturbation_curve(
        lambda x: seen.append(x) or x.flatten(1).sum(1),
        x, maps, patch_size=2, steps=(1 / 12,), measure="logit",
    )  # fmt: skip
    gone = (seen[-1][-1] == 0).nonzero()
    assert torch.equal(gone, maps[0].nonzero())


def test_regions_are_those_of_the_feature_mask(images):
    mask = torch.tensor([7, 7, 3, 9]).view(1, 1, 1, 4)
    maps = torch.zeros_like(images)
    maps[..., 3] = 1.0  # region 9 first, then by id: 3, 7
    found = perturbation_curve(
        lambda x: (x != 0).sum((1, 2, 3)).double(),
        images, maps, feature_mask=mask, steps=3, measure="logit",
    )  # fmt: skip
    close(found.values, [[48.0, 36.0, 24.0, 0.0]] * 3)


def test_regions_of_every_example_are_its_own():
    x = torch.ones(2, 4, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]])
    maps = torch.tensor([[0.0, 0, 1, 1], [5.0, 4, 1, 1]], dtype=torch.float64)
    found = perturbation_curve(linear, x, maps, feature_mask=mask, steps=(0.5, 1), measure="logit")
    close(found.values[0], [-0.5, 0.0])
    close(found.values[1], [5.0, 0.0])  # a half of three units is two


def test_the_score_of_a_region_is_the_sum_or_the_mean():
    x, mask = torch.ones(1, 4, dtype=torch.float64), torch.tensor([[0, 0, 0, 1]])
    maps = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    for reduce, left in {"sum": 2.0, "mean": 2.5}.items():
        found = perturbation_curve(
            linear, x, maps, feature_mask=mask, steps=(0.5,), measure="logit", reduce=reduce
        )
        close(found.values, [[left]])


def test_rows_of_region_features():
    features = torch.randn(2, 5, 3, dtype=torch.float64)

    def model(f):
        return (f.sum(-1) * torch.arange(1.0, 6)).sum(1)

    maps = torch.randn(2, 5, 3, dtype=torch.float64)
    for given_maps in (maps, maps.sum(-1)):
        found = perturbation_curve(
            model, features, given_maps, unit="region", steps=5, measure="logit"
        )
        for i in range(2):

            def remove(x, rows):
                x = x.clone()
                x[rows] = 0
                return x

            expected = plain.curve(
                lambda x: model(x[None])[0], features[i], maps[i].sum(-1),
                [t / 5 for t in range(6)], remove,
            )  # fmt: skip
            close(found.values[i], expected)


def test_several_inputs_are_ranked_together_or_apart():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])

    def model(a, b):
        return a.sum(1) + b.sum(1)

    maps = torch.tensor([[0.1, 0.9]]), torch.tensor([[0.5, 0.7]])
    options = {"measure": "logit"}
    both = perturbation_curve(model, (a, b), maps, steps=4, **options)
    close(both.values, [[33.0, 31, 11, 1, 0]])
    second = perturbation_curve(model, (a, b), maps, steps=2, perturb=1, **options)
    close(second.values, [[33.0, 13, 3]])
    named = {"a": a, "b": b}
    first = perturbation_curve(model, named, {"a": maps[0]}, steps=2, **options)
    close(first.values, [[33.0, 31, 30]])
    chosen = perturbation_curve(model, named, maps[1], steps=2, perturb="b", **options)
    close(chosen.values, second.values)
    apart = perturbation_curve(
        model, named, dict(zip("ab", maps, strict=True)), steps=1, fill={"a": 5.0, "b": 0.0},
        **options,
    )  # fmt: skip
    close(apart.values, [[33.0, 10.0]])


def test_dictionary_outputs_and_prefixed_targets():
    def model(x):
        return {"extra": None, "logits": torch.stack([x, 2 * x], 1)}  # (B, 2, 4)

    x = torch.ones(2, 4)
    maps = torch.tensor([[4.0, 3, 2, 1], [1.0, 2, 3, 4]])
    found = perturbation_curve(model, x, maps, [(1, 0), (0, 3)], steps=4, measure="logit")
    close(found.values, [[2.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0]])


# ------------------------------------------------------------------------------- tokens
class Bag(nn.Module):
    """The sum of the attended tokens' ids."""

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return (input_ids * mask).sum(1).double()


def encoding():
    return {
        "input_ids": torch.tensor([[1, 2, 4, 8], [16, 32, 99, 99]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }


def test_tokens_leave_the_attention_and_padding_stays_out():
    maps = {"input_ids": torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.6, 9.0, 9.0]])}
    found = perturbation_curve(Bag(), encoding(), maps, steps=2, measure="logit", fill="remove")
    close(found.values, [[15.0, 15 - 2 - 4, 1], [48.0, 16, 16]])  # the first one stays


def test_tokens_are_replaced_by_an_id():
    maps = {"input_ids": torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.6, 9.0, 9.0]])}
    found = perturbation_curve(Bag(), encoding(), maps, steps=2, measure="logit", fill=1000)
    close(found.values, [[15.0, 2009.0, 4000.0], [48.0, 1016.0, 2000.0]])


def test_a_mask_that_is_not_there_starts_as_ones():
    ids = {"input_ids": torch.tensor([[1, 2, 4, 8]])}
    maps = {"input_ids": torch.tensor([[4.0, 3, 2, 1]])}
    found = perturbation_curve(Bag(), ids, maps, steps=4, measure="logit", fill="remove")
    close(found.values, [[15.0, 14, 12, 8, 1]])


def test_a_mask_among_the_additional_arguments():
    given_mask = encoding()["attention_mask"]
    maps = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.6, 9.0, 9.0]])
    found = perturbation_curve(
        Bag(), encoding()["input_ids"], maps, None, given_mask,
        steps=2, measure="logit", fill=Remove(0),
    )  # fmt: skip
    close(found.values, [[15.0, 9, 1], [48.0, 16, 16]])


def test_what_is_not_removable_stays():
    x = torch.ones(2, 4, dtype=torch.float64)
    removable = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]]).bool()
    maps = WEIGHTS.expand(2, -1)
    found = perturbation_curve(
        linear, x, maps, steps=(0, 0.5, 1), measure="logit", removable=removable
    )
    close(found.values, [[4.5, 2.5, 2.0], [4.5, -0.5, 0.5]])
    back = perturbation_curve(
        linear, x, maps, steps=(0, 0.5, 1), measure="logit", removable=removable, insert=True
    )
    close(back.values, [[2.0, 4.0, 4.5], [0.5, 5.5, 4.5]])


# ------------------------------------------------------------------------------- normalisation
def test_the_fill_before_and_after_the_normalisation(images, classifier):
    def normalize(x):
        return (x - 0.5) / 0.25

    maps = torch.randn(images.shape, dtype=torch.float64)
    whole = {"steps": 3, "patch_size": 2}

    def inside(x):
        return classifier(normalize(x))

    before = perturbation_curve(classifier, images, maps, 0, normalize=normalize, **whole)
    close(before.values, perturbation_curve(inside, images, maps, 0, **whole).values)
    after = perturbation_curve(
        classifier, images, maps, 0, normalize=normalize, fill_after=True, **whole
    )
    close(after.values, perturbation_curve(classifier, normalize(images), maps, 0, **whole).values)
    close(after.values, perturbation_curve(inside, images, maps, 0, fill=0.5, **whole).values)
    assert not torch.allclose(before.values, after.values)


# ------------------------------------------------------------------------------- any method
def test_captums_integrated_gradients_is_exact_on_a_linear_model():
    x = torch.rand(3, 4, dtype=torch.float64)
    maps = IntegratedGradients(linear).attribute(x)
    close(aopc(linear, x, maps, measure="logit"), aopc(linear, x, x * WEIGHTS, measure="logit"))


def test_gae_beats_random_on_the_digit_vit():
    pytest.importorskip("timm")
    from captum_attn import GenericAttention
    from captum_attn.toy.digit_vit import load_digit_vit
    from captum_attn.toy.scenes import scenes

    model, batch = load_digit_vit(), scenes(8)
    target = batch.labels[:, 0]
    options = {"measure": "sigmoid", "patch_size": 8, "steps": 8}
    found, chance = (
        abpc(model, batch.images, m.attribute(batch.images, target=target), target, **options)
        for m in (GenericAttention(model), RandomAttribution(model))
    )
    assert float(found.mean()) > float(chance.mean()) + 0.2
    assert (found > chance).float().mean() > 0.8


# ------------------------------------------------------------------------------- bad input
IMAGES, MAPS = torch.ones(2, 3, 4, 4), torch.rand(2, 3, 4, 4)


def score(x):
    return x.flatten(1).sum(1)


def two_classes(x):
    return torch.stack([score(x), -score(x)], 1)


BAD = {
    "shape": (InputError, r"\(2, 3, 4, 5\) fit no input", {"attributions": torch.ones(2, 3, 4, 5)}),
    "batch": (InputError, "fit no input", {"attributions": MAPS[:1]}),
    "empty": (InputError, "batch is empty", {"inputs": IMAGES[:0], "attributions": MAPS[:0]}),
    "nan": (InputError, "example 1 have NaN", {
        "attributions": torch.stack([MAPS[0], MAPS[1] / 0 * 0])}),
    "infinite": (InputError, "example 0 have NaN or inf", {"attributions": MAPS / 0}),
    "no steps": (OptionError, "steps: expected", {"steps": 0}),
    "negative steps": (OptionError, "steps: expected", {"steps": -2}),
    "a bool": (OptionError, "steps: expected", {"steps": True}),
    "falling": (OptionError, "rising fractions", {"steps": (0.5, 0.1)}),
    "above 1": (OptionError, "rising fractions", {"steps": (0.5, 10)}),
    "none": (OptionError, "rising fractions", {"steps": ()}),
    "order": (OptionError, "'most', 'least'", {"order": "best"}),
    "measure": (OptionError, "measure: expected", {"measure": "odds"}),
    "own measure": (OptionError, "one number per example", {"measure": lambda y, t: y.sum()}),
    "no classes": (OptionError, "no softmax", {"measure": "probability"}),
    "class": (TargetError, "reach from 2 to 2", {
        "forward_func": two_classes, "target": torch.tensor([2, 2])}),
    "one class": (TargetError, "does not fit", {"forward_func": two_classes, "target": 5}),
    "target batch": (TargetError, "one per example", {
        "forward_func": two_classes, "target": [0, 1, 1]}),
    "unit": (OptionError, "unit: expected", {"unit": "blob"}),
    "patch": (OptionError, "patch_size: expected", {"unit": "patch"}),
    "patch 0": (OptionError, "patch_size: expected", {"unit": "patch", "patch_size": 0}),
    "mask": (OptionError, "does not broadcast", {"feature_mask": torch.zeros(4, 5).long()}),
    "float mask": (OptionError, "whole numbers", {"feature_mask": torch.zeros(4, 4)}),
    "no mask": (OptionError, "takes feature_mask", {"unit": "region"}),
    "fill": (OptionError, "fill: expected one of", {"fill": "white"}),
    "fill shape": (OptionError, "does not broadcast", {"fill": torch.ones(5, 5)}),
    "fill nan": (InputError, "finite", {"fill": float("nan")}),
    "remove": (OptionError, "entry of a Mapping", {"fill": "remove"}),
    "remove 3": (OptionError, "0 additional_forward_args", {"fill": Remove(3)}),
    "fill_after": (OptionError, "no normalisation", {"fill_after": True}),
    "perturb": (InputError, "cannot be perturbed", {"perturb": "pixels"}),
    "removable": (OptionError, "one bool per unit", {"removable": torch.ones(2, 3).bool()}),
    "nothing": (InputError, "example 0 has nothing", {"removable": torch.zeros(2, 16).bool()}),
    "reduce": (OptionError, "'mean', 'sum'", {"reduce": "max"}),
    "per eval": (OptionError, "perturbations_per_eval", {"perturbations_per_eval": 0}),
    "no model": (OptionError, "callable", {"forward_func": "vit"}),
    "output": (InputError, "one output per example", {"forward_func": lambda x: x.sum()}),
    "no tensor": (InputError, "without a tensor", {"forward_func": lambda x: None}),
    "nan output": (InputError, "output has NaN", {"forward_func": lambda x: score(x) / 0 * 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, changed = BAD[case]
    call = {"forward_func": score, "inputs": IMAGES, "attributions": MAPS, "measure": "logit"}
    with pytest.raises(error, match=message):
        perturbation_curve(**(call | changed))
    assert issubclass(error, AttnError)


def test_bad_ids_and_containers():
    maps = {"input_ids": torch.rand(2, 4)}
    with pytest.raises(OptionError, match="nothing for token ids"):
        perturbation_curve(Bag(), encoding(), maps, measure="logit")
    with pytest.raises(OptionError, match="whole numbers"):
        perturbation_curve(Bag(), encoding(), maps, measure="logit", fill=0.5)
    with pytest.raises(InputError, match="keyword"):
        perturbation_curve(Bag(), encoding(), maps, None, 3, measure="logit", fill=0)
    with pytest.raises(InputError, match="attention mask 'weights': expected one per token"):
        perturbation_curve(
            Bag(), encoding() | {"weights": torch.ones(2, 3)}, maps, measure="logit",
            fill=Remove("weights"),
        )  # fmt: skip
    with pytest.raises(OptionError, match="options for"):
        perturbation_curve(Bag(), encoding(), maps, measure="logit", fill={"ids": 0})
    with pytest.raises(InputError, match="differ in their batch size"):
        perturbation_curve(score, (IMAGES, IMAGES[:1]), (MAPS, MAPS), measure="logit")
    with pytest.raises(TargetError, match="no one predicted class"):
        perturbation_curve(lambda x: x, IMAGES, MAPS)
    with pytest.raises(OptionError, match="at least two fractions"):
        deletion(score, IMAGES, MAPS, measure="logit", steps=(0.5,))
