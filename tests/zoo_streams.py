"""The test zoo, part two: models of several token streams or several inputs, as transformers has
them, tiny and with random weights, and what is known of each by hand.

That is: which stream asks and which answers in every attention call, in the order of execution (the
notation is that of `tests.plain.follow`), what the streams are called and how long they are, which
rows the explained output reads, and where each input's elements lie among the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_attn import objectives
from tests import plain
from tests.zoo import (
    BERT_SIZE,
    END_OF_TEXT,
    LENGTHS,
    LLAMA_SIZE,
    VIT_SIZE,
    VOCABULARY,
    Model,
    Sample,
    as_tokens,
    images,
    last_real,
    padded,
    patches,
    same_length,
    texts,
)

IMAGE = 7  # the placeholder of an image token in a text
TEXT_SIZE = {k: v for k, v in BERT_SIZE.items() if k != "num_labels"}
VISION_SIZE = {k: v for k, v in VIT_SIZE.items() if k != "num_labels"}


@dataclass(frozen=True, eq=False)
class Entry:
    """How an input lies on the tokens of its stream.

    Args:
        stream (str): the stream.
        first, last (int): its tokens there.
        grid (callable): (B, n) relevance of these tokens, input shape -> what `attr`, summed over
            its channel axis, must be with `interpolation="nearest"`; None: no statement.
        channel (int): that axis; None: there is none.
        also (tuple): a second stream that the input enters, and how its tokens (B, n) and the
            places of real tokens lie on the input: both ways count.
    """

    stream: str
    first: int | None = None
    last: int | None = None
    grid: Callable[[Tensor, torch.Size], Tensor] | None = as_tokens
    channel: int | None = None
    also: tuple[str, Callable[[Tensor, Tensor], Tensor]] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Streams(Model):
    """One model of several streams or several inputs.

    Args:
        streams (dict): name of every source of relevance -> its tokens in a batch of three.
        wiring: the attention calls; a list, or a callable (model, `Sample` of one) -> list. See
            `tests.plain.follow`.
        readout (dict): stream that is read -> its row, rows (B,) or weights (B, n), or a callable
            (model, `Sample`) -> one of them.
        entries (dict): name of every input that gets an attribution -> `Entry`.
        joined (tuple): the streams whose tokens a stream is joined from, right behind the join.
        order (callable): (model, `Sample` of one) -> {stream: places of its tokens in the order of
            the inputs}, where a model permutes them.
        objective: what is explained; None: the target's output.
        seen_raw (tuple): the inputs that raw attention, which is one map, reaches; None: all.
        alone (bool): whether a padded example is what it is without its padding.
        tolerance (float): of values against the equations in float64.
    """

    streams: dict[str, int]
    wiring: Any
    readout: dict[str, Any]
    entries: dict[str, Entry]
    joined: tuple[str, ...] = ()
    order: Callable[[nn.Module, Sample], dict[str, Tensor]] | None = None
    objective: Any = None
    seen_raw: tuple[str, ...] | None = None
    alone: bool = True
    tolerance: float = 1e-10

    def wiring_of(self, model: nn.Module, sample: Sample) -> list:
        return self.wiring(model, sample) if callable(self.wiring) else self.wiring

    def weights(self, model: nn.Module, sample: Sample) -> dict[str, Tensor]:
        """(B, n) for every stream that is read."""
        found = {}
        for stream, read in self.readout.items():
            read = read(model, sample) if callable(read) else read
            if isinstance(read, int):
                read = torch.full((len(next(iter(sample.inputs.values()))),), read)
            whole = read if read.is_floating_point() else F.one_hot(read, self.streams[stream])
            found[stream] = whole.double()
        return found

    def calls(self) -> list[tuple[str, tuple[str, ...]]]:
        """(stream that asks, streams that answer) of every call, as `describe` tells them."""
        found, answers = [], ()
        for step in self.wiring_of(self.model(), self.sample().one(0)):
            found += [(s, answers or (q,)) for s, q, *_ in plain.calls_of(step)]
            answers = self.joined if callable(step) else ()
        return found

    @property
    def padded(self) -> bool:
        return self.sample().real is not None


# ---------------------------------------------------------------------------- building
def hf(kind: str, head: str, attention: str | None = None, **options: Any) -> nn.Module:
    """A transformers model in the given attention form; None: the form that it takes by itself."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**options)
    if attention is not None:
        config._attn_implementation = attention
    return getattr(transformers, head)(config)


def builder(kind: str, head: str, **options: Any) -> Callable[..., nn.Module]:
    """-> build(attention=None)."""
    return lambda attention=None: hf(kind, head, attention, **options)


def with_backbone(kind: str, **options: Any) -> Callable[..., nn.Module]:
    """A detector of the DETR family on a ResNet of four one-block stages."""

    def build(attention: str | None = None) -> nn.Module:
        from transformers import ResNetConfig

        backbone = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1] * 4, layer_type="basic",
            out_features=["stage4"],
        )  # fmt: skip
        settings = {
            "backbone_config": backbone, "use_timm_backbone": False, "backbone": None,
            "use_pretrained_backbone": False, "num_queries": 5, "d_model": 16,
            "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "num_labels": 4,
        }  # fmt: skip
        return hf(kind, f"{kind}ForObjectDetection", attention, **settings | options)

    return build


