"""The random baseline, and attributions under a model that forgets layer by layer."""

import pytest
import torch
from captum.attr import InputXGradient, Saliency
from scipy.stats import spearmanr
from torch import nn

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics import RandomAttribution, parameter_randomization


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )


# ------------------------------------------------------------------------------- random
def test_random_attributions_have_the_inputs_shapes():
    method = RandomAttribution(None)
    image, ids = torch.rand(2, 3, 4, 4), torch.randint(9, (2, 5))
    assert method.attribute(image, target=3).shape == image.shape
    pair = method.attribute((image, ids), 1, None, n_steps=3)
    assert isinstance(pair, tuple) and [p.shape for p in pair] == [image.shape, ids.shape]
    assert all(p.dtype == torch.float32 for p in pair)
    assert method.attribute(image.double()).dtype == torch.float64
    assert method.get_name() == "Random Attribution"


def test_a_mapping_gets_no_masks_and_no_second_names_of_positions():
    text = {
        "input_ids": torch.randint(9, (2, 5)),
        "token_type_ids": torch.zeros(2, 5, dtype=torch.long),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "visual_feats": torch.rand(2, 5, 7),
        "visual_pos": torch.rand(2, 5, 4),
        "pixel_values": torch.rand(2, 5, 4, 4),
    }
    assert list(RandomAttribution(None).attribute(text)) == [
        "input_ids",
        "visual_feats",
        "pixel_values",
    ]
    chosen = RandomAttribution(None, names=["visual_pos"]).attribute(text)
    assert list(chosen) == ["visual_pos"] and chosen["visual_pos"].shape == (2, 5, 4)


def test_an_example_has_one_random_map_whatever_the_batch():
    x = torch.rand(6, 3, 4, 4)
    method = RandomAttribution(None, seed=5)
    whole = method.attribute(x)
    assert torch.equal(whole[2:4], method.attribute(x[2:4]))
    assert torch.equal(whole, RandomAttribution(None, seed=5).attribute(x))
    assert not torch.equal(whole, RandomAttribution(None, seed=6).attribute(x))
    assert not torch.equal(whole[0], whole[1])
    first, second = method.attribute((x, x))
    assert not torch.equal(first, second)


def test_random_attributions_are_uniform_and_leave_the_generator_alone():
    x = torch.rand(20, 500)
    before = torch.get_rng_state()
    drawn = RandomAttribution(None).attribute(x)
    assert torch.equal(torch.get_rng_state(), before)
    counts = torch.histc(drawn, 10, -0.5, 0.5) / drawn.numel()
    assert ((counts - 0.1).abs() < 0.01).all()
    rank = spearmanr(drawn[0].numpy(), drawn[1].numpy()).statistic
    assert abs(rank) < 0.2


def test_random_bad_input():
    with pytest.raises(InputError, match="input 0: expected a tensor"):
        RandomAttribution(None).attribute(3.0)
    with pytest.raises(InputError, match="pass names="):
        RandomAttribution(None).attribute({"attention_mask": torch.ones(2, 5)})
    with pytest.raises(InputError, match="input 'ids': expected a tensor"):
        RandomAttribution(None, names=["ids"]).attribute({"input_ids": torch.ones(2, 5)})


# ------------------------------------------------------------------------------- randomisation
def test_layers_fall_from_the_top_down(model, left_as_found):
    x = torch.randn(6, 12)
    with left_as_found(model, x):
        found = parameter_randomization(InputXGradient(model), x, target=1)
    assert found.layers == ("5", "3", "1", "0")
    assert found.similarity.shape == (6, 4)
    assert (found.similarity.abs() <= 1).all() and float(found.similarity[:, -1].mean()) < 0.6


def test_a_layer_that_was_never_trained_changes_nothing(model):
    """LayerNorm as it begins, all ones and zeros, is redrawn as all ones and zeros."""
    found = parameter_randomization(InputXGradient(model), torch.randn(4, 12), 0, layers=["1"])
    torch.testing.assert_close(found.similarity, torch.ones(4, 1, dtype=torch.float64))


def test_a_method_that_looks_at_the_input_only_does_not_notice(model):
    x = torch.randn(4, 12)
    found = parameter_randomization(RandomAttribution(model), x)
    torch.testing.assert_close(found.similarity, torch.ones(4, 4, dtype=torch.float64))


def test_similarity_is_spearmans(model):
    x = torch.randn(3, 12)
    method = InputXGradient(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    new = torch.randn(3, 8)

    def redraw(name, parameter, rng):
        return new if name == "5.weight" else parameter

    before = method.attribute(x, target=2)
    found = parameter_randomization(method, x, 2, layers=["5"], redraw=redraw)
    small = parameter_randomization(
        method, x, 2, layers=["5"], redraw=redraw, absolute=True, attributions=before
    )
    with torch.no_grad():
        model[5].weight.copy_(new)
    after = method.attribute(x, target=2)
    model.load_state_dict(state)
    for i in range(3):
        a, b = before[i].detach().numpy(), after[i].detach().numpy()
        assert float(found.similarity[i, 0]) == pytest.approx(spearmanr(a, b).statistic)
        expected = spearmanr(abs(a), abs(b)).statistic
        assert float(small.similarity[i, 0]) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_numbers(model):
    x = torch.randn(3, 12)
    one, same, other = (
        parameter_randomization(Saliency(model), x, 0, seed=s).similarity for s in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_global_generator_is_left_alone(model):
    x = torch.randn(3, 12)
    before = torch.get_rng_state()
    parameter_randomization(Saliency(model), x, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_constant_map_is_like_nothing(model):
    found = parameter_randomization(InputXGradient(model), torch.zeros(2, 12), 0, layers=["5", "0"])
    assert found.similarity.tolist() == [[0.0, 0.0]] * 2


def test_the_model_comes_back_after_an_exception(model, left_as_found):
    def fail(name, parameter, rng):
        if name.startswith("3"):
            raise RuntimeError("stop")
        return torch.zeros_like(parameter)

    x = torch.randn(2, 12)
    with left_as_found(model, x), pytest.raises(RuntimeError, match="stop"):
        parameter_randomization(Saliency(model), x, 0, redraw=fail)


def test_shared_parameters_are_drawn_with_their_first_owner():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    tied.append(tied[0])
    found = parameter_randomization(Saliency(tied), torch.randn(2, 4), 0)
    assert found.layers == ("0",)


def test_gae_notices_on_the_digit_vit():
    pytest.importorskip("timm")
    from captum_attn import GenericAttention
    from captum_attn.toy.digit_vit import load_digit_vit
    from captum_attn.toy.scenes import scenes

    model, batch = load_digit_vit(), scenes(4)
    found = parameter_randomization(
        GenericAttention(model), batch.images, batch.labels[:, 0],
        layers=["head", "blocks.5", "blocks.4", "blocks.3"],
    )  # fmt: skip
    assert float(found.similarity[:, -1].mean()) < 0.5


def test_randomisation_bad_input(model):
    x = torch.randn(2, 12)
    with pytest.raises(OptionError, match="no modules"):
        parameter_randomization(Saliency(model), x, 0, layers=["head"])
    with pytest.raises(OptionError, match="model="):
        parameter_randomization(Saliency(lambda x: model(x)), x, 0)
    found = parameter_randomization(Saliency(lambda x: model(x)), x, 0, model=model)
    assert len(found.layers) == 4
    with pytest.raises(InputError, match="no parameters"):
        parameter_randomization(Saliency(nn.Tanh()), x, 0)
    with pytest.raises(InputError, match="example 0 have NaN"):
        parameter_randomization(Saliency(model), x, 0, attributions=x / 0 * 0)
