"""Known answers: prompts of a language model whose answer stands in them, at one known place.

Six tasks, each made by chance from names, cities, colours, animals and numbers: recall of a fact,
a list of keys and values, which of two names, copying, negation, and a number among others. A
prompt is taken where the model gives the answer, and where it gives the other word once the word at
that place is replaced by it: so the answer does come from there, whatever else the model looks at.
What is likeliest counts, among all tokens, and by the answer's first token.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from captum_attn.errors import InputError
from captum_attn.evaluation.batches import Batch
from captum_attn.metrics.shared import tensor_of

__all__ = ["TASKS", "KnownAnswers", "NextToken", "Prompt", "known_answers"]

NAMES = "Tom Anna Peter Mary John Paul Lisa Mark Sarah David Jack Emma".split()
CITIES = "Paris Rome Berlin London Madrid Vienna Tokyo Moscow Boston Chicago Dublin Athens".split()
COLOURS = "red blue green yellow white black brown pink orange purple".split()
ANIMALS = "dog cat fish bird horse cow sheep pig lion bear".split()
THINGS = "cats dogs birds books cars pens cups hats".split()
OBJECTS = "cup ball box car hat bag door chair".split()
NUMBERS = "two three four five six seven eight nine ten".split()
PLACES = "store park school office".split()

EACH = 200  # prompts of a task
POOL = 2_000  # prompts of a task that are tried, at most
AT_ONCE = 16  # prompts of a forward pass


class Prompt(NamedTuple):
    """A prompt with its answer.

    Attributes:
        task (str): one of `TASKS`.
        text (str): what is to be gone on with.
        answer (str): the word that goes on, a blank in front; it stands once in the last line.
        place (int): where it starts in the text, its blank left out, in characters.
        replaced (str): the text with another word there.
        other (str): that word, a blank in front.
    """

    task: str
    text: str
    answer: str
    place: int
    replaced: str
    other: str


# ---------------------------------------------------------------------------------- the tasks
HERE = "@"  # where the answer stands in a template


def _prompt(task: str, template: str, answer: str, other: str) -> Prompt:
    text, replaced = (template.replace(HERE, word) for word in (answer, other))
    return Prompt(task, text, f" {answer}", template.index(HERE), replaced, f" {other}")


def _pairs(draw: random.Random, keys: Sequence[str], values: Sequence[str]) -> tuple[Any, ...]:
    """Three pairs, `HERE` for the value that is asked for; its key, its value, another value."""
    names, chosen, asked = draw.sample(keys, 3), draw.sample(values, 4), draw.randrange(3)
    shown = [HERE if i == asked else value for i, value in enumerate(chosen[:3])]
    return list(zip(names, shown, strict=True)), names[asked], chosen[asked], chosen[3]


def _recall(draw: random.Random) -> Prompt:
    pairs, name, *words = _pairs(draw, NAMES, CITIES)
    facts = " ".join(f"{one} is from {city}." for one, city in pairs)
    asked = f"{facts} Question: Where is {name} from? Answer: {name} is from"
    return _prompt("recall", asked, *words)


def _key_value(draw: random.Random) -> Prompt:
    pairs, name, *words = _pairs(draw, NAMES, ANIMALS)
    facts = ", ".join(f"{one} = {animal}" for one, animal in pairs)
    return _prompt("key-value", f"List: {facts}. In the list, {name} =", *words)


def _two_names(draw: random.Random) -> Prompt:
    answer, giver, other = draw.sample(NAMES, 3)
    place, thing = draw.choice(PLACES), draw.choice("drink book ball letter".split())
    asked = f"When {HERE} and {giver} went to the {place}, {giver} gave a {thing} to"
    return _prompt("two names", asked, answer, other)


def _copying(draw: random.Random) -> Prompt:
    words, asked = draw.sample([*COLOURS, *ANIMALS, *THINGS], 6), draw.randrange(2, 5)
    shown = [HERE if i == asked else word for i, word in enumerate(words[:5])]
    said = f'He said: "{" ".join(shown)}". I repeat: he said "{" ".join(words[:asked])}'
    return _prompt("copying", said, words[asked], words[5])


def _negation(draw: random.Random) -> Prompt:
    answer, other, unwanted = draw.sample(COLOURS, 3)
    name, thing = draw.choice(NAMES), draw.choice(OBJECTS)
    said = f"{name} does not want the {unwanted} {thing}. {name} wants the {HERE} {thing}."
    asked = f"{said} Question: Which {thing} does {name} want? Answer: {name} wants the"
    return _prompt("negation", asked, answer, other)


def _number(draw: random.Random) -> Prompt:
    counts, things, asked = draw.sample(NUMBERS, 4), draw.sample(THINGS, 3), draw.randrange(3)
    shown = [HERE if i == asked else count for i, count in enumerate(counts[:3])]
    has = [f"{count} {thing}" for count, thing in zip(shown, things, strict=True)]
    shot = "Bob has two coins, six keys and nine maps. The number of keys is six.\n"
    said = f"{draw.choice(NAMES)} has {has[0]}, {has[1]} and {has[2]}."
    return _prompt(
        "number", f"{shot}{said} The number of {things[asked]} is", counts[asked], counts[3]
    )


TASKS: dict[str, Callable[[random.Random], Prompt]] = {
    "recall": _recall,
    "key-value": _key_value,
    "two names": _two_names,
    "copying": _copying,
    "negation": _negation,
    "number": _number,
}


# ---------------------------------------------------------------------------------- the model
class NextToken(nn.Module):
    """A causal language model as a classifier of the next token.

    Args:
        model (Module): a causal language model of transformers.

    Examples::

        >>> NextToken(model)(ids).argmax(1)          # (B,)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes = set(inspect.signature(model.forward).parameters)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, vocabulary) behind ids (B, n), which a mask (B, n) pads on the left."""
        more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
        if mask is not None:
            more["attention_mask"] = mask
            if "position_ids" in self.takes:
                more["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return tensor_of(self.model(input_ids=ids, **more))[:, -1]


# ---------------------------------------------------------------------------------- the data
@dataclass(frozen=True)
class Tried:
    """How often a model had a task right.

    Args:
        prompts (int): that were tried.
        right (int): whose answer was the likeliest token.
        follow (int): of these, how often the answer followed the word at the place.
    """

    prompts: int
    right: int
    follow: int


class KnownAnswers(Dataset):
    """Prompts with their answers, as `evaluate` takes them: rationales are the answer's tokens.

    Args:
        prompts (sequence of Prompt): the prompts.
        tokenizer (callable): of transformers, a fast one.
        tried (dict): task -> `Tried`.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any, tried: dict[str, Tried]) -> None:
        self.prompts, self.tokenizer, self.tried = list(prompts), tokenizer, tried
        self.labels = [first_token(tokenizer, prompt.answer) for prompt in prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[Prompt, int]:
        """The prompt and the token of its answer."""
        return self.prompts[index], self.labels[index]

    def collate_fn(self, examples: Sequence[tuple[Prompt, int]]) -> Batch:
        """A batch of examples, padded on the left."""
        ids, mask, offsets = encoded(self.tokenizer, [prompt.text for prompt, _ in examples])
        starts = torch.tensor([prompt.place for prompt, _ in examples])[:, None]
        ends = starts + torch.tensor([len(p.answer) - 1 for p, _ in examples])[:, None]
        at = (offsets[..., 0] < ends) & (offsets[..., 1] > starts) & mask.bool()
        return Batch(
            ids,
            torch.tensor([label for _, label in examples]),
            additional_forward_args=(mask,),
            truth={"rationales": at, "rationale_mask": mask.bool()},
            options={"removable": mask.bool()},
        )

    def __str__(self) -> str:
        lines = ["| task | tried | right | follows the place | taken |", "|---|---|---|---|---|"]
        for task, tried in self.tried.items():
            taken = sum(prompt.task == task for prompt in self.prompts)
            lines.append(f"| {task} | {tried.prompts} | {tried.right} | {tried.follow} | {taken} |")
        return "\n".join(lines)


def known_answers(
    model: nn.Module,
    tokenizer: Any,
    each: int = EACH,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
    pool: int = POOL,
) -> KnownAnswers:
    """Prompts that a model answers from the known place, of every task.

    Args:
        model (Module): ids (B, n), mask (B, n) -> logits of the next token, see `NextToken`.
        tokenizer (callable): its tokenizer, a fast one of transformers.
        each (int): prompts of a task. Default: 200.
        seed (int): of the prompts. Default: 0.
        tasks (sequence of str): Default: all of `TASKS`.
        pool (int): prompts of a task that are tried at most. Default: 2,000.

    Returns:
        KnownAnswers: one prompt of each task after the other; `print` says how many were tried.

    Raises:
        InputError: where the model has none of them right.

    Warns:
        Where a task has fewer than `each`.

    Examples::

        >>> model, tokenizer = load_smollm2()
        >>> data = known_answers(NextToken(model), tokenizer, each=20)
        >>> print(data)
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"tasks: expected some of {list(TASKS)}, got {unknown}")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"known answers: {type(tokenizer).__name__} does not say which token is which: "
            "expected a fast tokenizer of transformers"
        )
    found, tried = {}, {}
    for task in tasks:
        found[task], tried[task] = _of_task(model, tokenizer, task, each, seed, pool)
        if len(found[task]) < each:
            warnings.warn(
                f"known answers: {len(found[task])} prompts of {task!r} instead of {each}: "
                f"{tried[task]}",
                stacklevel=2,
            )
    rounds = range(max(map(len, found.values()), default=0))
    prompts = [prompts[i] for i in rounds for prompts in found.values() if i < len(prompts)]
    if not prompts:
        raise InputError(
            f"known answers: the model has none of its prompts right ({tried}); expected a "
            "language model that goes on with a word of the text"
        )
    return KnownAnswers(prompts, tokenizer, tried)


