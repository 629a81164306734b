"""Trains the digit LXMERT: ``python -m tutorials.training.train_vqa --out FILE``.

One bit per question teaches next to nothing at first, since a region's digit, the word for it, its
side and their comparison are of no use one without the others. Two tasks of LXMERT's own
pre-training (Tan & Bansal 2019) are therefore trained beside it: to label every region (its digit
and its quarter of the scene), and to fill in a masked digit of a question from the picture. Their
heads are thrown away.

Scenes are drawn afresh in every step and the optimisers are those of ``train_digits``. (Muon needs
torch 2.9.) With half as many questions per step, the start may never end. The defaults reproduce
the packaged weights on a CPU, in six minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LxmertForQuestionAnswering

from captum_attn.toy.digit_vqa import (
    ANSWERS,
    BACKGROUND,
    NO,
    YES,
    Questions,
    Regions,
    build_digit_vqa,
    questions,
    regions,
    save_digit_vqa,
)
from captum_attn.toy.scenes import NUM_CLASSES, scenes
from captum_attn.toy.vocabulary import DIGITS, FIGURES, MASK, VOCABULARY, tokenize
from tutorials.training.loop import HELD_OUT_SEED, command, epochs_of, optimizers_of

EPOCHS, STEPS = 20, 50
DIGIT_WORDS = [VOCABULARY[word] for word in (*DIGITS, *FIGURES)]


class Accuracy(NamedTuple):
    """How often the answer is right; chance is one half.

    Attributes:
        all (float): over all questions.
        presence (float): questions whether a digit is there.
        side (float): questions whether it is the one on a side.
        yes (float): questions whose answer is yes.
        no (float): questions whose answer is no.
        shuffled (float): all questions, each asked about the picture of another: chance.
    """

    all: float
    presence: float
    side: float
    yes: float
    no: float
    shuffled: float


@torch.no_grad()
def accuracy(model: nn.Module, found: Regions, asked: Questions) -> Accuracy:
    """Measures a model on questions, in evaluation mode.

    Args:
        model (nn.Module): a digit LXMERT.
        found (Regions): the regions of scenes.
        asked (Questions): a question about each of them.

    Returns:
        Accuracy: shares in [0, 1]; NaN where there is no question of a kind.

    Examples::

        >>> found = regions(scenes(1000, split="test"))
        >>> accuracy(load_digit_vqa(), found, questions(found))
    """
    training = model.training
    model.eval()
    words = {name: x.to(found.boxes.device) for name, x in tokenize(asked.texts).items()}
    others = {name: x.roll(1, 0) for name, x in found.inputs.items()}
    answers = asked.answers.to(found.boxes.device)
    right, shuffled = (
        (model(**words, **seen).question_answering_score.argmax(1) == answers).float()
        for seen in (found.inputs, others)
    )
    model.train(training)
    side = torch.tensor([bool(side) for side in asked.sides], device=right.device)
    kinds = (right, right[~side], right[side], right[answers == YES], right[answers == NO])
    return Accuracy(*(kind.mean().item() for kind in (*kinds, shuffled)))


def train(
    epochs: int = EPOCHS,
    steps: int = STEPS,
    batch_size: int = 64,
    questions_per_scene: int = 4,
    seed: int = 0,
    held_out: int = 1_000,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[LxmertForQuestionAnswering, Accuracy]]:
    """Trains a digit LXMERT and hands it out after every epoch. Equal arguments, equal weights.

    The learning rates warm up linearly and fall to 0 along a cosine over all epochs, so only the
    last model is the finished one. The global random state is left as it was.

    Args:
        epochs (int, optional): how often the model is measured and handed out.
        steps (int, optional): steps per epoch.
        batch_size (int, optional): fresh training scenes per step.
        questions_per_scene (int, optional): questions about each of them.
        seed (int, optional): seed of the initial weights and of all that is drawn. Default: 0.
        held_out (int, optional): scenes of test digits to measure on.
        device (torch.device or str, optional): where to train. Default: ``"cpu"``.

    Returns:
        Iterator of (LxmertForQuestionAnswering, Accuracy): the model, which goes on being trained,
        and its accuracy on the held-out scenes.

    Examples::

        >>> for model, held_out in train(epochs=2, steps=10):
        ...     print(held_out.all)
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_digit_vqa().to(device)  # type: ignore[arg-type]
        heads = _heads(model.config.hidden_size).to(device)
    test = regions(scenes(held_out, "test", HELD_OUT_SEED, device), HELD_OUT_SEED)
    test_questions = questions(test, HELD_OUT_SEED)

    def loss(step_seed: int) -> Tensor:
        found = regions(scenes(batch_size, "train", step_seed, device), step_seed)
        found = Regions(*(x.repeat_interleave(questions_per_scene, 0) for x in found))
        return _loss(model, heads, found, questions(found, step_seed))

    for _ in epochs_of(model, loss, _optimizers(model, heads), epochs, steps, seed):
        yield model, accuracy(model, test, test_questions)


def _heads(width: int) -> nn.ModuleDict:
    """For what is trained beside the answers, by what they tell."""
    outputs = {"region": NUM_CLASSES + 1, "quarter": 4, "word": NUM_CLASSES}
    return nn.ModuleDict({name: nn.Linear(width, n) for name, n in outputs.items()})


def _loss(
    model: LxmertForQuestionAnswering, heads: nn.ModuleDict, found: Regions, asked: Questions
) -> Tensor:
    device = found.boxes.device
    words = {name: x.to(device) for name, x in tokenize(asked.texts).items()}
    digits, answers = asked.digits.to(device), asked.answers.to(device)
    read = model.lxmert(**words, **found.inputs)
    # One sigmoid per answer: a softmax would leave it open what the logit of "yes" alone says.
    logits, truth = model.answer_head(read.pooled_output), F.one_hot(answers, len(ANSWERS))
    answer = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype)) * len(ANSWERS)

    shown = found.digits.where(found.digits != BACKGROUND, NUM_CLASSES).flatten()
    right, below = (found.visual_pos.unflatten(-1, (2, 2)).mean(2) > 0.5).long().unbind(-1)
    seen = read.vision_output.flatten(0, 1)
    region = F.cross_entropy(heads["region"](seen), shown)
    quarter = F.cross_entropy(heads["quarter"](seen), (right + 2 * below).flatten())

    yes = answers == YES
    masked = torch.isin(words["input_ids"], torch.tensor(DIGIT_WORDS, device=device)) & yes[:, None]
    words["input_ids"] = words["input_ids"].masked_fill(masked, VOCABULARY[MASK])
    read = model.lxmert(**{name: x[yes] for name, x in (words | found.inputs).items()})
    word = F.cross_entropy(heads["word"](read.language_output[masked[yes]]), digits[yes])
    return answer + region + quarter + word


def _optimizers(model: LxmertForQuestionAnswering, heads: nn.ModuleDict) -> list[Optimizer]:
    encoder = model.lxmert.encoder
    blocks = (encoder.layer, encoder.r_layers, encoder.x_layers)
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    return optimizers_of([*model.parameters(), *heads.parameters()], matrices)


def main() -> None:
    """The command line."""

    def said(held_out: Accuracy) -> str:
        shares = (f"{name} {share:.1%}" for name, share in held_out._asdict().items())
        return f"right answers: {', '.join(shares)}"

    about = "Train the question answering of the demo."
    command(about, train, said, save_digit_vqa, EPOCHS, f"{STEPS} steps")


if __name__ == "__main__":
    main()
