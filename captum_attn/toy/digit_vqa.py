"""The demo's two-stream model: a tiny LXMERT that answers questions about the digits of a scene.

It reads a question, word by word, and the regions of a scene, box by box. Six boxes a scene: those
of its two digits and four of background, in random order. A region's features are the pixels under
its box, resized to 10 x 10 by RoIAlign: nothing in them is learned, and what a region shows only
the model can say.

Questions are of two kinds, both with as many right answers "yes" as "no": whether a digit is there,
and whether a digit is the one on a side. Neither the words nor the picture alone tell the answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.ops import roi_align
from transformers import LxmertConfig, LxmertForQuestionAnswering

from captum_attn.toy.scenes import IMAGE_SIZE, NUM_CLASSES, SceneBatch, _uniform
from captum_attn.toy.vocabulary import DIGITS, FIGURES, MAX_TOKENS, SIDES, VOCABULARY

WEIGHTS = Path(__file__).parent / "weights" / "digit_vqa.safetensors"

ANSWERS = ("no", "yes")
NO, YES = range(2)
BACKGROUND = -1  # in place of a region's digit
GRID = 10  # a region's pixels are resized to 10 x 10
NUM_BACKGROUND = 4  # regions of a scene that show no digit
PRESENCE = (
    "is there a {digit} ?",
    "is there a {digit} in the picture ?",
    "do you see a {digit} ?",
    "can you see the digit {digit} ?",
    "does the picture show a {digit} ?",
)
SIDE = (
    "is the {side} digit a {digit} ?",
    "is the digit {on} the {side} a {digit} ?",
    "do you see a {digit} {on} the {side} ?",
)

_BOX_SIZES = ((16.0, 32.0), (28.0, 38.0))  # width and height of boxes of background, pixels
_CANDIDATES = 64  # boxes drawn for each one of background; the one with the least ink stays
_MARGIN = 1.0  # least distance of a digit's ink to its box, pixels
# Added to seeds: scenes, regions and questions of one seed must not share their random numbers.
_REGIONS, _QUESTIONS = 10**12, 2 * 10**12


class Regions(NamedTuple):
    """The regions of a batch of scenes, six each in random order.

    Attributes:
        visual_feats (Tensor): ``(B, 6, 100)``, float32 in [0, 1], the pixels under each box.
        visual_pos (Tensor): ``(B, 6, 4)``, float32 in [0, 1], the boxes over the image's size.
        boxes (Tensor): ``(B, 6, 4)``, float32, (x1, y1, x2, y2) in pixels.
        digits (Tensor): ``(B, 6)``, int64, the digit that a box holds, -1 for background. For
            drawing questions and for measuring; the model does not see it.
    """

    visual_feats: Tensor
    visual_pos: Tensor
    boxes: Tensor
    digits: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model takes: visual_feats and visual_pos."""
        return {"visual_feats": self.visual_feats, "visual_pos": self.visual_pos}


class Questions(NamedTuple):
    """One question per scene.

    Attributes:
        texts (list of str): ``"is there a 3 ?"``.
        digits (Tensor): ``(B,)``, int64, the digit asked for.
        sides (list of str): "left", "right", "top" or "bottom"; "" where any side will do.
        answers (Tensor): ``(B,)``, int64, 1 for yes and 0 for no.
    """

    texts: list[str]
    digits: Tensor
    sides: list[str]
    answers: Tensor