def _of_task(
    model: nn.Module, tokenizer: Any, task: str, each: int, seed: int, pool: int
) -> tuple[list[Prompt], Tried]:
    draw = random.Random(f"{task} {seed}")
    made = dict.fromkeys(TASKS[task](draw) for _ in range(pool))  # none twice
    kept: list[Prompt] = []
    tried = right = follow = 0
    for some in _of_size(list(made), min(AT_ONCE, 2 * each)):
        said = _answers(model, tokenizer, [prompt.text for prompt in some])
        good = [p for p, token in zip(some, said, strict=True)
                if token == first_token(tokenizer, p.answer)]  # fmt: skip
        after = _answers(model, tokenizer, [prompt.replaced for prompt in good])
        followed = [p for p, token in zip(good, after, strict=True)
                    if token == first_token(tokenizer, p.other)]  # fmt: skip
        tried, right, follow = tried + len(some), right + len(good), follow + len(followed)
        kept += followed
        if len(kept) >= each:
            break
    return kept[:each], Tried(tried, right, follow)


def _of_size(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    return (prompts[i : i + size] for i in range(0, len(prompts), size))


@torch.no_grad()
def _answers(model: nn.Module, tokenizer: Any, texts: list[str]) -> list[int]:
    """The likeliest next token of each text."""
    if not texts:
        return []
    device = next(model.parameters()).device
    ids, mask, _ = encoded(tokenizer, texts)
    return model(ids.to(device), mask.to(device)).argmax(-1).tolist()


def encoded(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, n) and mask (B, n), padded on the left, and where tokens stand, (B, n, 2)."""
    rows = tokenizer(list(texts), return_offsets_mapping=True)
    length = max(map(len, rows["input_ids"]))
    ids = torch.full((len(texts), length), blank_of(tokenizer))
    mask, at = torch.zeros_like(ids), torch.zeros(len(texts), length, 2, dtype=torch.long)
    for i, (row, spans) in enumerate(zip(rows["input_ids"], rows["offset_mapping"], strict=True)):
        ids[i, length - len(row) :] = torch.tensor(row)
        mask[i, length - len(row) :] = 1
        at[i, length - len(row) :] = torch.tensor(spans)
    return ids, mask, at


class AtEmbeddings:
    """Captum's methods that need a gradient, at a model's word embeddings, summed over channels.

    The baseline is `blank_of`'s token at every place, padding kept.

    Args:
        kind (str): "InputXGradient", "IntegratedGradients" or "DeepLift".
        model (Module): ids (B, n), mask (B, n) -> logits, see `NextToken`.
        tokenizer (callable): its tokenizer.
    """

    KINDS = ("InputXGradient", "IntegratedGradients", "DeepLift")

    def __init__(self, kind: str, model: nn.Module, tokenizer: Any) -> None:
        from captum import attr

        words = next(m for m in model.modules() if isinstance(m, nn.Embedding))
        made = {
            "InputXGradient": attr.LayerGradientXActivation,
            "IntegratedGradients": attr.LayerIntegratedGradients,
            "DeepLift": attr.LayerDeepLift,
        }
        self.kind, self.blank, self.method = kind, blank_of(tokenizer), made[kind](model, words)

    def attribute(
        self,
        inputs: Tensor,
        target: Any = None,
        additional_forward_args: Any = None,
        **options: Any,
    ) -> Tensor:
        """(B, n)."""
        if self.kind != "InputXGradient":
            mask = additional_forward_args[0] if additional_forward_args else None
            blank = torch.full_like(inputs, self.blank)
            options["baselines"] = blank if mask is None else inputs.where(mask == 0, blank)
        found = self.method.attribute(
            inputs, target=target, additional_forward_args=additional_forward_args, **options
        )
        return found.sum(-1)


def blank_of(tokenizer: Any) -> int:
    """A token that says nothing: what pads, is unknown or ends a text."""
    for name in ("pad_token_id", "unk_token_id", "eos_token_id"):
        if (token := getattr(tokenizer, name, None)) is not None:
            return int(token)
    return 0


def first_token(tokenizer: Any, answer: str) -> int:
    """The first token of a word behind a blank."""
    return tokenizer.encode(answer, add_special_tokens=False)[0]
