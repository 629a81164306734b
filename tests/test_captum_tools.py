"""Captum's own tools take the methods as they take Captum's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import pytest
import torch
from captum.attr import GradientAttribution, NoiseTunnel, visualization
from captum.attr._utils.attribution import Attribution
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor

from captum_attn import AttentionRollout, GenericAttention, RawAttention, objectives
from captum_attn.errors import AttnError
from tests.zoo import ZOO

matplotlib.use("Agg")
METHODS = [RawAttention, AttentionRollout, GenericAttention]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return ZOO["vit_cls"].model()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return ZOO["vit_cls"].sample().inputs


def embeddings() -> tuple[Callable, Tensor, Tensor]:
    """-> BERT as a function of embeddings and their mask, and both."""
    case = ZOO["bert_embeddings"]
    sample = case.sample()
    assert sample.extra is not None
    return case.function(case.model()), sample.inputs, sample.extra[0]


def ids() -> tuple[Callable, Tensor, Tensor]:
    """-> BERT as a function of ids and their mask, and both."""
    model, sample = ZOO["bert"].model(), ZOO["bert"].sample()

    def classify(input_ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=input_ids, attention_mask=mask).logits

    return classify, sample.inputs["input_ids"], sample.inputs["attention_mask"]


# ------------------------------------------------------------------ what the classes are
def test_classes_are_captum_s() -> None:
    model = ZOO["vit_cls"].model()
    for method, name in (
        (RawAttention, "Raw Attention"),
        (AttentionRollout, "Attention Rollout"),
        (GenericAttention, "Generic Attention (GAE)"),
    ):
        assert isinstance(method(model), Attribution)
        assert method.get_name() == name
        assert method(model).forward_func is model
    assert isinstance(GenericAttention(model), GradientAttribution)


@every_method
def test_attribute_is_logged_as_captum_s_are(method: Any, vit: Any, images: Tensor) -> None:
    """Captum Insights calls `attribute.__wrapped__` with a tuple and a scalar-tensor target."""
    unwrapped = method.attribute.__wrapped__
    assert unwrapped is not method.attribute
    explain = method(vit)
    result = unwrapped(explain, (images[:1],), target=torch.tensor(1))
    assert isinstance(result, tuple)
    close(result[0], explain.attribute(images[:1], target=1))


# ------------------------------------------------------------------ targets, arguments, callables
@pytest.mark.parametrize(
    "target",
    [torch.tensor(1), torch.tensor([1]), [1, 1, 1], torch.tensor([1, 1, 1]), (1,), [(1,)] * 3],
    ids=str,
)
def test_target_forms_for_classes(target: Any, vit: Any, images: Tensor) -> None:
    explain = GenericAttention(vit)
    close(explain.attribute(images, target=target), explain.attribute(images, target=1))


@pytest.mark.parametrize("targets", [[3, 0, 4], torch.tensor([3, 0, 4])], ids=str)
def test_each_example_its_own_target(targets: Any, vit: Any, images: Tensor) -> None:
    explain = GenericAttention(vit)
    together = explain.attribute(images, target=targets)
    for i, target in enumerate((3, 0, 4)):
        close(together[i : i + 1], explain.attribute(images[i : i + 1], target=target))


def test_target_forms_for_three_axes() -> None:
    """(B, T, V): a (place, token) for all, or one for each."""
    case = ZOO["gpt2_right"]
    inputs = case.sample().inputs
    explain = GenericAttention(case.model())
    same = explain.attribute(inputs, target=(2, 30))["input_ids"]
    close(explain.attribute(inputs, target=[(2, 30)] * 3)["input_ids"], same)
    assert (same[:, 3:] == 0).all()  # causal: what comes later is not read
    assert (same[:, :3] != 0).all()
    mixed = explain.attribute(inputs, target=[(2, 30), (1, 30), (3, 12)])["input_ids"]
    close(mixed[:1], same[:1])
    assert (mixed[1, 2:] == 0).all()
    assert mixed[2, 3] > 0


def test_no_target_for_a_scalar_output(vit: Any, images: Tensor) -> None:
    expected = GenericAttention(vit).attribute(images, target=2)
    for forward in (lambda x: vit(x)[:, 2], lambda x: vit(x)[:, 2:3]):
        close(GenericAttention(forward).attribute(images), expected)


@pytest.mark.parametrize("method", [RawAttention, AttentionRollout], ids=lambda m: m.__name__)
def test_class_agnostic_methods_need_no_target(method: Any, vit: Any, images: Tensor) -> None:
    close(method(vit).attribute(images), method(vit).attribute(images, target=3))


def test_additional_forward_args() -> None:
    classify, tokens, mask = ids()
    mapping = ZOO["bert"].sample().inputs
    expected = GenericAttention(ZOO["bert"].model()).attribute(mapping, target=1)["input_ids"]
    explain = GenericAttention(classify)
    for extra in (mask, (mask,)):  # a single one need not be a tuple
        found = explain.attribute(tokens, target=1, additional_forward_args=extra)
        assert found.dtype == torch.float32
        close(found, expected)
    # a model's own positional arguments, None among them; a wrong mask would tell
    found = GenericAttention(lambda i, t, m, p: ZOO["bert"].model()(i, m, t, p).logits).attribute(
        tokens, target=1, additional_forward_args=(None, mask, None)
    )
    close(found, expected)
    unmasked = explain.attribute(tokens, target=1, additional_forward_args=torch.ones_like(mask))
    assert (unmasked - expected).abs().max() > 1e-3


def test_arguments_that_are_no_tensors(vit: Any, images: Tensor) -> None:
    def forward(x: Tensor, scale: float, flip: bool) -> Tensor:
        return vit(x * scale if flip else x)

    found = GenericAttention(forward).attribute(
        images, target=1, additional_forward_args=(0.5, True)
    )
    close(found, GenericAttention(vit).attribute(images * 0.5, target=1))


@every_method
def test_a_lambda_and_a_bound_method(method: Any, vit: Any, images: Tensor) -> None:
    expected = method(vit).attribute(images, target=1)
    close(method(lambda x: vit(x)).attribute(images, target=1), expected)
    close(method(vit.forward).attribute(images, target=1), expected)


def test_objectives(vit: Any, images: Tensor) -> None:
    explain = GenericAttention(vit)
    logit = explain.attribute(images, target=1)
    close(explain.attribute(images, target=1, objective=objectives.logit), logit)
    close(explain.attribute(images, 1, objective=lambda output, target: output[:, target]), logit)
    close(explain.attribute(images, objective=lambda output, target: output[:, 1]), logit)

    difference = explain.attribute(images, objective=objectives.logit_difference(1, 4))
    assert (difference - logit).abs().max() > 1e-3
    head = torch.nn.Linear(5, 2, bias=False)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0, 1], head.weight[0, 4] = 1, -1
    close(difference, GenericAttention(lambda x: head(vit(x))).attribute(images, target=0))
    probability = explain.attribute(images, target=1, objective=objectives.probability)
    by_hand = GenericAttention(lambda x: vit(x).softmax(-1)).attribute(images, target=1)
    close(probability, by_hand)


# ------------------------------------------------------------------ grad modes
@every_method
@pytest.mark.parametrize("name", ["vit_cls", "bert", "encoder_mean", "mha", "gpt2_left"])
def test_works_without_grad(name: str, method: Any) -> None:
    case = ZOO[name]
    sample = case.sample()

    def explain() -> Tensor:
        explainer = method(case.function(case.model()))
        target = case.target_of(sample)
        return case.content_of(explainer.attribute(sample.inputs, target, sample.extra))

    expected = explain()
    with torch.no_grad():
        close(explain(), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        found = explain()
        assert torch.is_inference_mode_enabled()
    close(found.clone(), expected)


def test_inputs_made_in_inference_mode(vit: Any, images: Tensor) -> None:
    with torch.inference_mode():
        made = images * 1.0
        inside = GenericAttention(vit).attribute(made, target=1)
    expected = GenericAttention(vit).attribute(images, target=1)
    close(inside.clone(), expected)
    close(GenericAttention(vit).attribute(made, target=1), expected)


def test_inputs_that_require_grad(vit: Any, images: Tensor) -> None:
    wanted = images.clone().requires_grad_()
    found = GenericAttention(vit).attribute(wanted, target=1)
    close(found, GenericAttention(vit).attribute(images, target=1))
    assert wanted.requires_grad
    assert wanted.grad is None
    assert not found.requires_grad


# ------------------------------------------------------------------ metrics
def moved(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A perturbation that is a function of the inputs."""
    step = 0.1 * torch.cos(7 * inputs)
    return step, inputs - step