# ---------------------------------------------------------------------------------- questions
def questions(found: Regions, seed: int = 0) -> Questions:
    """Draws one question about every scene. Equal arguments give equal questions.

    Half of them ask whether a digit is there at all, half whether it is the one on a side; the
    side is along the axis on which the two digits are further apart. Half have the answer yes. Of
    those about a side whose answer is no, three in four name the digit on the other side.

    Args:
        found (Regions): the regions of the scenes.
        seed (int, optional): seed of the questions. Default: 0.

    Returns:
        Questions: texts, digits, sides and answers.

    Examples::

        >>> found = regions(scenes(2, split="test"))
        >>> asked = questions(found)
        >>> logits = model(**tokenize(asked.texts), **found.inputs).question_answering_score
    """
    rng = torch.Generator().manual_seed(seed + _QUESTIONS)
    n = len(found.digits)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=rng)

    which, about_side, answers, elsewhere = draw(2), draw(2), draw(2), draw(4)
    shown, centres = _shown(found)
    apart = centres[:, 1] - centres[:, 0]  # (n, 2) as (x, y)
    axis = apart.abs().argmax(1)
    second = (apart.gather(1, axis[:, None])[:, 0] > 0).long()  # who stands right or below
    right_or_below = (which == second).long()
    this, other = (shown.gather(1, i[:, None])[:, 0] for i in (which, 1 - which))
    low, high = shown.amin(1), shown.amax(1)
    absent = draw(NUM_CLASSES - 2)
    absent = absent + (absent >= low)
    absent = absent + (absent >= high)
    wrong = torch.where((about_side * elsewhere).bool(), other, absent)
    digits = torch.where(answers == YES, this, wrong)
    form, as_word = draw(len(PRESENCE) * len(SIDE)), draw(2)
    texts, sides = [], []
    for i in range(n):
        side = SIDES[axis[i]][right_or_below[i]] if about_side[i] else ""
        forms = SIDE if side else PRESENCE
        digit = (DIGITS if as_word[i] else FIGURES)[digits[i]]
        on = "on" if side in SIDES[0] else "at"
        texts.append(forms[form[i] % len(forms)].format(digit=digit, side=side, on=on))
        sides.append(side)
    return Questions(texts, digits, sides, answers)


def _shown(found: Regions) -> tuple[Tensor, Tensor]:
    """The two digits ``(n, 2)`` of every scene and the centres ``(n, 2, 2)`` of their boxes."""
    digits, boxes = found.digits.cpu(), found.boxes.cpu()
    at = (digits != BACKGROUND).nonzero()[:, 1].view(-1, 2)
    corners = boxes.gather(1, at[..., None].expand(-1, -1, 4)).unflatten(-1, (2, 2))
    return digits.gather(1, at), corners.mean(2)


# ---------------------------------------------------------------------------------- regions
def region_features(images: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """What the model is given of boxes in images; nothing in it is learned.

    Args:
        images (Tensor): ``(B, 1, H, W)`` in [0, 1].
        boxes (Tensor): ``(B, R, 4)`` as (x1, y1, x2, y2) in pixels.

    Returns:
        dict: ``visual_feats`` ``(B, R, 100)``, the pixels under every box resized to 10 x 10
        (RoIAlign: the mean of 3 x 3 bilinear samples in each cell), row by row; ``visual_pos``
        ``(B, R, 4)``, the boxes over the image's size.

    Examples::

        >>> region_features(images, torch.tensor([[[0.0, 0.0, 32.0, 32.0]]]))["visual_pos"]
        tensor([[[0.0000, 0.0000, 0.5000, 0.5000]]])
    """
    pixels = roi_align(images, list(boxes), GRID, sampling_ratio=3, aligned=True)
    height, width = images.shape[-2:]
    return {
        "visual_feats": pixels.flatten(1).unflatten(0, boxes.shape[:2]),
        "visual_pos": boxes / boxes.new_tensor([width, height, width, height]),
    }


def regions(batch: SceneBatch, seed: int = 0) -> Regions:
    """Boxes around the digits of scenes and on their background. Equal arguments, equal boxes.

    A digit's box leaves a margin of 1 to 3 pixels around its ink. A box of background is, of
    64 random ones, the one with the least ink under it.

    Args:
        batch (SceneBatch): the scenes.
        seed (int, optional): seed of the boxes and of their order. Default: 0.

    Returns:
        Regions: six regions per scene.

    Examples::

        >>> regions(scenes(4, split="test")).visual_feats.shape
        torch.Size([4, 6, 100])
    """
    rng = torch.Generator().manual_seed(seed + _REGIONS)
    device, n = batch.images.device, len(batch.images)
    masks = batch.masks.cpu()
    boxes = torch.cat([_digit_boxes(masks, rng), _background_boxes(masks, rng)], 1)
    none = torch.full((n, NUM_BACKGROUND), BACKGROUND)
    digits = torch.cat([batch.labels.cpu(), none], 1)
    order = _uniform(rng, *digits.shape).argsort(1)
    boxes = boxes.gather(1, order[..., None].expand_as(boxes)).to(device)
    features = region_features(batch.images, boxes)
    return Regions(**features, boxes=boxes, digits=digits.gather(1, order).to(device))


def _digit_boxes(masks: Tensor, rng: torch.Generator) -> Tensor:
    """``(n, 2, 4)`` around the ink of masks ``(n, 2, 64, 64)``."""
    sides = []
    for axis in (-2, -1):  # rows are summed away for x, columns for y
        ink = masks.any(axis).byte()
        sides.append(torch.stack([ink.argmax(-1), IMAGE_SIZE - ink.flip(-1).argmax(-1)], -1))
    (x, y), room = sides, _MARGIN + _uniform(rng, len(masks), 2, 4, high=2.0)
    tight = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1).to(torch.float32)
    grown = torch.cat([tight[..., :2] - room[..., :2], tight[..., 2:] + room[..., 2:]], -1)
    return grown.clamp(0, IMAGE_SIZE)


