"""What stands where something was removed: constants, the mean, blur, imputation, or nothing.

A fill is passed as `fill=` to every metric that perturbs: one of the objects here, or short for
it: "zero", "mean", "blur", "noisy_linear", "remove", "delete", "hide", a number (a colour, the id
of a mask or pad token) or a tensor that broadcasts to the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics._checks import a_tensor, choice, number, positive_int

__all__ = ["Blur", "Constant", "Fill", "Hide", "Mean", "NoisyLinear", "Remove"]

# (rows (S,), removed (S, ...)) -> the copies of these examples without what was removed
Filler = Callable[[Tensor, Tensor], Tensor]


class Fill:
    """Base of the fills: a subclass says what an example looks like when all of it is removed."""

    def baseline(self, inputs: Tensor) -> Tensor:
        """(B, ...), broadcasting to the inputs."""
        raise NotImplementedError

    def prepare(self, inputs: Tensor) -> Filler:
        """Does once per batch what need not be done per copy."""
        whole = self.baseline(inputs).to(inputs).expand(inputs.shape)
        return lambda rows, removed: torch.where(removed, whole[rows], inputs[rows])


@dataclass(frozen=True, eq=False)
class Constant(Fill):
    """One value for all: a number, or a tensor that broadcasts to the input (B, ...).

    For token ids, the id of the mask or pad token.
    """

    value: float | Tensor

    def baseline(self, inputs: Tensor) -> Tensor:
        value = torch.as_tensor(self.value, device=inputs.device)
        if not inputs.is_floating_point() and (value != value.to(inputs.dtype)).any():
            raise OptionError(f"fill: token ids are whole numbers, got {self.value!r}")
        try:
            return value.to(inputs.dtype).expand(inputs.shape)
        except RuntimeError as error:
            raise OptionError(
                f"fill: a tensor of shape {tuple(value.shape)} does not broadcast to the input of "
                f"shape {tuple(inputs.shape)}"
            ) from error


@dataclass(frozen=True, eq=False)
class Mean(Fill):
    """The example's own mean: of each channel of an image, of each component over the tokens.

    Args:
        over (Tensor, optional): bool, broadcasting to the input (B, ...): the elements that enter
            it. Default: all but padding, which an entry "attention_mask" or "pixel_mask" marks.
    """

    over: Tensor | None = None

    def baseline(self, inputs: Tensor) -> Tensor:
        _floating(inputs, "mean")
        axes = (1,) if inputs.ndim <= 3 else tuple(range(2, inputs.ndim))
        if self.over is None:
            return inputs.mean(axes, keepdim=True)
        try:
            over = (a_tensor("Mean(over)", self.over) != 0).to(inputs.device).expand(inputs.shape)
        except RuntimeError as error:
            raise OptionError(
                f"fill: Mean(over) of shape {tuple(self.over.shape)} does not broadcast to the "
                f"input of shape {tuple(inputs.shape)}"
            ) from error
        total = inputs.masked_fill(~over, 0.0).sum(axes, keepdim=True)
        return total / over.sum(axes, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Blur(Fill):
    """The image, blurred by a Gaussian; what RISE inserts into (Petsiuk et al. 2018: 11, 5).

    The kernel is the Gaussian at whole pixels, made to add up to 1, and the image is mirrored at
    its border. RISE's code filters an 11 x 11 unit impulse with scipy, whose mirrored tails make
    the kernel flatter (0.0077 to 0.0088, here 0.0044 to 0.0120), and pads the image with zeros.
    For theirs, pass an image that was blurred in that way: `fill=blurred`.

    Args:
        kernel_size (int): odd, in pixels. Default: 11.
        sigma (float): in pixels. Default: 5.0.
    """

    kernel_size: int = 11
    sigma: float = 5.0

    def baseline(self, inputs: Tensor) -> Tensor:
        _floating(inputs, "blur")
        positive_int("fill: Blur(kernel_size)", self.kernel_size)
        number("fill: Blur(sigma)", self.sigma, 0, above=True)
        if self.kernel_size % 2 == 0:
            raise OptionError(f"fill: expected an odd kernel_size, got {self}")
        if inputs.ndim != 4 or min(inputs.shape[-2:]) <= self.kernel_size // 2:
            raise OptionError(
                f"fill: blur is for images (B, C, H, W) with sides above {self.kernel_size // 2} "
                f"pixels, got {tuple(inputs.shape)}: pass another fill, or Blur(kernel_size=...)"
            )
        from torchvision.transforms.functional import gaussian_blur

        return gaussian_blur(inputs, [self.kernel_size] * 2, [self.sigma] * 2)


# (row, column, weight) of half of a pixel's neighbours; the other half is opposite
_NEIGHBOURS = ((0, 1, 1 / 6), (1, 0, 1 / 6), (1, 1, 1 / 12), (1, -1, 1 / 12))


@dataclass(frozen=True)
class NoisyLinear(Fill):
    """ROAD's noisy linear imputation (Rong et al., ICML 2022, section 4.2).

    Every removed pixel is the weighted mean of its neighbours (1/6 for direct ones, 1/12 for
    diagonal ones, scaled up at the border), which is one sparse linear system per copy; then
    noise is added. An image that is removed altogether has nothing to impute from and becomes its
    mean.

    Args:
        noise (float): standard deviation of the noise, in units of the input. Default: 0.01.
        seed (int): of the noise, which is the same field for every example, so that results do
            not depend on the batch. Default: 0.
    """

    noise: float = 0.01
    seed: int = 0

    def prepare(self, inputs: Tensor) -> Filler:
        _floating(inputs, "noisy_linear")
        if inputs.ndim != 4:
            raise OptionError(
                f"fill: noisy_linear is for images (B, C, H, W), got {tuple(inputs.shape)}"
            )
        number("fill: NoisyLinear(noise)", self.noise, 0)
        positive_int("fill: NoisyLinear(seed)", self.seed, 0)
        from scipy.sparse.linalg import spsolve

        channels, *size = inputs.shape[1:]
        laplacian = _laplacian(*size)
        rng = torch.Generator().manual_seed(self.seed)
        noise = self.noise * torch.randn(
            channels, *size, generator=rng, dtype=torch.float64, device="cpu"
        )
        pixels = inputs.detach().double().cpu().flatten(2).numpy()  # (B, C, HW)

        def imputed(row: int, gone: np.ndarray) -> np.ndarray:
            image = pixels[row].copy()
            if gone.all():
                image[:] = image.mean(1, keepdims=True)
            elif gone.any():
                rows = laplacian[gone]
                right = -(rows[:, ~gone] @ image[:, ~gone].T)  # (removed, C)
                image[:, gone] = spsolve(rows[:, gone].tocsc(), right).reshape(-1, channels).T
            return image + noise.flatten(1).numpy() * gone

        def fill(rows: Tensor, removed: Tensor) -> Tensor:
            if removed.shape[1] != 1 and not (removed == removed[:, :1]).all():
                raise OptionError("fill: noisy_linear removes pixels with all their channels")
            gone = removed[:, 0].flatten(1).cpu().numpy()
            images = [imputed(r, g) for r, g in zip(rows.tolist(), gone, strict=True)]
            return torch.from_numpy(np.stack(images)).to(inputs).view(-1, *inputs.shape[1:])

        return fill


def _laplacian(height: int, width: int):  # type: ignore[no-untyped-def]
    """Sum of the weights of a pixel's neighbours, less the weights: (HW, HW), sparse."""
    from scipy.sparse import coo_array, diags_array

    index = np.arange(height * width).reshape(height, width)
    here, there, weights = [], [], []
    for down, right, weight in _NEIGHBOURS:
        columns = slice(max(0, -right), width - max(0, right))
        moved = slice(max(0, right), width + min(0, right))
        one, other = index[: height - down, columns].ravel(), index[down:, moved].ravel()
        here += [one, other]
        there += [other, one]
        weights += [np.full(2 * len(one), weight)]
    pairs = np.concatenate(here), np.concatenate(there)
    links = coo_array((np.concatenate(weights), pairs), shape=(index.size, index.size)).tocsr()
    return (diags_array(np.asarray(links.sum(1)).ravel()) - links).tocsr()