def test_infidelity(vit: Any, images: Tensor) -> None:
    attributions = GenericAttention(vit).attribute(images, target=1)
    found = infidelity(vit, moved, images, attributions, target=1, n_perturb_samples=2)
    step, there = moved(images)
    with torch.no_grad():
        change = vit(images)[:, 1] - vit(there)[:, 1]
    expected = ((step * attributions).flatten(1).sum(1) - change) ** 2
    close(found, expected, 1e-4)
    assert (found > 0).all()


def test_infidelity_of_embeddings() -> None:
    classify, vectors, mask = embeddings()
    attributions = GenericAttention(classify).attribute(
        vectors, target=1, additional_forward_args=mask
    )
    found = infidelity(
        classify, moved, vectors, attributions, additional_forward_args=mask, target=1,
        n_perturb_samples=1,
    )  # fmt: skip
    step, there = moved(vectors)
    with torch.no_grad():
        change = classify(vectors, mask)[:, 1] - classify(there, mask)[:, 1]
    close(found, ((step * attributions).flatten(1).sum(1) - change) ** 2, 1e-4)


@every_method
def test_sensitivity(method: Any, vit: Any, images: Tensor) -> None:
    explain = method(vit).attribute
    small, large = (
        sensitivity_max(explain, images, perturb_radius=radius, n_perturb_samples=2, target=1)
        for radius in (1e-4, 0.5)
    )
    assert (small < 0.01).all()
    assert (large > 10 * small).all()
    assert large.isfinite().all()


