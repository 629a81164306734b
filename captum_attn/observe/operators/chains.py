"""Notes that travel with tensors: what a tensor has come out of since something last mixed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from captum_attn.observe.operators.bridge import Operation

NONLINEAR, SOFTMAX = "nonlinear", "softmax"


@dataclass(frozen=True)
class Version:
    """A tensor as it was, before anything wrote into it again."""

    tensor: Tensor
    number: int

    @staticmethod
    def of(tensor: Tensor) -> Version:
        return Version(tensor, tensor._version)

    def is_now(self) -> bool:
        return self.tensor._version == self.number

    def same(self, other: Version) -> bool:
        return self.tensor is other.tensor and self.number == other.number


@dataclass(frozen=True)
class Note:
    """What is known of a tensor.

    Args:
        learned (bool): it requires a gradient, but stems from learned tokens alone, no input.
        root (Version or None): the tensor that it is an elementwise function of; None: itself.
        at_zero (float): the value of that function where the root is 0.
        gate (str): what it came out of and has since only been moved or scaled: "nonlinear",
            "softmax", or "" for neither.
        statistic (bool): it is what others are divided by (a norm, a variance).
        scores (bool): a product of two activations that has since been scaled or masked.
        mean_of (Version or None): the tensor whose mean over some axes it is.
        makers (tuple of Operation): the linear layers that it came out of, scaled or moved since.
        attended (bool): an attention call's output, moved since.
        inputs (frozenset of str): names of the inputs that it is made of, token by token.
    """

    learned: bool = False
    root: Version | None = None
    at_zero: float = 0.0
    gate: str = ""
    statistic: bool = False
    scores: bool = False
    mean_of: Version | None = None
    makers: tuple[Operation, ...] = ()
    attended: bool = False
    inputs: frozenset[str] = frozenset()


EMPTY = Note()
LEARNED = Note(learned=True)


class Chains:
    """Notes on tensors; a note lives as long as its tensor does."""

    def __init__(self) -> None:
        self._notes = WeakTensorKeyDictionary()

    def __getitem__(self, tensor: Tensor) -> Note:
        return self._notes.get(tensor, EMPTY)

    def __setitem__(self, tensor: Tensor, note: Note) -> None:
        if note is not EMPTY or tensor in self._notes:
            self._notes[tensor] = note

    def root(self, tensor: Tensor) -> Version:
        """What a tensor is an elementwise function of: itself, if nothing else is known."""
        root = self[tensor].root
        return Version.of(tensor) if root is None or not root.is_now() else root

    def at_zero(self, tensor: Tensor) -> float:
        note = self[tensor]
        return note.at_zero if note.root is not None and note.root.is_now() else 0.0


def moved(notes: Sequence[Note]) -> Note:
    """The note of what was moved or put together of tensors with `notes`."""
    if not notes:
        return EMPTY
    first = notes[0]
    if len(notes) == 1:
        return first if first.root is None else replace(first, root=None, at_zero=0.0)
    gates = {note.gate for note in notes}
    return Note(
        gate=first.gate if len(gates) == 1 else "",
        statistic=all(note.statistic for note in notes),
        scores=any(note.scores for note in notes),
        makers=joined(notes),
        attended=all(note.attended for note in notes),
        inputs=frozenset[str]().union(*(note.inputs for note in notes)),
    )


def scaled(note: Note, root: Version | None = None, at_zero: float = 0.0) -> Note:
    """The note of what was multiplied by a constant or a statistic."""
    return replace(note, root=root, at_zero=at_zero, mean_of=None)


def joined(notes: Sequence[Note]) -> tuple[Operation, ...]:
    """The linear layers that several tensors came out of, where each came out of some."""
    if not all(note.makers for note in notes):
        return ()
    return tuple(dict.fromkeys(maker for note in notes for maker in note.makers))


def is_number(value: Any) -> bool:
    """Whether a summand or factor is one number: Python's, or a tensor of one that is constant."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
