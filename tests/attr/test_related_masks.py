"""TIS and ViT-CX against plain rewrites."""

from __future__ import annotations

import pytest
import torch

from captum_attn import TransformerInputSampling, VitCX, objectives
from captum_attn.attr.transformer_input_sampling import k_means
from captum_attn.errors import AttnError, InputError, OptionError, TargetError, WiringError
from tests import plain_related as plain
from tests.plain import close
from tests.zoo import ZOO, set_weights, timm_vit
from tests.zoo_streams import STREAMS


def vit(fused=True, **options):
    model = timm_vit(fused=fused, **options)
    set_weights(model)
    return model.double().eval()


def images(batch=2):
    return torch.randn(batch, 3, 16, 16, dtype=torch.float64)


def probability_of(model, x, kept, target):
    """Of one image, with [CLS] and the kept patches alone in the sequence."""
    tokens = [0, *(i + 1 for i in sorted(kept))]
    hook = model.blocks[0].register_forward_pre_hook(lambda m, args: (args[0][:, tokens],))
    with torch.no_grad():
        p = model(x[None])[0].softmax(-1)[target]
    hook.remove()
    return float(p)


# ------------------------------------------------------------ TIS
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("keep", [0.5, 0.3, (0.25, 0.7)])
def test_tis_of_given_centroids(keep, fused):
    model, x = vit(fused), images()
    centroids = torch.randn(12, 16, dtype=torch.float64)
    method = TransformerInputSampling(model)
    found = method.attribute_tokens(x, 2, centroids=centroids, keep=keep)["x"]
    assert (found[:, 0] == 0).all()
    for i in range(2):
        ratios = keep if isinstance(keep, tuple) else (keep,)
        masks = [plain.kept_tokens(c, ratio) for ratio in ratios for c in centroids]
        scores = [probability_of(model, x[i], mask, 2) for mask in masks]
        expected = torch.zeros(16, dtype=torch.float64)
        values = plain.tis(masks, scores)
        expected[: len(values)] = values
        close(found[i, 1:], expected)


def test_tis_clusters_the_outputs_of_all_blocks():
    """With as many clusters as components, each is a mask of its own."""
    model, x, outputs = vit(), images(), []
    hooks = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in model.blocks]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    vectors = torch.cat(outputs, -1)[:, 1:].mT  # (B, L D, n)
    method = TransformerInputSampling(model)
    found = method.attribute_tokens(x, 1, perturbations_per_eval=7)["x"]
    given = method.attribute_tokens(x, 1, centroids=vectors, perturbations_per_eval=16)["x"]
    close(found, given)
    masks = [plain.kept_tokens(v, 0.5) for v in vectors[0]]
    scores = [probability_of(model, x[0], mask, 1) for mask in masks]
    close(found[0, 1:], plain.tis(masks, scores))


def test_k_means():
    vectors = torch.randn(40, 6, dtype=torch.float64)
    start = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:7]
    found = k_means(vectors, 7, torch.Generator().manual_seed(3))
    close(found, plain.k_means(vectors, start.tolist()))
    assert k_means(vectors[:5], 7, torch.Generator()) is not None
    many = torch.cat([vectors[:4]] * 10)  # 4 different ones: clusters are empty
    for row in k_means(many, 7, torch.Generator().manual_seed(0)):
        assert float((many - row).norm(dim=1).min()) < 1e-12


def test_tis_is_seeded_and_alike_in_a_batch_and_alone():
    model, x = vit(), images(3)
    method = TransformerInputSampling(model)

    def tokens(x, **options):
        return method.attribute_tokens(
            x, 1, n_masks=9, perturbations_per_eval=9, **options)["x"]  # fmt: skip

    together = tokens(x)
    for i in range(3):
        close(tokens(x[i : i + 1]), together[i : i + 1])
    close(tokens(x, internal_batch_size=2), together)
    close(tokens(x, seed=0), together)
    assert not torch.equal(tokens(x, seed=1), together)
    centroids = torch.randn(3, 5, 16, dtype=torch.float64)
    one = method.attribute_tokens(x, 1, centroids=centroids)["x"]
    close(method.attribute_tokens(x, 1, centroids=centroids, internal_batch_size=2)["x"], one)
    close(method.attribute_tokens(x[1:2], 1, centroids=centroids[1])["x"], one[1:2])


def test_targets_share_the_masks_of_tis(capsys):
    model, x = vit(), images()
    method = TransformerInputSampling(model)
    options = {"n_masks": 6, "perturbations_per_eval": 6}
    each = list(method.attribute_each(x, [1, 3, torch.tensor([0, 2])], **options))
    for found, target in zip(each, (1, 3, [0, 2]), strict=True):
        close(found, method.attribute(x, target, **options))
    method.attribute(x, 1, show_progress=True, **options)
    assert "Transformer Input Sampling" in capsys.readouterr().err
    with pytest.raises(OptionError, match="no matrices"):
        method.relevance_maps(x, 1)
    assert "x" in str(method.describe(x, 1))


