"""Small models and data for the tests of the dashboard: weights random, values checkable."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captum_attn.insights import Batch, ImageFeature, TextFeature

CLASSES = ["cat", "dog", "bird"]
WORDS = ["[PAD]", "[CLS]", "the", "old", "man", "##kind", "<b>bold</b>", "sea"]
SIDE, PATCH = 16, 8


class Block(nn.Module):
    """Attention and a residual connection, nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.attention(tokens, tokens, tokens)[0]


class TinyViT(nn.Module):
    """Images (B, C, 16, 16) -> logits (B, 3), read from a class token; four patches."""

    def __init__(self, channels: int = 3, outputs: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, 8, PATCH, PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, outputs)

    def forward(self, images: Tensor, scale: Tensor | None = None) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], 1)
        logits = self.head(self.blocks(tokens)[:, 0])
        return logits if scale is None else logits * scale


class TinyText(nn.Module):
    """Ids (B, n) -> logits (B, 3), read from the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(len(WORDS), 8), nn.Embedding(16, 8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))
        return self.head(self.blocks(self.words(ids) + places)[:, 0])


class TinyPair(nn.Module):
    """Ids (B, n), an image (B, 1, 16, 16) -> logits (B, 3), in one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.patches = nn.Embedding(len(WORDS), 8), nn.Conv2d(1, 8, PATCH, PATCH)
        self.blocks, self.head = nn.Sequential(Block(8), Block(8)), nn.Linear(8, 3)

    def forward(self, ids: Tensor, images: Tensor) -> Tensor:
        tokens = torch.cat([self.words(ids), self.patches(images).flatten(2).mT], 1)
        return self.head(self.blocks(tokens)[:, 0])


class TinyDetector(nn.Module):
    """Images (B, 3, 16, 16) -> logits (B, 3, 2) and boxes (B, 3, 4) of three object queries."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, 8, 4, 4), Block(8)
        self.queries = nn.Parameter(torch.randn(1, 3, 8))
        self.reading = nn.MultiheadAttention(8, 2, batch_first=True)
        self.classes, self.boxes = nn.Linear(8, 2), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.block(self.patches(images).flatten(2).mT)
        asked = self.queries.expand(len(images), -1, -1)
        found = asked + self.reading(asked, tokens, tokens)[0]
        return {"logits": self.classes(found), "pred_boxes": self.boxes(found).sigmoid()}


class TinyWriter(nn.Module):
    """Ids (B, n) -> logits (B, n, words), each from the words up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(len(WORDS), 8), nn.Embedding(600, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, len(WORDS))

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        tokens = self.words(ids) + self.places(torch.arange(n))
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        return self.head(tokens + self.attention(tokens, tokens, tokens, attn_mask=later)[0])


class TinyTokenizer:
    """Words to their numbers and back, as transformers' tokenizers are called."""

    def __init__(self, eos: int | None = None) -> None:
        self.eos_token_id = eos

    def __call__(self, text: str, return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[WORDS.index(word) for word in text.split()]])}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [WORDS[i] for i in ids]

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[i] for i in ids)


class Broken(nn.Module):
    """A model that fails."""

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("out of <luck>")


def made(kind: type[nn.Module], **options: int) -> nn.Module:
    """A model with random weights that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**options).eval()


def images(count: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def softmax(output: Tensor) -> Tensor:
    return output.softmax(-1)


def words_of(ids: Tensor) -> list[str]:
    return [WORDS[i] for i in ids[0].tolist()]


def ids_of(text: str) -> Tensor:
    return torch.tensor([[1, *(WORDS.index(word) for word in text.split())]])


def photo(**options) -> ImageFeature:
    return ImageFeature("Photo", lambda x: x * 0 + 0.5, [lambda x: 2 * x - 1], **options)


def text() -> TextFeature:
    return TextFeature("Text", None, None, words_of, tokenize=ids_of, special_ids=[0, 1])


TEXT_BATCH = Batch(torch.tensor([[1, 2, 3, 4, 5], [1, 6, 7, 3, 0]]), torch.tensor([0, 2]))
