"""Files as data sets: folders of images with their masks, and lines of text with their labels."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_attn._checks import FAILURES, finite, is_folder, shown, shown_error
from captum_attn._pictures import FORMATS
from captum_attn.errors import AttnError, InputError
from captum_attn.evaluation.batches import Batch

__all__ = ["ImageFolder", "TextFile"]

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(Dataset):
    """Pictures of a folder, in the order of their names; a sub-folder is a class.

    A sub-folder's name is a class's number, or a name in `classes`; where it is neither, classes
    count in the order of the names, as torchvision's do. Pictures that are in no sub-folder have
    no label.

    Args:
        root (str or Path): the folder.
        read (callable): path -> Tensor (C, H, W), as the model takes it.
        masks (str or Path, optional): a folder with a mask for every picture, under the same path
            but for the ending. 0 is background, everything else the object.
        read_mask (callable, optional): path -> Tensor (H, W), brought to the model's input as the
            pictures are. Default: the file as it is.
        classes (Mapping, optional): name -> number.

    Examples::

        >>> data = ImageFolder("val", read=lambda path: transform(Image.open(path)), masks="masks")
        >>> evaluate(model, data, [GenericAttention], ["segmentation"])
    """

    def __init__(
        self,
        root: str | Path,
        read: Callable[[Path], Tensor],
        masks: str | Path | None = None,
        read_mask: Callable[[Path], Tensor] | None = None,
        classes: Mapping[str, int] | None = None,
    ) -> None:
        if not isinstance(root, (str, PathLike)) or not str(root) or not callable(read):
            raise InputError(
                "expected ImageFolder(root, read): a folder, and a callable path -> tensor; got "
                f"{shown(root)}, {shown(read)}"
            )
        self.root, self.read = Path(root), read
        self.read_mask = read_mask or mask_as_it_is
        self.paths = _pictures(self.root)
        folders = [path.relative_to(self.root).parts[:-1] for path in self.paths]
        flat = [path for path, folder in zip(self.paths, folders, strict=True) if not folder]
        if flat and len(flat) < len(self.paths):
            raise InputError(
                f"'{flat[0]}' is in no sub-folder, but others are: expected all pictures in "
                "sub-folders, one per class, or none"
            )
        self.labels = None if flat else _numbers([folder[0] for folder in folders], classes or {})
        self.masks = None if masks is None else _masks(self.paths, self.root, Path(masks))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None, Tensor | None]:
        """(C, H, W), its label and its mask (H, W)."""
        path = self.paths[index]
        image = _read(self.read, path)
        mask = None
        if self.masks is not None:
            mask = as_bool(_read(self.read_mask, self.masks[index]))
            if mask.shape != image.shape[-2:]:
                raise InputError(
                    f"the mask '{self.masks[index]}' is {tuple(mask.shape)}, but '{path}' is "
                    f"{tuple(image.shape[-2:])}: expected masks of their pictures' size"
                )
        return image, None if self.labels is None else self.labels[index], mask

    def collate_fn(self, examples: Sequence[tuple[Tensor, int | None, Tensor | None]]) -> Batch:
        """A batch of examples."""
        images, labels, masks = zip(*examples, strict=True)
        truth = {} if self.masks is None else {"masks": torch.stack(masks)}
        return Batch(
            torch.stack(images), None if self.labels is None else torch.tensor(labels), truth=truth
        )


def _pictures(root: Path) -> list[Path]:
    if not is_folder(root):
        raise InputError(f"no folder at '{root}'; give a folder of pictures")
    found = [p for p in root.rglob("*") if p.suffix.lower() in IMAGES and p.is_file()]
    if not found:
        raise InputError(f"'{root}' has no pictures: expected files ending in {', '.join(IMAGES)}")
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _numbers(names: Sequence[str], classes: Mapping[str, int]) -> list[int]:
    """Classes by their numbers, by their names, or by their order."""
    different = sorted(set(names))
    if all(name.isdecimal() for name in different):
        return [int(name) for name in names]
    known = [name for name in different if name in classes]
    if known and len(known) < len(different):
        missing = next(name for name in different if name not in classes)
        raise InputError(
            f"the class {missing!r} is none of the model's: expected some of {list(classes)[:10]}"
        )
    place = classes if known else {name: i for i, name in enumerate(different)}
    return [place[name] for name in names]


def _masks(pictures: Sequence[Path], root: Path, masks: Path) -> list[Path]:
    if not is_folder(masks):
        raise InputError(f"no folder at '{masks}'; give a folder with a mask for every picture")
    at = {
        os.path.splitext(p.relative_to(masks))[0]: p
        for p in sorted(masks.rglob("*"))
        if p.suffix.lower() in IMAGES
    }
    names = [os.path.splitext(p.relative_to(root))[0] for p in pictures]
    missing = [name for name in names if name not in at]
    if missing:
        raise InputError(
            f"'{masks}' has no mask for '{missing[0]}' ({len(missing)} of {len(names)} are "
            "missing): expected a picture under the same path"
        )
    return [at[name] for name in names]


def _read(read: Callable[[Path], Tensor], path: Path) -> Tensor:
    try:
        return read(path)
    except AttnError:
        raise
    except (*FAILURES, OSError, SyntaxError) as problem:  # SyntaxError: a broken PNG
        raise InputError(f"cannot read '{path}' as a picture ({shown_error(problem)})") from problem


def as_bool(mask: Tensor) -> Tensor:
    """A mask of 0 and 1, or of 0 and 255, as bool; 0 is background, everything else the object."""
    return finite("a mask", mask, "0 is background, everything else the object") != 0


def mask_as_it_is(path: Path) -> Tensor:
    """A mask (H, W), bool."""
    import numpy as np
    from PIL import Image

    with Image.open(path, formats=FORMATS) as file:
        pixels = np.asarray(file)
    return torch.from_numpy((pixels if pixels.ndim == 2 else pixels[..., :3].any(-1)) != 0)


class TextFile(Dataset):
    """Lines of text, each with its label before a tab; or without any labels.

    After another tab a line may name the words that a person took for the reason, separated by
    commas: "sport", tab, "The goalkeeper saved the penalty.", tab, "goalkeeper, saved the penalty".
    All places where they stand in the text are marked, for the metrics that compare with
    rationales.

    Args:
        path (str or Path): a UTF-8 file; empty lines do not count.
        tokenizer (callable): of transformers; a fast one, where words are marked.
        classes (Mapping, optional): name -> number, for labels that are not numbers. Default: in
            the order of the names.
        max_length (int, optional): of a text, in tokens. Default: the tokenizer's.

    Attributes:
        texts (list of str), names (list of str or None): as in the file.
        spans (list or None): of every text, the (start, end) of what is marked, in characters.

    Special tokens cannot be removed, by `Batch.options`.

    Examples::

        >>> data = TextFile("reviews.tsv", tokenizer, {"negative": 0, "positive": 1})
        >>> evaluate(model, data, [GenericAttention], ["comprehensiveness"])
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any,
        classes: Mapping[str, int] | None = None,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.texts, self.names, self.spans = read_lines(path)
        self.labels = None if self.names is None else _numbers(self.names, classes or {})
        if self.spans is not None and not getattr(tokenizer, "is_fast", True):
            raise InputError(
                f"'{path}' marks words, but {type(tokenizer).__name__} does not say which token "
                "is which: expected a fast tokenizer of transformers"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[str, int | None, Spans | None]:
        """The text, its label, and what is marked in it."""
        label = None if self.labels is None else self.labels[index]
        return self.texts[index], label, None if self.spans is None else self.spans[index]

    def collate_fn(self, examples: Sequence[tuple[str, int | None, Spans | None]]) -> Batch:
        """A batch of examples, padded to its longest."""
        texts, labels, spans = zip(*examples, strict=True)
        inputs = dict(
            self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=self.max_length,
                return_tensors="pt", return_special_tokens_mask=True,
                return_offsets_mapping=self.spans is not None,
            )
        )  # fmt: skip
        removable, truth = inputs.pop("special_tokens_mask") == 0, {}
        if self.spans is not None:
            offsets = inputs.pop("offset_mapping")  # (B, n, 2)
            rows = [_overlap(o, s) for o, s in zip(offsets, spans, strict=True)]
            truth = {"rationales": torch.stack(rows), "rationale_mask": removable}
        return Batch(
            inputs,
            None if self.labels is None else torch.tensor(labels),
            truth=truth,
            options={"removable": removable},
        )