def test_sensitivity_of_embeddings() -> None:
    classify, vectors, mask = embeddings()
    small, large = (
        sensitivity_max(
            GenericAttention(classify).attribute, vectors, perturb_radius=radius,
            n_perturb_samples=2, target=[0, 1, 2], additional_forward_args=mask,
        )
        for radius in (1e-4, 0.5)
    )  # fmt: skip
    assert (small < 0.01).all()
    assert (large > 10 * small).all()


# ------------------------------------------------------------------ NoiseTunnel
@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq"])
@pytest.mark.parametrize("target", [1, [1, 0, 2], torch.tensor([1, 0, 2])], ids=str)
def test_noise_tunnel(nt_type: str, target: Any, vit: Any, images: Tensor) -> None:
    explain = GenericAttention(vit)
    tunnel = NoiseTunnel(explain)
    plain = explain.attribute(images, target=target)
    still = tunnel.attribute(
        images, nt_type=nt_type, nt_samples=3, stdevs=0.0, nt_samples_batch_size=2, target=target
    )
    close(still, plain if nt_type == "smoothgrad" else plain**2)
    noisy = tunnel.attribute(images, nt_type=nt_type, nt_samples=3, stdevs=0.3, target=target)
    assert noisy.shape == images.shape
    assert noisy.isfinite().all()
    assert (noisy - still).abs().max() > 1e-3 * still.abs().max()


def test_noise_tunnel_is_the_mean_over_noisy_inputs(vit: Any, images: Tensor) -> None:
    explain = GenericAttention(vit)
    torch.manual_seed(3)
    smooth = NoiseTunnel(explain).attribute(images, nt_samples=4, stdevs=0.2, target=1)
    torch.manual_seed(3)
    spread = images.repeat_interleave(4, 0)
    noisy = torch.normal(spread, 0.2)
    expected = explain.attribute(noisy, target=1).view(3, 4, 3, 16, 16).mean(1)
    close(smooth, expected)