def test_tis_says_what_it_is_meant_for():
    case = ZOO["vit_mean"]
    with pytest.raises(WiringError, match="reads a token such as"):
        TransformerInputSampling(case.model()).attribute(case.sample().inputs, 1)
    clip = STREAMS["clip"]
    with pytest.raises(WiringError, match="one stream of tokens"):
        TransformerInputSampling(clip.model()).attribute(
            clip.sample().one(0).inputs, 0, objective=objectives.logit
        )
    model, x = vit(num_classes=1), images()
    with pytest.raises(TargetError, match="always 1"):
        TransformerInputSampling(model).attribute(x, 0)
    scored = TransformerInputSampling(model).attribute(
        x, 0, objective=objectives.logit, n_masks=3)  # fmt: skip
    assert scored.any()
    for options in ({"keep": 0.0}, {"keep": (0.5, 2.0)}, {"n_masks": 0}, {"seed": -1},
                    {"centroids": torch.zeros(2, 3)}, {"perturbations_per_eval": 0}):  # fmt: skip
        (name,) = options
        with pytest.raises(OptionError, match=name):
            TransformerInputSampling(vit()).attribute(x, 0, **options)


# ------------------------------------------------------------ ViT-CX
def masks_of(model, x, threshold):
    """The model's own, of one image, from the normalised input of the last block."""
    seen = []
    hook = model.blocks[-1].norm1.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(x[None])
    hook.remove()
    return plain.vit_cx_masks(seen[0][0, 1:].T.reshape(-1, 4, 4), (16, 16), threshold)


def p_of(model, target):
    def p(x):
        with torch.no_grad():
            return float(model(x[None])[0].softmax(-1)[target])

    return p


@pytest.mark.parametrize("fused", [True, False])
def test_vit_cx_of_given_masks_and_noise(fused):
    model, x = vit(fused), images()
    masks = torch.rand(5, 16, 16, dtype=torch.float64)
    masks[:, 3, 4] = 0  # covered by none
    noise = torch.randn(5, 3, 16, 16, dtype=torch.float64) * 0.1
    found = VitCX(model).attribute(x, 2, masks=masks, noise=noise, perturbations_per_eval=3)
    for i in range(2):
        expected = plain.vit_cx(x[i], list(masks), list(noise), p_of(model, 2))
        close(found[i].sum(0), expected)
        close(found[i], (expected / 3).expand(3, -1, -1))
        assert expected[3, 4] == 0


@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_vit_cx_makes_its_masks(threshold):
    model, x = vit(), images()
    options = {"noise": 0.0, "threshold": threshold, "perturbations_per_eval": 4}
    found = VitCX(model).attribute(x, 1, **options)
    for i in range(2):
        masks = masks_of(model, x[i], threshold)
        assert 1 < len(masks) < 16
        nothing = [torch.zeros(3, 16, 16, dtype=torch.float64)] * len(masks)
        close(found[i].sum(0), plain.vit_cx(x[i], masks, nothing, p_of(model, 1)))


def test_vit_cx_is_seeded_and_alike_in_a_batch_and_alone():
    model, x = vit(), images(3)
    method = VitCX(model)
    together = method.attribute(x, 1, perturbations_per_eval=8)
    for i in range(3):
        close(method.attribute(x[i : i + 1], 1), together[i : i + 1])
    close(method.attribute(x, 1, internal_batch_size=2), together)
    assert not torch.equal(method.attribute(x, 1, seed=1), together)
    masks = torch.rand(3, 4, 16, 16, dtype=torch.float64)
    noise = torch.rand(3, 4, 3, 16, 16, dtype=torch.float64)
    own = method.attribute(x, 1, masks=masks, noise=noise)
    close(method.attribute(x, 1, masks=masks, noise=noise, internal_batch_size=1), own)
    each = list(method.attribute_each(x, [1, 2]))
    close(each[0], together)
    close(each[1], method.attribute(x, 2))


def test_vit_cx_says_what_it_is_meant_for():
    bert, video = ZOO["bert"], ZOO["videomae"]
    for case in (bert, video):
        sample = case.sample()
        with pytest.raises(InputError, match="meant for an image"):
            VitCX(case.model()).attribute(sample.inputs, 1, sample.extra)
    model, x = vit(), images()
    with pytest.raises(OptionError, match="masks: expected a Tensor"):
        VitCX(model).attribute(x, 1, masks=torch.zeros(4, 5, 5))
    with pytest.raises(OptionError, match="noise: expected"):
        VitCX(model).attribute(x, 1, masks=torch.zeros(4, 16, 16), noise=torch.zeros(3, 3, 16, 16))
    with pytest.raises(AttnError, match="of the inputs' elements, not of tokens"):
        VitCX(model).attribute_tokens(x, 1)
