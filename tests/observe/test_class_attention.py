"""Attention that asks from the first token alone: the others stand beside it as they were."""

import pytest
import torch
from torch import nn

from captum_attn import GenericAttention
from tests.plain import close

D, HEADS = 8, 2
TARGET = 1
pytestmark = pytest.mark.filterwarnings("ignore:the output reads all tokens")


class Attention(nn.Module):
    """Asks from all tokens, or from the first one, cut out before or behind the projection."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        q = self.q(x[:, :1]) if self.form == "before" else self.q(x)
        q = q[:, :1] if self.form == "behind" else q
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, self.k(x), self.v(x)))
        self.A = (q @ k.mT / 2).softmax(-1)
        asked = self.out((self.A @ v).transpose(1, 2).flatten(2))
        return torch.cat([x[:, : asked.shape[1]] + asked, x[:, asked.shape[1] :]], 1)


class Net(nn.Module):
    """A stem, a learned first token, `full` layers, `asking` layers of class attention."""

    def __init__(self, stem, form, full, asking, read):
        super().__init__()
        torch.manual_seed(0)
        overlapping = nn.Sequential(nn.Conv2d(3, D, 3, 2, 1), nn.GELU())
        self.stem = nn.Conv2d(3, D, 2, 2) if stem == "patches" else overlapping
        self.first, self.head, self.read = nn.Parameter(torch.randn(1, 1, D)), nn.Linear(D, 3), read
        layers = [Attention("all") for _ in range(full)] + [Attention(form) for _ in range(asking)]
        self.layers = nn.ModuleList(layers)
        self.double()

    def forward(self, image):
        x = self.stem(image).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0] if self.read == "first" else x.mean(1))


def by_hand(model, image):
    output, layers = model(image)[:, TARGET].sum(), model.layers
    gradients = torch.autograd.grad(output, [layer.A for layer in layers])
    R = torch.eye(5, dtype=torch.double).expand(len(image), -1, -1)
    for layer, gradient in zip(layers, gradients, strict=True):
        read = (layer.A * gradient).clamp(min=0).mean(1).detach()
        asked = read.shape[1]
        R = torch.cat([R[:, :asked] + read @ R, R[:, asked:]], 1)
    return R[:, 0] if model.read == "first" else R.mean(1)


@pytest.mark.parametrize("read", ["first", "mean"])
@pytest.mark.parametrize("full, asking", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("form", ["before", "behind"])
@pytest.mark.parametrize("stem", ["patches", "overlapping"])
def test_tokens_that_no_call_asked_from_are_read_as_they_are(stem, form, full, asking, read):
    model = Net(stem, form, full, asking, read).eval()
    image = torch.randn(2, 3, 4, 4, dtype=torch.double, generator=torch.manual_seed(1))
    (tokens,) = GenericAttention(model).attribute_tokens(image, TARGET).values()
    patches = by_hand(model, image)[:, 1:]
    close(tokens[:, -4:], patches, 1e-10)
    found = GenericAttention(model).attribute(image, TARGET)
    close(found[:1], GenericAttention(model).attribute(image[:1], TARGET), 1e-10)