def test_noise_tunnel_on_embeddings() -> None:
    classify, vectors, mask = embeddings()
    explain = GenericAttention(classify)
    plain = explain.attribute(vectors, target=1, additional_forward_args=mask)
    still = NoiseTunnel(explain).attribute(
        vectors, nt_samples=2, stdevs=0.0, target=1, additional_forward_args=mask
    )
    close(still, plain)


def test_noise_tunnel_repeats_a_readout(vit: Any, images: Tensor) -> None:
    """Captum repeats inputs and targets but not `readout`: rows of its own for each example."""
    explain = GenericAttention(vit)
    rows = torch.tensor([0, 4, 7])
    plain = explain.attribute(images, target=1, readout=rows)
    still = NoiseTunnel(explain).attribute(images, nt_samples=3, stdevs=0.0, target=1, readout=rows)
    close(still, plain)
    assert (plain[1] - explain.attribute(images, target=1)[1]).abs().max() > 1e-3


# ------------------------------------------------------------------ ids and mappings
def test_noise_on_ids_names_inputs_embeds() -> None:
    classify, tokens, mask = ids()
    tunnel = NoiseTunnel(GenericAttention(classify))
    with pytest.raises(AttnError, match="inputs_embeds"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tunnel.attribute(tokens, stdevs=0.1, target=1, additional_forward_args=mask)


def test_sensitivity_of_ids_names_inputs_embeds() -> None:
    classify, tokens, mask = ids()
    with pytest.raises(AttnError, match="inputs_embeds"):
        sensitivity_max(
            GenericAttention(classify).attribute, tokens, target=1, additional_forward_args=mask
        )


def test_float_ids_name_inputs_embeds() -> None:
    inputs = dict(ZOO["bert"].sample().inputs)
    inputs["input_ids"] = inputs["input_ids"] + 0.25
    with pytest.raises(AttnError, match="inputs_embeds"):
        GenericAttention(ZOO["bert"].model()).attribute(inputs, target=1)


def test_mapping_in_a_tool_is_refused(left_as_found: Any) -> None:
    """Captum itself may refuse it before the method sees it; nothing may come out."""
    model, inputs = ZOO["bert"].model(), ZOO["bert"].sample().inputs
    with left_as_found(model, inputs), pytest.raises((AttnError, AssertionError, TypeError)):
        NoiseTunnel(GenericAttention(model)).attribute(inputs, target=1)


# ------------------------------------------------------------------ pictures
@every_method
def test_visualize_image(method: Any, vit: Any, images: Tensor) -> None:
    attributions = method(vit).attribute(images, target=1)
    total = attributions[0].sum(0)
    figure, axis = visualization.visualize_image_attr(
        attributions[0].permute(1, 2, 0).numpy(),
        images[0].permute(1, 2, 0).sigmoid().numpy(),
        method="heat_map",
        sign="positive",
        outlier_perc=0,
        use_pyplot=False,
    )
    shown = torch.as_tensor(axis.images[0].get_array().data)
    close(shown.float(), (total / total.max()).float(), 1e-4)


def test_visualize_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins where IPython is not installed: what is asked for is the page itself."""
    monkeypatch.setattr(visualization, "HAS_IPYTHON", True, raising=False)
    monkeypatch.setattr(visualization, "HTML", str, raising=False)
    monkeypatch.setattr(visualization, "display", lambda page: None, raising=False)
    inputs = ZOO["bert"].sample().inputs
    scores = GenericAttention(ZOO["bert"].model()).attribute(inputs, target=1)["input_ids"][0]
    scores = scores / scores.norm()
    words = [f"word{i}" for i in inputs["input_ids"][0].tolist()]
    record = visualization.VisualizationDataRecord(
        scores, 0.9, "yes", "yes", "yes", float(scores.sum()), words, 0.0
    )
    page = visualization.visualize_text([record], legend=False)
    assert all(word in page for word in words)
    lightness = visualization._get_color(float(scores.max()))
    assert lightness in page
    assert lightness != visualization._get_color(float(scores.min()))