Spans = Sequence[tuple[int, int]]


class Lines(NamedTuple):
    """What a file of text holds."""

    texts: list[str]
    names: list[str] | None
    spans: list[Spans] | None


def _overlap(offsets: Tensor, spans: Spans) -> Tensor:
    """Which tokens (n,), of characters (n, 2), have any in the spans."""
    start, end = offsets.unbind(-1)
    inside = [(start < s[1]) & (end > s[0]) & (start < end) for s in spans]
    return torch.stack(inside).any(0)


def read_lines(path: str | Path) -> Lines:
    """The texts of a file, the names of their labels and what is marked, if it has any."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, TypeError, ValueError) as problem:
        raise InputError(f"cannot read {shown(path)} as text ({shown_error(problem)})") from problem
    numbered = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"'{path}' is empty: expected one text per line")
    parts = [[part.strip() for part in line.split("\t")] for _, line in numbered]
    columns = max(map(len, parts))
    if columns == 1:
        return Lines([text for (text,) in parts], None, None)
    for (number, _), found in zip(numbered, parts, strict=True):
        if len(found) != columns or columns > 3 or not all(found):
            raise InputError(
                f"line {number} of '{path}': expected a label, a tab and a text"
                f"{', a tab and the words that are marked' * (columns > 2)}, as in the other lines"
            )
    names, texts, *marked = map(list, zip(*parts, strict=True))
    if not marked:
        return Lines(texts, names, None)
    spans = [
        _spans(text, words, f"line {number} of '{path}'")
        for (number, _), text, words in zip(numbered, texts, marked[0], strict=True)
    ]
    return Lines(texts, names, spans)


def _spans(text: str, words: str, where: str) -> Spans:
    """Where the marked words stand."""
    found: list[tuple[int, int]] = []
    for phrase in filter(None, (word.strip() for word in words.split(","))):
        spans = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", text)]
        if not spans:
            raise InputError(f"{where}: expected words of the text to be marked, got {phrase!r}")
        found += spans
    return found
