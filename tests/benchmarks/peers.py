"""Other explanations of the same model, for the benchmark: Captum's, grad-cam's and LXT's.

`grad-cam` and `lxt` are not installed with the tests (`pip install grad-cam lxt`); a peer that
cannot be imported is left out of the table, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_attn import GenericAttention

Call = Callable[[Tensor], object]
STEPS = 50


def saliency(model: nn.Module, target: int) -> Call:
    return lambda x: Saliency(model).attribute(x.clone().requires_grad_(), target=target)


def integrated_gradients(model: nn.Module, target: int) -> Call:
    """50 steps, as many at a time as the batch has examples, which is no slower on the CPU."""
    method = IntegratedGradients(model)
    return lambda x: method.attribute(
        x, target=target, n_steps=STEPS, internal_batch_size=max(len(x), 4)
    )


def generic(model: nn.Module, target: int) -> Call:
    """Ours, where a peer is measured on another package's ViT."""
    method = GenericAttention(model)
    return lambda x: method.attribute(x, target=target)


def grad_cam(model: nn.Module, target: int) -> Call:
    """Grad-CAM on the last block's first norm, as the package's page on ViTs has it."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def as_images(tokens: Tensor) -> Tensor:
        side = round((tokens.shape[1] - 1) ** 0.5)
        return tokens[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)

    layers = [model.blocks[-1].norm1]  # type: ignore[index, union-attr]
    cam = GradCAM(model=model, target_layers=layers, reshape_transform=as_images)
    wanted = ClassifierOutputTarget(target)
    # The parameters are frozen, so that the input has to ask for the gradient.
    return lambda x: cam(input_tensor=x.clone().requires_grad_(), targets=[wanted] * len(x))


def lxt(model: nn.Module, target: int) -> Call:
    """AttnLRP of a torchvision ViT: one forward and backward through LXT's layers."""
    from lxt.efficient.models.vit_torch import cp_LRP

    def call(x: Tensor) -> Tensor:
        with patched(cp_LRP):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(model(x)[:, target].sum(), x)[0] * x

    return call


@contextmanager
def patched(patches: dict[type, Callable[[type], Any]]) -> Iterator[None]:
    """LXT changes classes of torch for the whole process; here they are put back."""
    before = {changed: dict(vars(changed)) for changed in patches}
    try:
        for changed, patch in patches.items():
            patch(changed)
        yield
    finally:
        for changed, attributes in before.items():
            for name in set(vars(changed)) - set(attributes):
                delattr(changed, name)
            for name, value in attributes.items():
                if vars(changed)[name] is not value:
                    setattr(changed, name, value)