@dataclass(frozen=True)
class Remove:
    """The token is taken out of the attention; its id or its features stay.

    Args:
        mask (str or int): the attention mask whose entries become 0: a key of the inputs (all
            ones, where it is not there), or a position in `additional_forward_args`. Default:
            "attention_mask".
        close (str, optional): "start" or "end": the tokens that stay move together there, with all
            entries of their kind (integer or floating) and number, but "position_ids", and what
            was removed becomes padding at the other end. So the model sees the shorter sequence,
            as in GAE's code, whose positions close up. Default: removed tokens leave gaps.

    Where no token of an example would be left, the first one stays ([CLS], say, or the first
    region): what a softmax over nothing gives depends on its implementation.
    """

    mask: str | int = "attention_mask"
    close: str | None = None


@dataclass(frozen=True)
class Hide:
    """The tokens are hidden from the attention: no query sees their keys.

    For any model that `captum_attn` explains, with or without an attention mask, images too: a
    token is hidden where more than half of its elements are removed (`captum_attn.hide_tokens`).
    The inputs stay as they are. To find the tokens the model runs once more, with gradients, for
    every forward. What mixes tokens beside attention, a mean over all of them say, still sees them.
    """


def _floating(inputs: Tensor, name: str) -> None:
    if not inputs.is_floating_point():
        raise OptionError(
            f"fill: {name!r} means nothing for token ids: pass the id of the mask or pad token, "
            "or 'remove' to take tokens out of the attention"
        )


_NAMED: dict[str, Fill | Remove | Hide] = {
    "zero": Constant(0.0),
    "mean": Mean(),
    "blur": Blur(),
    "noisy_linear": NoisyLinear(),
    "remove": Remove(),
    "delete": Remove(close="start"),
    "hide": Hide(),
}


def fill_of(
    fill: str | float | Tensor | Fill | Remove | Hide, inputs: Tensor
) -> Fill | Remove | Hide:
    """The fill that is meant, for these inputs."""
    if isinstance(fill, Remove):
        if fill.close is not None:
            choice("Remove(close)", fill.close, ("start", "end"), " or None")
        if isinstance(fill.mask, bool) or not isinstance(fill.mask, (str, int)):
            raise OptionError(f"Remove(mask): expected a name or a position, got {fill.mask!r}")
        return fill
    if isinstance(fill, Constant):
        return Constant(_value(fill.value))
    if isinstance(fill, (Fill, Hide)):
        return fill
    if isinstance(fill, str):
        if fill not in _NAMED:
            raise OptionError(f"fill: expected one of {list(_NAMED)}, got {fill!r}")
        if fill == "zero":
            _floating(inputs, fill)
        return _NAMED[fill]
    return Constant(_value(fill))


def _value(value: Any) -> float | Tensor:
    """A number or a tensor that is there."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise OptionError(
            f"fill: expected one of {list(_NAMED)}, a number, a tensor or one of "
            f"captum_attn.metrics.fills, got {type(value).__name__}"
        )
    found = (
        a_tensor("fill", value)
        if isinstance(value, Tensor)
        else torch.as_tensor(value, device="cpu")
    )
    if not found.isfinite().all():
        raise InputError("fill: expected finite values, got NaN or infinity")
    return value
