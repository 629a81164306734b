"""ViT-CX: Xie, Li, Cao & Zhang, "ViT-CX: Causal Explanation of Vision Transformers", IJCAI 2023."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_attn._checks import number, shown, whole
from captum_attn.attr._attended import ratio
from captum_attn.attr._base import Result, Run
from captum_attn.attr._batches import copied
from captum_attn.attr._inputs import Inputs
from captum_attn.attr._masks import MaskingMethod, generators, of_source, rows_of
from captum_attn.errors import InputError, MissingExtraError, OptionError, WiringError
from captum_attn.observe.streams.states import InputMap, Source
from captum_attn.observe.streams.to_inputs import patch_grid
from captum_attn.observe.vectors.recording_tap import RecordingTap
from captum_attn.observe.vectors.vector_changes import VectorChanges


class VitCX(MaskingMethod):
    r"""ViT-CX, Xie et al., IJCAI 2023: S = (1/N) Σ_i s_i M_i / Σ_j M_j of every pixel; signed.

    s_i = p(x ⊙ M_i + ε_i (1 - M_i)) - p(x + ε_i (1 - M_i)) + p(x), with p the class's probability
    and ε_i noise, whose own effect is the second term. The masks are the model's own features: what
    the values of the last block are projected from, one map over the patches per component,
    enlarged to the image and brought to [0, 1]; maps within a cosine distance of `threshold`
    (complete linkage) are added, and brought to [0, 1] again. Only p depends on the class.

    The method is meant for one image (B, C, H, W) with a grid of patches; behind the masks the
    model is a black box. The pixels' relevance is divided equally among the channels.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`; the last block is
            that of `layers`.

    Options of `attribute` and its companions:
        threshold (float): cosine distance within which maps are one mask. Default: 0.1.
        noise (float or Tensor): the standard deviation of ε, in units of the input; or ε itself,
            (N, C, H, W) or (B, N, C, H, W). Default: 0.1.
        seed (int): of the noise, the same for every example. Default: 0.
        masks (Tensor, optional): (N, H, W) or (B, N, H, W); nothing is clustered then, which needs
            scipy. Default: None.
        perturbations_per_eval (int): masks in one forward pass, as in Captum. Default: 1.
        show_progress (bool): a progress bar over the masks. Default: False.

    Raises:
        InputError: where no image with a grid of patches is among the inputs.

    Examples::

        >>> VitCX(model).attribute(images, target=3, perturbations_per_eval=50).sum(1)
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(MaskingMethod.Options):
        threshold: float = 0.1
        noise: float | Tensor = 0.1
        seed: int = 0
        masks: Tensor | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            number("threshold", self.threshold, 0, 2)
            whole("seed", self.seed, least=0)
            if not isinstance(self.noise, Tensor):
                number("noise", self.noise, 0)

        @classmethod
        def of_examples(
            cls, given: Mapping[str, Any], part: slice, inputs: Any, batch: int
        ) -> Mapping[str, Any]:
            return rows_of(given, {"masks": 4, "noise": 5}, part, batch)

    tap = RecordingTap

    @classmethod
    def get_name(cls) -> str:
        return "ViT-CX"

    def explain(self, run: Run[Options]) -> Result:
        source, entry, grid, covered = self._image(run)
        name = entry.leaf.name
        image = _input(run, name)  # (B, C, H, W)
        if run.options.masks is None:
            masks = run.cached("masks", lambda: self._masks(run, source, grid, covered))
            counts = (masks.flatten(2) != 0).any(2).sum(1)  # an example may have fewer than others
        else:
            masks = _of_examples("masks", run.options.masks, image[:, 0], run.batch)
            counts = torch.full((run.batch,), masks.shape[1], device=masks.device)
        if not bool(counts.all()):
            warnings.warn(
                f"{self.get_name()}: the patches of an example of {name!r} are all alike to the "
                "model, so that they make no mask and its map is zero",
                stacklevel=2,
            )
        effects = self._effects(run, name, image, masks)  # (B, N)
        weighted = (effects[:, :, None, None] * masks).sum(1) / counts.clamp_min(1)[:, None, None]
        pixels = ratio(weighted, masks.sum(1))[:, None] / image.shape[1]
        return Result(run, None, {name: pixels.expand(image.shape).to(run.like)})

    def _image(self, run: Run[Options]) -> tuple[Source, InputMap, Tensor, tuple[int, int]]:
        """The one image, and the tokens of its patches, (B or 1, h, w)."""
        found = [
            (source, entry, *grid)
            for source in run.observation.wiring.sources
            for entry in source.entries
            if entry.leaf.name in run.observation.names and (grid := patch_grid(entry)) is not None
        ]
        if len(found) != 1:
            raise InputError(
                f"{self.get_name()} is meant for an image (B, C, H, W) that is cut into a grid of "
                f"patches: expected one among the inputs {run.observation.names}, found "
                f"{len(found)}; use TransformerInputSampling or GenericAttention"
            )
        return found[0]

    def _masks(
        self, run: Run[Options], source: Source, grid: Tensor, covered: tuple[int, int]
    ) -> Tensor:
        """(B, N, H, W), zeros behind the masks of an example that has fewer."""
        calls = [s for s in run.calls_into(run.attention_states) if s.stream == source.name]
        calls = [s for s in calls if s.key_state is s.query_state]
        if not calls:
            raise WiringError(
                f"{self.get_name()}: expected an attention call within the image, got none"
            )
        term, rows = VectorChanges(run.observation).projected(calls[-1])
        features = of_source(run, calls[-1].key_state, source, rows(term.vectors()).to(run.like))
        entry = next(e for e in source.entries if patch_grid(e) is not None)
        size = entry.leaf.tensor.shape[2:]
        found = []
        for b, vectors in enumerate(features):
            maps = vectors[grid.expand(run.batch, -1, -1)[b]].movedim(-1, 0)  # (D, h, w)
            large = F.interpolate(maps[None], covered, mode="bilinear", align_corners=False)[0]
            large = F.pad(large, (0, size[1] - covered[1], 0, size[0] - covered[0]))
            found.append(joined(unit_range(large), run.options.threshold))
        most = max(map(len, found))
        return torch.stack([F.pad(m, (0, 0, 0, 0, 0, most - len(m))) for m in found])

    def _effects(self, run: Run[Options], name: str, image: Tensor, masks: Tensor) -> Tensor:
        """s, (B, N)."""
        batch, count = masks.shape[:2]
        draws = _Noise(run.options, image, count)
        noise: list[Tensor] = []

        def changed(values: Tensor) -> Inputs:
            return _with(run, name, values.flatten(0, 1), len(values))

        def masked(first: int, last: int) -> tuple[Inputs, None]:
            mask = masks[:, first:last, None].transpose(0, 1)  # (N', B, 1, H, W)
            noise[:] = [draws(first, last).transpose(0, 1) * (1 - mask)]
            return changed(image * mask + noise[0]), None

        def noisy(first: int, last: int) -> tuple[Inputs, None]:
            mask = masks[:, first:last, None].transpose(0, 1)
            return changed(image + draws(first, last).transpose(0, 1) * (1 - mask)), None

        whole, size = run.value_on(run.inputs), run.options.perturbations_per_eval
        with_mask = self.measured(run, count, masked, size)
        draws = _Noise(run.options, image, count)
        return with_mask - self.measured(run, count, noisy, size) + whole.to(masks)[:, None]