def _background_boxes(masks: Tensor, rng: torch.Generator) -> Tensor:
    """``(n, 4, 4)``: whole pixels, so that the ink under a box is a sum over an integral image."""
    n = len(masks)
    shape = n, NUM_BACKGROUND, _CANDIDATES, 2
    low, high = torch.tensor(_BOX_SIZES, dtype=torch.float32).T
    size = (low + (high - low) * _uniform(rng, *shape)).round()
    start = ((IMAGE_SIZE - size) * _uniform(rng, *shape)).round()
    boxes = torch.cat([start, start + size], -1)  # (n, 4, 64, 4)
    ink = F.pad(masks.any(1).long().cumsum(1).cumsum(2), [1, 0, 1, 0])
    x1, y1, x2, y2 = boxes.long().unbind(-1)
    scene = torch.arange(n)[:, None, None]
    under = ink[scene, y2, x2] - ink[scene, y1, x2] - ink[scene, y2, x1] + ink[scene, y1, x1]
    best = under.argmin(-1)[..., None, None]  # the first of equals
    return boxes.gather(2, best.expand(-1, -1, 1, 4))[:, :, 0]


# ---------------------------------------------------------------------------------- model
def build_digit_vqa() -> LxmertForQuestionAnswering:
    """An untrained digit LXMERT of 0.36 M parameters, exactly as transformers makes it.

    One layer for the words alone, one for the regions alone, two that cross; width 64.

    Returns:
        LxmertForQuestionAnswering: from ``input_ids``, ``attention_mask``, ``visual_feats`` and
        ``visual_pos`` to ``question_answering_score`` ``(B, 2)``, a logit each for no and yes
        (trained with a sigmoid each).

    Examples::

        >>> inputs = tokenize("is there a 3 ?") | regions(scenes(1)).inputs
        >>> build_digit_vqa()(**inputs).question_answering_score.shape
        torch.Size([1, 2])
    """
    return LxmertForQuestionAnswering(
        LxmertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            num_attention_heads=4,
            intermediate_size=256,
            l_layers=1,
            r_layers=1,
            x_layers=2,
            max_position_embeddings=MAX_TOKENS,
            visual_feat_dim=GRID * GRID,
            num_qa_labels=len(ANSWERS),
            initializer_range=0.1,  # the default is meant for a width of 768
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def load_digit_vqa(weights: str | Path = WEIGHTS) -> LxmertForQuestionAnswering:
    """The trained digit LXMERT, in evaluation mode and float32.

    It answers 99 % of the questions about scenes of held-out digits right.

    Args:
        weights (str or Path, optional): a safetensors file that ``train_vqa`` wrote. Default: the
            weights in the package.

    Returns:
        LxmertForQuestionAnswering: :func:`build_digit_vqa` with the weights loaded.

    Examples::

        >>> model, found = load_digit_vqa(), regions(scenes(4, split="test"))
        >>> asked = questions(found)
        >>> logits = model(**tokenize(asked.texts), **found.inputs).question_answering_score
        >>> logits.argmax(1) == asked.answers
        tensor([True, True, True, True])
    """
    model = build_digit_vqa()
    model.load_state_dict({name: w.float() for name, w in load_file(weights).items()})
    return model.eval()


def save_digit_vqa(model: LxmertForQuestionAnswering, path: str | Path) -> None:
    """Writes the weights in half precision.

    Args:
        model (LxmertForQuestionAnswering): a digit LXMERT.
        path (str or Path): the safetensors file to write.

    Returns:
        None

    Examples::

        >>> save_digit_vqa(model, "digit_vqa.safetensors")
    """
    half = {name: w.detach().cpu().to(torch.float16) for name, w in model.state_dict().items()}
    save_file(half, path)
