"""Photographs of clothing (Fashion-MNIST, MIT), and pictures cut together of two of them.

Five hundred test pictures are in the package. The whole set is Debian's package
``dataset-fashion-mnist``, or what torchvision's ``FashionMNIST`` has downloaded::

    apt-get install dataset-fashion-mnist

Two pieces that are cut together meet at a border between two patches of the clothing ViT, so that
every patch shows one of them and the place of either is known: a map that follows the question
moves from one part to the other.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.toy.scenes import Split

PICTURES = Path(__file__).parent / "pictures" / "clothing.safetensors"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot")  # fmt: skip
SIDE, PATCH = 28, 4  # pixels
CUTS = (3 * PATCH, 4 * PATCH)  # where the second piece begins, from the left or from the top


class Clothing(NamedTuple):
    """Pictures of one piece of clothing each.

    Attributes:
        images (Tensor): ``(B, 1, 28, 28)``, float32 in [0, 1], light on a black ground.
        labels (Tensor): ``(B,)``, int64, positions in ``CLOTHES``.
    """

    images: Tensor
    labels: Tensor


class ClothingPairs(NamedTuple):
    """Pictures that are cut together of two different pieces of clothing.

    Attributes:
        images (Tensor): ``(B, 1, 28, 28)``, float32 in [0, 1].
        labels (Tensor): ``(B, 2)``, int64, the piece on the left or at the top first.
        masks (Tensor): ``(B, 2, 28, 28)``, bool, the part of either; together the whole picture.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor


@cache
def packaged_clothing() -> Clothing:
    """The 500 test pictures that the package carries, the first of the test set.

    Returns:
        Clothing: images ``(500, 1, 28, 28)`` and labels ``(500,)``.

    Examples::

        >>> images, labels = packaged_clothing()
    """
    kept = load_file(PICTURES)
    return Clothing(kept["images"][:, None].float() / 255, kept["labels"].long())


@cache
def clothing(split: Split = "test", folder: str | Path | None = None) -> Clothing:
    """The whole set: 60,000 pictures for training, 10,000 held out.

    Args:
        split (str, optional): ``"test"`` (default) or ``"train"``.
        folder (str or Path, optional): with the four files ``*-ubyte.gz``. Default: that of
            Debian's package; torchvision's is ``ROOT/FashionMNIST/raw``.

    Returns:
        Clothing: the pictures in the order of the set.

    Raises:
        InputError: where the files are not there.

    Examples::

        >>> images, labels = clothing("train")
    """
    if split not in ("train", "test"):
        raise InputError(f"split: expected 'train' or 'test', got {split!r}")
    at = DEBIAN if folder is None else Path(folder)
    kind = {"train": "train", "test": "t10k"}[split]
    images = _read(at / f"{kind}-images-idx3-ubyte.gz", 16).reshape(-1, 1, SIDE, SIDE)
    labels = _read(at / f"{kind}-labels-idx1-ubyte.gz", 8)
    return Clothing(torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long())


def _read(path: Path, head: int) -> np.ndarray:
    """The bytes of an IDX file behind its head."""
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), dtype=np.uint8)[head:].copy()
    except OSError as problem:
        raise InputError(
            f"cannot read '{path}' ({problem.strerror or problem}): expected the files of "
            "Fashion-MNIST; apt-get install dataset-fashion-mnist, or name torchvision's folder "
            "FashionMNIST/raw; packaged_clothing() needs neither"
        ) from problem


def clothing_pairs(n: int, seed: int = 0, of: Clothing | None = None) -> ClothingPairs:
    """Draws ``n`` pictures of two pieces cut together. Equal arguments give equal pairs.

    Half of them stand side by side, half above each other; the first has three or four of the
    seven columns or rows of patches.

    Args:
        n (int): how many pairs.
        seed (int, optional): of the draw. Default: 0.
        of (Clothing, optional): pictures to cut. Default: those in the package.

    Returns:
        ClothingPairs: images ``(n, 1, 28, 28)``, labels ``(n, 2)``, masks ``(n, 2, 28, 28)``.

    Examples::

        >>> pairs = clothing_pairs(4)
        >>> gae = GenericAttention(load_clothing_vit())
        >>> of_the_first = gae.attribute(pairs.images, pairs.labels[:, 0])
    """
    images, labels = packaged_clothing() if of is None else of
    rng = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(labels), (n, 2), generator=rng)
    while (alike := labels[picks[:, 0]] == labels[picks[:, 1]]).any():
        picks[alike, 1] = torch.randint(len(labels), (int(alike.sum()),), generator=rng)
    first = first_parts(n, rng)
    cut = torch.where(first[:, None], images[picks[:, 0]], images[picks[:, 1]])
    return ClothingPairs(cut, labels[picks], torch.stack([first, ~first], 1))


def first_parts(n: int, rng: torch.Generator) -> Tensor:
    """Where the first of two pieces is: (n, 28, 28), bool, on the left or at the top."""
    cut = torch.tensor(CUTS)[torch.randint(len(CUTS), (n, 1, 1), generator=rng)]
    left = (torch.arange(SIDE) < cut).expand(n, SIDE, SIDE)
    upright = torch.randint(2, (n, 1, 1), generator=rng) == 0
    return torch.where(upright, left, left.mT)