class _Noise:
    """ε of the masks, drawn in their order, from a generator for each example."""

    def __init__(self, options: Any, image: Tensor, count: int) -> None:
        self.options, self.image = options, image
        self.generators = list(generators(options.seed, len(image)))
        self.given: Tensor | None = None
        if isinstance(options.noise, Tensor):
            self.given = _of_examples("noise", options.noise, image, len(image))
            if self.given.shape[1] != count:
                raise OptionError(
                    f"noise: expected one for each of the {count} masks, got {shown(options.noise)}"
                )

    def __call__(self, first: int, last: int) -> Tensor:
        """(B, last - first, C, H, W)."""
        if self.given is not None:
            return self.given[:, first:last]
        shape, dtype = self.image.shape[1:], self.image.dtype
        drawn = [
            torch.stack([torch.randn(shape, generator=g, dtype=dtype) for _ in range(first, last)])
            for g in self.generators
        ]
        return self.options.noise * torch.stack(drawn).to(self.image.device)


_ROUNDING = 16  # units in the last place


def unit_range(maps: Tensor) -> Tensor:
    """Every map (N, H, W) from 0 to 1; those that are constant but for rounding are 0."""
    least, most = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    rounding = _ROUNDING * torch.finfo(maps.dtype).eps * torch.maximum(-least, most)
    return ratio(maps - least, most - least) * (most - least > rounding)


def joined(maps: Tensor, threshold: float) -> Tensor:
    """Maps (D, H, W) within a cosine distance are added: (N, H, W), from 0 to 1."""
    try:
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform
    except ImportError as error:
        raise MissingExtraError(
            "ViT-CX clusters its masks with scipy: pip install 'captum_attn[solvers]', or pass "
            "masks= of your own"
        ) from error
    maps = maps[maps.flatten(1).any(1)]
    if len(maps) < 2:
        return maps
    rows = F.normalize(maps.double().flatten(1), dim=1)
    distance = (1 - rows @ rows.mT).clamp_min(0).fill_diagonal_(0).cpu().numpy()
    labels = fcluster(
        linkage(squareform(distance, checks=False), "complete"), threshold, "distance"
    )
    index = torch.as_tensor(labels, device=maps.device).long() - 1
    sums = maps.new_zeros(int(index.max()) + 1, *maps.shape[1:])
    return unit_range(sums.index_add_(0, index, maps))


def _input(run: Run[Any], name: str) -> Tensor:
    given = run.inputs
    if isinstance(given, Mapping):
        return given[name]
    values = given if isinstance(given, tuple) else (given,)
    return values[run.observation.names.index(name)]


def _with(run: Run[Any], name: str, image: Tensor, times: int) -> Inputs:
    """Copies of the inputs with another image."""
    inputs = copied(run.inputs, times, run.batch)
    if isinstance(inputs, Mapping):
        return {**inputs, name: image}
    if not isinstance(inputs, tuple):
        return image
    place = run.observation.names.index(name)
    return (*inputs[:place], image, *inputs[place + 1 :])


def _of_examples(name: str, given: Tensor, image: Tensor, batch: int) -> Tensor:
    """(N, ...) for all examples, or (B, N, ...), as (B, N, ...)."""
    own = image.shape[1:]
    rows = given[None] if given.ndim == len(own) + 1 else given
    if rows.ndim != len(own) + 2 or rows.shape[2:] != own or len(rows) not in (1, batch):
        raise OptionError(
            f"{name}: expected a Tensor (N, {', '.join(map(str, own))}), or such rows for each of "
            f"{batch} examples, got {shown(given)}"
        )
    return rows.to(image).expand(batch, *rows.shape[1:])
