"""ODAM: Zhao & Chan, "ODAM: Gradient-based Instance-specific Visual Explanations for Object
Detection", ICLR 2023; Zhao, Hsiao & Chan, TPAMI 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from captum_attn.attr._base import Relevance, Result, Run
from captum_attn.attr._propagate import is_cross_attention
from captum_attn.attr._token_sums import TokenSums
from captum_attn.errors import OptionError, TargetError
from captum_attn.observe.capture.restore import modules_of
from captum_attn.observe.streams.states import InputMap, Source, State
from captum_attn.observe.vectors.recording_tap import RecordingTap
from captum_attn.observe.vectors.vector_changes import VectorChanges


class Odam(TokenSums):
    r"""ODAM, Zhao & Chan, ICLR 2023: M = (Σ_c ∂y/∂F[c] ⊙ F[c])^+ of one feature map F.

    The gradient is not pooled, so that it stays that of one object; pooled, it would be Grad-CAM's.
    y is any output of one detection: the class score or a box coordinate of one query,
    target=(query, class). The method is meant for detectors, whose output has an axis of
    detections.

    The authors have no transformer; F is here what the last cross-attention reads, the encoder's
    tokens of the image, and in a model without one what the values of the last block are projected
    from: the tokens that enter it, behind their LayerNorm where that comes first. (In front of it
    Σ_c ∂y/∂F[c] F[c] is 0, because a LayerNorm forgets the length of a vector.) Nothing is enlarged
    or brought to [0, 1] beyond what `attribute` does for all methods.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Options of `attribute` and its companions:
        layer (Module or str, optional): a module, or the name of one, whose output is F: (B, C, h,
            w), or tokens (B, n, C); one more run for each target. Default: the above.

    Raises:
        TargetError: where the output has no axis of detections, or no image is given.

    Examples::

        >>> Odam(detr).attribute(images, target=(query, label)).sum(1)   # (B, H, W)
    """

    @dataclass(frozen=True)
    class Options(TokenSums.Options):
        layer: nn.Module | str | None = None

    keeps_graph = True
    tap = RecordingTap

    @classmethod
    def get_name(cls) -> str:
        return "ODAM"

    def explain(self, run: Run[Options]) -> Result:
        image = self._image(run)
        if run.options.layer is None:
            return Result(run, self.relevance(run))
        maps = self._maps(run)  # (B, h, w) or (B, n)
        if maps[0].numel() == image.n:
            return Result(run, {image: maps.flatten(1).to(run.like)})
        entry = next(filter(_is_image, image.entries))
        name, pixels = entry.leaf.name, entry.leaf.tensor
        if maps.ndim != 3 or pixels.ndim != 4:
            raise OptionError(
                f"layer: expected a module whose output is a feature map (B, C, h, w), or has one "
                f"row for each of the {image.n} tokens of {image.name!r}; got {tuple(maps.shape)} "
                "without the channels"
            )
        size = pixels.shape[2:]
        large = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
        relevance = (large / pixels.shape[1]).expand(pixels.shape)
        return Result(run, None, {name: relevance.to(run.like)})

    def relevance(self, run: Run[Options]) -> Relevance:
        self._image(run)
        if run.options.layer is not None:
            return self.explain(run).of_tokens or {}
        return super().relevance(run)

    def credits(self, run: Run[Options]) -> dict[State, Tensor]:
        calls = run.calls_into()
        crossing = [state for state in calls if is_cross_attention(state)]
        state = (crossing or calls)[-1]
        changes = VectorChanges(run.observation)
        term, rows = changes.projected(state)
        gradient = run.gradient_at(term.edge)
        if gradient is None:
            return {}
        vectors = rows(term.vectors()) / term.scale
        return {state.key_state: (vectors * rows(gradient)).sum(-1).clamp_min(0).to(run.like)}

    def layer_maps(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the method makes nothing of the attention maps."""
        raise OptionError(
            "ODAM makes nothing of the attention maps: expected a call of `attribute` or "
            "`attribute_tokens`"
        )

    def _maps(self, run: Run[Options]) -> Tensor:
        """M of the module's output."""
        layer = run.options.layer
        named = {
            name: module
            for root in modules_of(self.forward_func)
            for name, module in root.named_modules()
        }
        found = named.get(layer) if isinstance(layer, str) else layer
        if found is None or all(found is not module for module in named.values()):
            raise OptionError(
                f"layer: expected a module of the model, or the name of one, got {layer!r}"
            )
        features, gradient = run.layer_on(run.inputs, found)
        channels = 1 if features.ndim == 4 else -1
        return (features * gradient).sum(channels).clamp_min(0)

    def _image(self, run: Run[Options]) -> Source:
        """The image whose objects are detected."""
        images = [s for s in run.observation.wiring.sources if any(map(_is_image, s.entries))]
        words = {s.name for s in run.observation.wiring.sources if any(map(_is_word, s.entries))}
        read = {state.stream for state in run.weights}
        if run.output_axes < 3 or len(images) != 1 or read & words:
            raise TargetError(
                "ODAM is meant for detectors: expected an image, and an output (B, detections, "
                f"classes or coordinates) that is no text's; got {len(images)} images and an "
                f"output of {run.output_axes} axes that reads {sorted(read)}; use AttentionGradCam"
            )
        return images[0]


def _is_word(entry: InputMap) -> bool:
    return entry.leaf.ids is not None


def _is_image(entry: InputMap) -> bool:
    return entry.of_input and entry.leaf.ids is None and entry.leaf.tensor.ndim >= 4