SEQ2SEQ_SIZE = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
PERCEIVER_SIZE = {
    "num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1,
    "num_self_attends_per_block": 2, "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 16,
    "self_attention_widening_factor": 2, "cross_attention_widening_factor": 2, "num_labels": 5,
}  # fmt: skip
QFORMER_SIZE = {**TEXT_SIZE, "encoder_hidden_size": 16, "cross_attention_frequency": 2}
LLAVA_SIZE = {
    "text_config": {**LLAMA_SIZE, "model_type": "llama"},
    "vision_config": {**VISION_SIZE, "model_type": "clip_vision_model"},
    "image_token_index": IMAGE, "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}  # fmt: skip

lxmert = builder(
    "Lxmert", "LxmertForQuestionAnswering", vocab_size=VOCABULARY, hidden_size=16,
    num_attention_heads=2, intermediate_size=32, max_position_embeddings=16, num_qa_labels=5,
    l_layers=2, x_layers=2, r_layers=2, visual_feat_dim=12, visual_pos_dim=4,
)  # fmt: skip
visualbert = builder(
    "VisualBert", "VisualBertForQuestionAnswering", **BERT_SIZE, visual_embedding_dim=12
)
vilt = builder(
    "Vilt", "ViltForQuestionAnswering", **BERT_SIZE, image_size=16, patch_size=4,
    max_image_length=-1,
)  # fmt: skip
vilt_retrieval = builder(
    "Vilt", "ViltForImageAndTextRetrieval", **TEXT_SIZE, image_size=16, patch_size=4,
    max_image_length=-1,
)  # fmt: skip
clip = builder(
    "CLIP", "CLIPModel", projection_dim=12, vision_config=VISION_SIZE,
    text_config={**TEXT_SIZE, "pad_token_id": 0, "bos_token_id": 4, "eos_token_id": END_OF_TEXT},
)  # fmt: skip
siglip = builder(
    "Siglip", "SiglipModel", vision_config=VISION_SIZE,
    text_config={**TEXT_SIZE, "projection_size": 16, "bos_token_id": 4, "eos_token_id": 5},
)  # fmt: skip
blip = builder(
    "Blip", "BlipForImageTextRetrieval", projection_dim=12, image_text_hidden_size=8,
    vision_config=VISION_SIZE,
    text_config={**TEXT_SIZE, "encoder_hidden_size": 16, "pad_token_id": 0, "bos_token_id": 1,
                 "sep_token_id": 2},
)  # fmt: skip
yolos = builder(
    "Yolos", "YolosForObjectDetection", **VISION_SIZE | {"image_size": [16, 24]},
    num_detection_tokens=4, num_labels=4,
)  # fmt: skip
bart = builder("Bart", "BartForConditionalGeneration", **SEQ2SEQ_SIZE)
mbart = builder("MBart", "MBartForConditionalGeneration", **SEQ2SEQ_SIZE)
marian = builder("Marian", "MarianMTModel", **SEQ2SEQ_SIZE)
t5 = builder(
    "T5", "T5ForConditionalGeneration", vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32,
    num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip
whisper = builder(
    "Whisper", "WhisperForConditionalGeneration", **SEQ2SEQ_SIZE, num_mel_bins=8,
    max_source_positions=10, max_target_positions=16, suppress_tokens=None,
    begin_suppress_tokens=None,
)  # fmt: skip
perceiver_learned = builder(
    "Perceiver", "PerceiverForImageClassificationLearned",
    **PERCEIVER_SIZE | {"d_model": 512}, image_size=4,
)  # fmt: skip
perceiver_fourier = builder(
    "Perceiver", "PerceiverForImageClassificationFourier",
    **PERCEIVER_SIZE | {"d_model": 261}, image_size=224,
)  # fmt: skip
perceiver_text = builder(
    "Perceiver", "PerceiverForSequenceClassification", **PERCEIVER_SIZE, vocab_size=VOCABULARY,
    max_position_embeddings=16,
)  # fmt: skip
qformer = builder("Blip2QFormer", "Blip2QFormerModel", **QFORMER_SIZE)
blip2 = builder(
    "Blip2", "Blip2ForImageTextRetrieval", vision_config=VISION_SIZE,
    qformer_config={**QFORMER_SIZE, "use_qformer_text_input": True}, num_query_tokens=3,
    text_config={"model_type": "opt", "vocab_size": VOCABULARY}, image_text_hidden_size=8,
)  # fmt: skip
llava = builder("Llava", "LlavaForConditionalGeneration", **LLAVA_SIZE)
llava_next = builder(
    "LlavaNext", "LlavaNextForConditionalGeneration", **LLAVA_SIZE,
    image_grid_pinpoints=[[16, 32], [32, 16]],
)  # fmt: skip
idefics3 = builder(
    "Idefics3", "Idefics3ForConditionalGeneration", image_token_id=IMAGE, scale_factor=2,
    pad_token_id=0, text_config={**LLAMA_SIZE, "model_type": "llama"}, vision_config=VISION_SIZE,
)  # fmt: skip

OPT_SIZE = {
    "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "ffn_dim": 32, "max_position_embeddings": 32,
    "word_embed_proj_dim": 16, "pad_token_id": 0,
}  # fmt: skip
instructblip = builder(
    "InstructBlip", "InstructBlipForConditionalGeneration", vision_config=VISION_SIZE,
    qformer_config=QFORMER_SIZE, text_config=OPT_SIZE, num_query_tokens=3, image_token_index=IMAGE,
)  # fmt: skip
mllama = builder(
    "Mllama", "MllamaForConditionalGeneration", image_token_index=IMAGE,
    text_config={**LLAMA_SIZE, "num_hidden_layers": 3, "cross_attention_layers": [1],
                 "rope_scaling": {"rope_type": "default"}},
    vision_config={"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1,
                   "attention_heads": 2, "intermediate_size": 32, "image_size": 16,
                   "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 32,
                   "intermediate_layers_indices": [0],
                   "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
)  # fmt: skip


# ---------------------------------------------------------------------------- inputs
def both(*parts: Callable[[int, torch.Generator], list]) -> Callable[[int, torch.Generator], list]:
    """Examples that are tuples of one example of each part."""
    return lambda batch, generator: list(
        zip(*(part(batch, generator) for part in parts), strict=True)
    )


def regions(batch: int, generator: torch.Generator) -> list[Tensor]:
    """Region features of 4, 2 and 3 regions, (n, 12)."""
    return [torch.randn((4, 2, 3)[i % 3], 12, generator=generator) for i in range(batch)]


def prefixes(batch: int, generator: torch.Generator) -> list[Tensor]:
    """What a decoder has said so far: 4, 3 and 5 tokens."""
    return [
        torch.randint(10, VOCABULARY, ((4, 3, 5)[i % 3],), generator=generator)
        for i in range(batch)
    ]


def text_and_regions(examples: list) -> dict[str, Tensor]:
    ids, real = padded([ids for ids, _ in examples])
    features, there = padded([features for _, features in examples])
    return {"ids": ids, "real": real, "features": features, "there": there}


def for_lxmert(examples: list) -> Sample:
    parts = text_and_regions(examples)
    ids, there = parts["ids"], parts["there"]
    corners = torch.arange(there.shape[1])[:, None] / 8 + torch.tensor([0, 0.1, 0.4, 0.5])
    inputs = {
        "input_ids": ids, "attention_mask": parts["real"].long(),
        "token_type_ids": (torch.arange(ids.shape[1]) > 2).long().expand(ids.shape).clone(),
        "visual_feats": parts["features"], "visual_attention_mask": there.long(),
        "visual_pos": corners.expand(len(ids), -1, -1).clone(),
    }  # fmt: skip
    return Sample(inputs, real={"input_ids": parts["real"], "visual_feats": there})


def for_visualbert(examples: list) -> Sample:
    parts = text_and_regions(examples)
    ids, there = parts["ids"], parts["there"]
    inputs = {
        "input_ids": ids, "attention_mask": parts["real"].long(),
        "token_type_ids": torch.zeros_like(ids),
        "visual_embeds": parts["features"], "visual_attention_mask": there.long(),
        "visual_token_type_ids": torch.ones_like(there, dtype=torch.long),
    }  # fmt: skip
    joined = torch.cat([parts["real"], there], 1)
    return Sample(inputs, real={"input_ids+visual_embeds": joined})


def image_text(
    examples: list[tuple[Tensor, Tensor]], stream: str = "input_ids", before: int = 0,
    after: int = 0, mask: bool = True, **more: Any,
) -> Sample:  # fmt: skip
    """Texts, padded, and images; `before` and `after`: further tokens in the text's stream."""
    ids, real = padded([ids for ids, _ in examples])
    inputs = {"input_ids": ids, "pixel_values": torch.stack([image for _, image in examples])}
    if mask:
        inputs["attention_mask"] = real.long()
    there = torch.ones(len(ids), before + after, dtype=torch.bool)
    real = torch.cat([there[:, :before], real, there[:, before:]], 1)
    return Sample({**inputs, **more}, real={stream: real} if mask else None)


def for_vilt(examples: list) -> Sample:
    sample = image_text(examples, "input_ids+pixel_values", after=17)
    pixels = sample.inputs["pixel_values"]
    more = {
        "token_type_ids": torch.zeros_like(sample.inputs["input_ids"]),
        "pixel_mask": torch.ones_like(pixels[:, 0], dtype=torch.long),
    }
    return Sample({**sample.inputs, **more}, real=sample.real)


def for_clip(examples: list) -> Sample:
    end = torch.tensor([END_OF_TEXT])
    return image_text([(torch.cat([ids[:-1], end]), image) for ids, image in examples])


SIZES = ((96, 128), (96, 96), (64, 128))  # of the images in a batch for a detector


def photographs(batch: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(3, *SIZES[i % 3], generator=generator) for i in range(batch)]


def for_detr(examples: list[Tensor]) -> Sample:
    """As DetrImageProcessor gives it: smaller images padded on the right and below."""
    height, width = (max(image.shape[a] for image in examples) for a in (1, 2))
    pixels = torch.zeros(len(examples), 3, height, width)
    mask = torch.zeros(len(examples), height, width, dtype=torch.long)
    for image, into, inside in zip(examples, pixels, mask, strict=True):
        into[:, : image.shape[1], : image.shape[2]] = image
        inside[: image.shape[1], : image.shape[2]] = 1
    real = mask[:, ::32, ::32].flatten(1).bool()
    return Sample({"pixel_values": pixels, "pixel_mask": mask}, real={"pixel_values": real})


def source_and_prefix(examples: list[tuple[Tensor, Tensor]]) -> Sample:
    ids, real = padded([ids for ids, _ in examples])
    said, heard = padded([said for _, said in examples])
    inputs = {
        "input_ids": ids, "attention_mask": real.long(), "decoder_input_ids": said,
        "decoder_attention_mask": heard.long(),
    }  # fmt: skip
    return Sample(inputs, real={"input_ids": real, "decoder_input_ids": heard})


def source_alone(examples: list[Tensor]) -> Sample:
    """The model makes the decoder's ids: the source, shifted to the right."""
    ids, real = padded(examples)
    inputs = {"input_ids": ids, "attention_mask": real.long()}
    return Sample(inputs, real={"input_ids": real})


def source_and_labels(examples: list[tuple[Tensor, Tensor]]) -> Sample:
    ids, real = padded([ids for ids, _ in examples])
    labels = torch.stack([said[:3] for _, said in examples])
    inputs = {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
    return Sample(inputs, real={"input_ids": real})


def spectrograms_and_prefix(examples: list[tuple[Tensor, Tensor]]) -> Sample:
    said, heard = padded([said for _, said in examples])
    inputs = {
        "input_features": torch.stack([features for features, _ in examples]),
        "decoder_input_ids": said, "decoder_attention_mask": heard.long(),
    }  # fmt: skip
    return Sample(inputs, real={"decoder_input_ids": heard})


def as_inputs(examples: list[Tensor]) -> Sample:
    return Sample({"inputs": torch.stack(examples)})


def tokens_as_inputs(examples: list[Tensor]) -> Sample:
    ids, real = padded(examples)
    return Sample({"inputs": ids, "attention_mask": real.long()}, real={"inputs": real})


def for_qformer(examples: list[tuple[Tensor, Tensor]]) -> Sample:
    features, there = padded([features for _, features in examples])
    inputs = {
        "query_embeds": torch.stack([queries for queries, _ in examples]),
        "encoder_hidden_states": features, "encoder_attention_mask": there.long(),
    }  # fmt: skip
    return Sample(inputs, real={"encoder_hidden_states": there})


def features(batch: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn((5, 3, 4)[i % 3], 16, generator=generator) for i in range(batch)]


def dialogues(*image_tokens: int) -> Callable[[int, torch.Generator], list[Tensor]]:
    """Texts of several lengths with a run of placeholders for each image, at unlike places."""

    def draw(batch: int, generator: torch.Generator) -> list[Tensor]:
        drawn = []
        for i in range(batch):
            parts = []
            for k, count in enumerate(image_tokens):
                n = (2, 1, 3)[(i + k) % 3]
                parts += [torch.randint(10, VOCABULARY, (n,), generator=generator)]
                parts += [torch.full((count,), IMAGE)]
            n = (3, 2, 4)[i % 3]
            drawn.append(
                torch.cat([*parts, torch.randint(10, VOCABULARY, (n,), generator=generator)])
            )
        return drawn

    return draw


def dialogue(examples: list[tuple[Tensor, Tensor]], left: bool = False, **more: Any) -> Sample:
    ids, real = padded([ids for ids, _ in examples], left=left)
    inputs = {
        "input_ids": ids, "attention_mask": real.long(),
        "pixel_values": torch.stack([image for _, image in examples]),
    }  # fmt: skip
    more = {name: value.expand(len(ids), *value.shape).clone() for name, value in more.items()}
    return Sample({**inputs, **more}, real={"input_ids": real})


def for_instructblip(examples: list) -> Sample:
    """The instruction goes to the Q-Former, behind its queries, and to the language model."""
    asked_, heard = padded([ids for ids, _, _ in examples])
    sample = dialogue([example[1:] for example in examples])
    more = {"qformer_input_ids": asked_, "qformer_attention_mask": heard.long()}
    real = torch.cat([heard.new_ones(len(heard), 3), heard], 1)
    return Sample({**sample.inputs, **more}, real={**sample.real, "qformer_input_ids": real})


def for_mllama(examples: list) -> Sample:
    """Two tiles of one image, one beside or above the other; every text token sees both."""
    sample = dialogue(examples)
    ids = sample.inputs["input_ids"]
    more = {
        "aspect_ratio_ids": torch.tensor([[2 + len(example) % 2] for example, _ in examples]),
        "aspect_ratio_mask": torch.ones(len(ids), 1, 2, dtype=torch.long),
        "cross_attention_mask": ids.new_ones(*ids.shape, 1, 2),
    }  # fmt: skip
    return Sample({**sample.inputs, **more}, real=sample.real)


# ---------------------------------------------------------------------------- wiring
def within(stream: str, layers: int = 2) -> list:
    return [(stream, stream)] * layers


def decoder(stream: str, source: str, layers: int = 2) -> list:
    return [(stream, stream), (stream, source)] * layers


def lxmert_layer() -> list:
    """One attention module, called in both directions on the states before it."""
    text, image = "input_ids", "visual_feats"
    return [[(text, image), (image, text)], (text, text), (image, image)]


def perceiver(layers: int = 2) -> list:
    return [("queries", "inputs"), *within("queries", layers), ("queries_1", "queries")]


def image_tokens_into_text(
    places: Callable[[Tensor], list[tuple[int, int]]],
    tower: str = "pixel_values",
    calls: list | None = None,
) -> Callable[[nn.Module, Sample], list]:
    """A tower, and a language model in whose sequence its tokens stand at the placeholders.

    Args:
        places (callable): positions of the placeholders -> (position, token of the tower) pairs.
        tower (str): the stream whose tokens stand there.
        calls (list): what happens before; None: two layers of the tower.
    """

    def wiring(model: nn.Module, sample: Sample) -> list:
        ids = sample.inputs["input_ids"][0]

        def join(R: dict) -> dict:
            begun = {("input_ids", "input_ids"): torch.diag((ids != IMAGE).double())}
            pairs = places((ids == IMAGE).nonzero()[:, 0])
            met = Counter(position for position, _ in pairs)  # merged tokens are averaged
            for s, x in R:
                if s == tower:
                    rows = torch.zeros(len(ids), R[s, x].shape[1], dtype=torch.double)
                    for position, token in pairs:
                        rows[position] += R[s, x][token] / met[position]
                    begun.setdefault(("input_ids", x), rows)
            return {**R, **begun}

        return [*(calls or within(tower)), join, *within("input_ids")]

    return wiring


def behind_class_token(positions: Tensor) -> list[tuple[int, int]]:
    """LLaVA: the 16 patches, without the tower's class token."""
    return [(int(position), 1 + i) for i, position in enumerate(positions)]


def four_into_one(positions: Tensor) -> list[tuple[int, int]]:
    """Idefics3: each token stands for 2 x 2 of the 4 x 4 patches of one of the images."""
    pairs = []
    for i, position in enumerate(positions.tolist()):
        image, (high, wide) = i // 4, divmod(i % 4, 2)
        for r in (0, 1):
            for c in (0, 1):
                pairs.append((position, 16 * image + 4 * (2 * high + r) + 2 * wide + c))
    return pairs


def queries(positions: Tensor) -> list[tuple[int, int]]:
    """A Q-Former's queries, which are the first of its tokens."""
    return [(int(position), i) for i, position in enumerate(positions)]


def crops(positions: Tensor) -> list[tuple[int, int]]:
    """LLaVA-NeXT: the whole image, then two crops side by side, line by line with a learned token
    at the end of each of the four lines. A crop is a class token and 16 patches."""
    order = [1 + i for i in range(16)]
    for line in range(4):
        order += [17 * crop + 1 + 4 * line + c for crop in (1, 2) for c in range(4)] + [-1]
    return [(int(p), t) for p, t in zip(positions, order, strict=True) if t >= 0]


def tiles() -> Tensor:
    """Mllama pads each of two tiles to 24 tokens, of which the language model reads 17."""
    return torch.cat([24 * tile + torch.arange(17) for tile in (0, 1)])


# ---------------------------------------------------------------------------- readout
def last_of(stream: str) -> Callable[[nn.Module, Sample], Tensor]:
    """The last real token of each example."""
    return lambda model, sample: last_real(Sample(None, real=sample.real[stream]))


def generated(stream: str, token: int = 11) -> Callable[[Sample], list[tuple[int, int]]]:
    """Targets: a token after the last real one, a different one for each example."""

    def targets(sample: Sample) -> list[tuple[int, int]]:
        places = last_of(stream)(None, sample)  # type: ignore[arg-type]
        return [(int(place), token + i % 2) for i, place in enumerate(places)]

    return targets


def before_last(model: nn.Module, sample: Sample) -> Tensor:
    """VisualBERT's answer is read from the last but one token of the text."""
    return sample.inputs["attention_mask"].sum(1) - 2


def three_queries(model: nn.Module, sample: Sample) -> Tensor:
    """BLIP-2's matching head reads the mean over its 3 queries, which stand before the text."""
    ids = sample.inputs["input_ids"]
    return (torch.arange(3 + ids.shape[1]) < 3).double().expand(len(ids), -1) / 3


def best_query(model: nn.Module, sample: Sample) -> Tensor:
    """BLIP-2's contrastive score is that of the query that fits the text best."""
    with torch.no_grad():
        output = model(**sample.inputs)
    return (output.image_embeds * output.text_embeds[:, None]).sum(-1).argmax(1)


def drawn_patches(model: nn.Module, sample: Sample) -> dict[str, Tensor]:
    """ViLT draws its patches in random order: the places of text, [CLS] and patches."""
    pixels, mask = sample.inputs["pixel_values"], sample.inputs["pixel_mask"]
    torch.manual_seed(0)
    with torch.no_grad():
        found = model.vilt.embeddings.visual_embed(pixels, mask, max_image_length=-1)
    cells = found[2][0][0]  # (patches, 2): line and column of each
    text = sample.inputs["input_ids"].shape[1] + 1
    place = (cells[:, 0] * 4 + cells[:, 1]).argsort()
    return {"input_ids+pixel_values": torch.cat([torch.arange(text), text + place])}


# ---------------------------------------------------------------------------- where tokens lie
def frames(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Whisper: a token for two frames of (B, mel, time)."""
    return tokens.repeat_interleave(2, 1)


def several_images(prefix: int) -> Callable[[Tensor, torch.Size], Tensor]:
    """4 x 4 patches of 4 x 4 pixels in each image of (B, images, 3, 16, 16)."""

    def lay(tokens: Tensor, shape: torch.Size) -> Tensor:
        grid = tokens.view(shape[0], shape[1], -1)[..., prefix:].view(*shape[:2], 4, 4)
        return grid.repeat_interleave(4, 2).repeat_interleave(4, 3)

    return lay


def two_tiles(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Mllama: [CLS], 4 x 4 patches and 7 of padding in each tile of (B, 1, tiles, 3, 16, 16)."""
    grid = tokens.view(-1, 1, 2, 24)[..., 1:17].view(-1, 1, 2, 4, 4)
    return grid.repeat_interleave(4, 3).repeat_interleave(4, 4)


def pixels_of(stream: str, prefix: int = 1) -> Entry:
    return Entry(stream, grid=patches(4, 4, prefix), channel=1)


def embedded(stream: str, first: int | None = None, last: int | None = None) -> Entry:
    return Entry(stream, first, last, channel=-1)


# ---------------------------------------------------------------------------- the table
N = max(LENGTHS)
WORDS = Entry("input_ids")
PIXELS = pixels_of("pixel_values")


def shifted(tokens: Tensor, real: Tensor | None = None) -> Tensor:
    """Token i + 1 is the id i; the first one is learned."""
    return F.pad(tokens[:, 1:], (0, 1))


def wrapped(tokens: Tensor, real: Tensor) -> Tensor:
    """Token i + 1 is the id i; the first one is the last real id."""
    last = torch.arange(real.shape[1]) == real.sum(1, keepdim=True) - 1
    return shifted(tokens) + last * tokens[:, :1]


def translation(name: str, build: Callable[..., nn.Module], **options: Any) -> Streams:
    """An encoder over the source and a decoder over what has been said."""
    settings: dict[str, Any] = {
        "examples": both(texts, prefixes), "collate": source_and_prefix,
        "target": generated("decoder_input_ids"),
        "streams": {"input_ids": N, "decoder_input_ids": 5},
        "wiring": within("input_ids") + decoder("decoder_input_ids", "input_ids"),
        "readout": {"decoder_input_ids": last_of("decoder_input_ids")},
        "entries": {"input_ids": WORDS, "decoder_input_ids": Entry("decoder_input_ids")},
    }  # fmt: skip
    return Streams(name, build, **settings | options)


def detector(name: str, kind: str, **options: Any) -> Streams:
    """An encoder over the image's 3 x 4 cells and a decoder over 5 learned queries."""
    settings: dict[str, Any] = {
        "examples": photographs, "collate": for_detr, "target": [(2, 1), (0, 3), (4, 0)],
        "streams": {"pixel_values": 12, "queries": 5},
        "wiring": within("pixel_values") + decoder("queries", "pixel_values"),
        "readout": {"queries": torch.tensor([2, 0, 4])},
        "entries": {"pixel_values": Entry("pixel_values", grid=patches(32, 32, 0), channel=1)},
        "alone": False,  # a convolution sees the padding
    }  # fmt: skip
    sizes = settings | options
    return Streams(name, with_backbone(kind, **sizes.pop("sizes", {})), **sizes)


def chat(
    name: str, build: Callable[..., nn.Module], images_: Any, counts: Any, **options: Any
) -> Streams:
    """A language model with image tokens at the placeholders of its text."""
    settings: dict[str, Any] = {
        "examples": both(dialogues(*counts), images_), "collate": dialogue,
        "target": generated("input_ids"), "readout": {"input_ids": last_of("input_ids")},
        "joined": ("pixel_values", "input_ids"),
        "tolerance": 1e-6,  # Llama's norms are in float32
    }  # fmt: skip
    return Streams(name, build, **settings | options)


pictures = images(3, 16, 16)
CASES = [
    # text and regions, text and patches
    Streams(
        "lxmert", lxmert, both(texts, regions), for_lxmert,
        streams={"input_ids": N, "visual_feats": 4},
        wiring=within("input_ids") + within("visual_feats") + lxmert_layer() * 2,
        readout={"input_ids": 0},
        entries={"input_ids": WORDS, "visual_feats": embedded("visual_feats")},
    ),
    Streams(
        "visualbert", visualbert, both(texts, regions), for_visualbert,
        streams={"input_ids+visual_embeds": N + 4}, wiring=within("input_ids+visual_embeds"),
        readout={"input_ids+visual_embeds": before_last},
        entries={"input_ids": Entry("input_ids+visual_embeds", 0, N),
                 "visual_embeds": embedded("input_ids+visual_embeds", N, N + 4)},
        alone=False,  # the regions stand behind the padding
    ),
    *(Streams(
        name, build, both(texts, pictures), for_vilt, target,
        streams={"input_ids+pixel_values": N + 17}, wiring=within("input_ids+pixel_values"),
        readout={"input_ids+pixel_values": 0},
        entries={"input_ids": Entry("input_ids+pixel_values", 0, N),
                 "pixel_values": Entry("input_ids+pixel_values", N, grid=patches(4, 4, 1),
                                       channel=1)},
        order=drawn_patches, random=True,
    ) for name, build, target in [("vilt", vilt, 1), ("vilt_retrieval", vilt_retrieval, 0)]),
    # scores of an image and a text
    Streams(
        "clip", clip, both(texts, pictures), for_clip, None, objective=objectives.pairwise,
        streams={"input_ids": N, "pixel_values": 17},
        wiring=within("pixel_values") + within("input_ids"),
        readout={"pixel_values": 0, "input_ids": last_of("input_ids")},
        entries={"input_ids": WORDS, "pixel_values": PIXELS},
    ),
    Streams(
        "siglip", siglip, both(same_length(texts, 4), pictures), partial(image_text, mask=False),
        None, objective=objectives.pairwise,
        streams={"input_ids": 4, "pixel_values": 16, "queries": 1},
        wiring=[*within("pixel_values"), ("queries", "pixel_values"), *within("input_ids")],
        readout={"queries": 0, "input_ids": 3},
        entries={"input_ids": WORDS, "pixel_values": pixels_of("pixel_values", 0)},
    ),
    Streams(
        "blip", blip, both(texts, pictures), image_text,
        streams={"input_ids": N, "pixel_values": 17},
        wiring=within("pixel_values") + decoder("input_ids", "pixel_values"),
        readout={"input_ids": 0}, entries={"input_ids": WORDS, "pixel_values": PIXELS},
    ),
    # BLIP-2: queries before the text, and the image asked by the queries alone
    Streams(
        "qformer", qformer, both(images(3, 16), features), for_qformer, (1, 2),
        streams={"query_embeds": 3, "encoder_hidden_states": 5},
        wiring=[("query_embeds", "query_embeds"), ("query_embeds", "encoder_hidden_states"),
                ("query_embeds", "query_embeds")],
        readout={"query_embeds": 1},
        entries={"query_embeds": embedded("query_embeds"),
                 "encoder_hidden_states": embedded("encoder_hidden_states")},
    ),
    Streams(
        "blip2_matching", blip2, both(texts, pictures),
        partial(image_text, before=3, use_image_text_matching_head=True),
        streams={"input_ids": 3 + N, "pixel_values": 17},
        wiring=[*within("pixel_values"), ("input_ids", "input_ids"),
                ("input_ids", "pixel_values", slice(0, 3)), ("input_ids", "input_ids")],
        readout={"input_ids": three_queries},
        entries={"input_ids": Entry("input_ids", 3), "pixel_values": PIXELS},
    ),
    Streams(
        "blip2_contrastive", blip2, both(texts, pictures), image_text, None,
        objective=objectives.pairwise,
        streams={"input_ids": N, "pixel_values": 17, "queries": 3},
        wiring=[*within("pixel_values"), ("queries", "queries"), ("queries", "pixel_values"),
                ("queries", "queries"), *within("input_ids")],
        readout={"queries": best_query, "input_ids": 0},
        entries={"input_ids": WORDS, "pixel_values": PIXELS},
    ),
    # detectors
    detector("detr", "Detr"),
    detector(
        "detr_six_layers", "Detr", sizes={"decoder_layers": 6},
        wiring=within("pixel_values") + decoder("queries", "pixel_values", 6),
    ),
    detector("conditional_detr", "ConditionalDetr"),
    detector("table_transformer", "TableTransformer"),
    Streams(
        "yolos", yolos, images(3, 16, 24), lambda x: Sample({"pixel_values": torch.stack(x)}),
        (2, 1), streams={"pixel_values": 29}, wiring=within("pixel_values"),
        readout={"pixel_values": 1 + 24 + 2},
        entries={"pixel_values": Entry("pixel_values", 1, 25, grid=patches(4, 4, 0), channel=1)},
    ),
    # encoder and decoder
    translation("bart", bart),
    translation("mbart", mbart),
    translation("marian", marian),
    translation("t5", t5, tolerance=1e-6),  # its softmax is in float32
    *(translation(
        f"{name}_shifted", build, examples=texts, collate=source_alone,
        target=[(3, 11), (2, 12), (1, 11)], readout={"decoder_input_ids": torch.tensor([3, 2, 1])},
        streams={"input_ids": N, "decoder_input_ids": N},
        entries={"input_ids": Entry("input_ids", also=("decoder_input_ids", lies))},
        alone=False,  # the padding is shifted, too, and the decoder sees it
    ) for name, build, lies in [("bart", bart, shifted), ("mbart", mbart, wrapped)]),
    translation(
        "t5_labels", t5, collate=source_and_labels, target=(2, 11),
        streams={"input_ids": N, "labels": 3},
        wiring=within("input_ids") + decoder("labels", "input_ids"),
        readout={"labels": 2}, tolerance=1e-6,
        entries={"input_ids": WORDS, "labels": Entry("labels", grid=lambda r, _: shifted(r))},
    ),
    translation(
        "whisper", whisper, examples=both(images(8, 20), prefixes),
        collate=spectrograms_and_prefix,
        streams={"input_features": 10, "decoder_input_ids": 5},
        wiring=within("input_features") + decoder("decoder_input_ids", "input_features"),
        entries={"input_features": Entry("input_features", grid=frames, channel=1),
                 "decoder_input_ids": Entry("decoder_input_ids")},
    ),
    # learned queries that read the input and are read by another one
    *(Streams(
        f"perceiver_{name}", build, images(3, 4, 4), as_inputs, 4,
        streams={"queries": 4, "inputs": 16, "queries_1": 1}, wiring=perceiver(), seen_raw=(),
        readout={"queries_1": 0},
        entries={"inputs": Entry("inputs", grid=patches(1, 1, 0), channel=1)},
    ) for name, build in [("learned", perceiver_learned), ("fourier", perceiver_fourier)]),
    Streams(
        "perceiver_text", perceiver_text, texts, tokens_as_inputs, 4,
        streams={"queries": 4, "inputs": N, "queries_1": 1}, wiring=perceiver(), seen_raw=(),
        readout={"queries_1": 0}, entries={"inputs": Entry("inputs")},
    ),
    # image tokens in a text
    *(chat(
        f"llava_{side}", llava, pictures, [16], collate=partial(dialogue, left=side == "left"),
        streams={"input_ids": 23, "pixel_values": 17},
        wiring=image_tokens_into_text(behind_class_token),
        entries={"input_ids": WORDS, "pixel_values": PIXELS},
    ) for side in ("right", "left")),
    chat(
        "llava_next", llava_next, images(3, 3, 16, 16), [16 + 36],
        collate=partial(dialogue, image_sizes=torch.tensor([16, 32])),
        streams={"input_ids": 59, "pixel_values": 51}, wiring=image_tokens_into_text(crops),
        entries={"input_ids": WORDS,
                 "pixel_values": Entry("pixel_values", grid=several_images(1), channel=2)},
    ),
    chat(
        "idefics3", idefics3, images(2, 3, 16, 16), [4, 4],
        streams={"input_ids": 17, "pixel_values": 32}, wiring=image_tokens_into_text(four_into_one),
        entries={"input_ids": WORDS,
                 "pixel_values": Entry("pixel_values", grid=several_images(0), channel=2)},
    ),
    chat(
        "idefics3_one_image", idefics3, images(1, 3, 16, 16), [4],
        streams={"input_ids": 11, "pixel_values": 16},
        wiring=image_tokens_into_text(four_into_one),
        entries={"input_ids": WORDS,
                 "pixel_values": Entry("pixel_values", grid=several_images(0), channel=2)},
    ),
    chat(  # what the queries have read of the image goes on into the text
        "instructblip", instructblip, pictures, [3],
        examples=both(texts, dialogues(3), pictures), collate=for_instructblip,
        streams={"input_ids": 10, "pixel_values": 17, "qformer_input_ids": 3 + N},
        wiring=image_tokens_into_text(queries, "qformer_input_ids", [
            *within("pixel_values"), ("qformer_input_ids", "qformer_input_ids"),
            ("qformer_input_ids", "pixel_values", slice(0, 3)),
            ("qformer_input_ids", "qformer_input_ids")]),
        joined=("qformer_input_ids", "input_ids"), seen_raw=("input_ids",),
        entries={"input_ids": WORDS, "pixel_values": PIXELS,
                 "qformer_input_ids": Entry("qformer_input_ids", 3)},
    ),
    chat(
        "mllama", mllama, None, [], examples=both(texts, images(1, 2, 3, 16, 16)),
        collate=for_mllama, streams={"input_ids": N, "pixel_values": 48}, joined=(),
        wiring=[*within("pixel_values", 3), ("input_ids", "input_ids"),
                ("input_ids", "pixel_values", slice(None), tiles()), ("input_ids", "input_ids")],
        entries={"input_ids": WORDS,
                 "pixel_values": Entry("pixel_values", grid=two_tiles, channel=3)},
    ),
]  # fmt: skip
STREAMS = {case.name: case for case in CASES}
assert len(STREAMS) == len(CASES)
