"""TIS, Transformer Input Sampling: Englebert et al., "Explaining through Transformer Input
Sampling", ICCV 2023 workshops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_attn._checks import number, shown, whole
from captum_attn.attr._attended import ratio
from captum_attn.attr._base import Relevance, Run
from captum_attn.attr._batches import copied
from captum_attn.attr._masks import MaskingMethod, generators, of_source, rows_of, tokens_of
from captum_attn.errors import OptionError, WiringError
from captum_attn.observe.capture.restore import modules_of
from captum_attn.observe.interventions import hiding
from captum_attn.observe.streams.states import Source
from captum_attn.observe.vectors.padding import Padding
from captum_attn.observe.vectors.recording_tap import RecordingTap
from captum_attn.observe.vectors.vector_changes import VectorChanges

MOST_ROUNDS = 100  # of k-means


class TransformerInputSampling(MaskingMethod):
    r"""Transformer Input Sampling (TIS), Englebert et al., ICCV 2023 workshops.

    S[i] = Σ_m s_m M_m[i] / Σ_m M_m[i], with s_m the class's probability while the model sees the
    tokens of the mask M_m alone. The masks come from the model: each component of the vectors
    behind each block is a vector over the tokens; these L D vectors are clustered (k-means), and of
    each centroid the ⌊ρ n⌋ largest tokens are kept. Only s_m depends on the class.

    The authors take the other tokens out of the sequence. Here their keys are hidden in every
    attention call, which is the same for an output that reads tokens which are kept: those that no
    input enters ([CLS], registers) and those that are read are never hidden. An output that reads
    all tokens (their mean) has none left to hide, and is refused.

    An extension to text: the tokens are the words, special tokens that are not read among them.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`; the vectors are
            those of `layers`.

    Options of `attribute` and its companions:
        n_masks (int): K, the number of clusters, at most that of the vectors. Default: 1024.
        keep (float or tuple of float): ρ, or several of them, with n_masks masks each. Default:
            0.5.
        seed (int): of the k-means' start, the same for every example. Default: 0.
        centroids (Tensor, optional): (K, n) or (B, K, n), of the tokens that may be hidden, or of
            all tokens; nothing is clustered then. Default: None.
        perturbations_per_eval (int): masks in one forward pass, as in Captum. Default: 1.
        show_progress (bool): a progress bar over the masks. Default: False.

    Raises:
        WiringError: where the output reads all tokens, where something else than attention mixes
            them, or where they are those of several streams.

    Examples::

        >>> tis = TransformerInputSampling(model)
        >>> tis.attribute(images, target=3, perturbations_per_eval=64).sum(1)   # (B, H, W)
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(MaskingMethod.Options):
        n_masks: int = 1024
        keep: float | tuple | list = 0.5
        seed: int = 0
        centroids: Tensor | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            whole("n_masks", self.n_masks, least=1)
            whole("seed", self.seed, least=0)
            if not self.ratios:
                raise OptionError(f"keep: expected a share or several, got {shown(self.keep)}")
            for one in self.ratios:
                number("keep", one, 0, 1, open_ends="(")

        @classmethod
        def of_examples(
            cls, given: Mapping[str, Any], part: slice, inputs: Any, batch: int
        ) -> Mapping[str, Any]:
            return rows_of(given, {"centroids": 3}, part, batch)

        @property
        def ratios(self) -> tuple[float, ...]:
            return tuple(self.keep) if isinstance(self.keep, (tuple, list)) else (self.keep,)

    tap = RecordingTap

    @classmethod
    def get_name(cls) -> str:
        return "Transformer Input Sampling (TIS)"

    def relevance(self, run: Run[Options]) -> Relevance:
        source = self._source(run)
        candidates = self._candidates(run, source)  # (B, n)
        masks = run.cached("masks", lambda: self._masks(run, source, candidates))  # (B, M, n)
        calls = [state.call for state in run.attention_states]
        roots = modules_of(self.forward_func)

        def copy(first: int, last: int):  # type: ignore[no-untyped-def]
            hidden = (candidates[:, None] & ~masks[:, first:last]).transpose(0, 1).flatten(0, 1)
            during = hiding(run.observation, {source: hidden}, calls, roots)
            return copied(run.inputs, last - first, run.batch), during

        moving = any(entry.moving for entry in source.entries)
        # A model may draw its patches' order (ViLT); copies would draw others than were observed.
        size = 1 if moving else run.options.perturbations_per_eval
        scores = self.measured(run, masks.shape[1], copy, size)  # (B, M)
        kept = masks.to(scores)
        return {source: ratio((scores[:, None] @ kept)[:, 0], kept.sum(1))}

    def _source(self, run: Run[Options]) -> Source:
        """The one source of the inputs' tokens."""
        attending = {state.stream for state in run.attention_states}
        sources = [s for s in run.observation.wiring.sources if s.entries]
        if (
            len(sources) != 1
            or sources[0].name not in attending
            or run.observation.wiring.mixed_states
        ):
            why = (
                "something else than attention mixes its tokens"
                if len(sources) == 1 and sources[0].name in attending
                else f"got {[source.name for source in sources]}, and attention in {attending}"
            )
            raise WiringError(
                f"{self.get_name()} hides tokens from attention: expected a model of one stream of "
                f"tokens, which only attention mixes; {why}; use ViT-CX or GenericAttention"
            )
        return sources[0]

    def _candidates(self, run: Run[Options], source: Source) -> Tensor:
        """The tokens that may be hidden, (B, n): those of the inputs that are not read."""
        entered = torch.zeros(run.batch, source.n + 1, dtype=torch.bool, device=run.like.device)
        for entry in source.entries:
            if entry.to is None:
                entered[:] = True
            else:
                to = torch.where(entry.to < 0, source.n, entry.to).to(entered.device)
                entered.scatter_(1, to.expand(run.batch, -1), True)
        read = tokens_of(run, dict(run.weights)).get(source)
        found = entered[:, : source.n]
        padding = Padding(run.observation.wiring)
        first = next(s.query_state for s in run.attention_states if s.stream == source.name)
        real = padding.tokens(first)
        if real is not None and real.shape[-1] == source.n:
            found = found & real[:, 0].to(found.device)
        found = found if read is None else found & (read == 0)
        if not bool(found.any(1).all()):
            raise WiringError(
                f"{self.get_name()} is meant for an output that reads a token such as [CLS]: "
                "expected tokens that are not read, got an output that reads all of them (their "
                "mean), and so would read hidden ones; use GenericAttention"
            )
        return found

    def _masks(self, run: Run[Options], source: Source, candidates: Tensor) -> Tensor:
        """(B, M, n) bool; a mask of an empty cluster keeps nothing, and counts for nothing."""
        options, masks = run.options, []
        vectors = self._vectors(run, source) if options.centroids is None else None
        for b, generator in enumerate(generators(options.seed, run.batch)):
            places = candidates[b].nonzero()[:, 0]
            if vectors is None:
                centroids = _given(options.centroids, b, run.batch, places, source.n)
            else:
                centroids = k_means(vectors[b][:, places], options.n_masks, generator)
            centroids = centroids.to(run.like)
            for keep in options.ratios:
                top = centroids.topk(int(keep * len(places)), 1).indices  # (K, ⌊ρ n⌋)
                mask = torch.zeros(len(centroids), source.n, dtype=torch.bool, device=top.device)
                masks.append(mask.scatter_(1, places[top], True))
        most, per = max(map(len, masks)), len(options.ratios)
        filled = [torch.cat([m, m.new_zeros(most - len(m), source.n)]) for m in masks]
        return torch.stack(filled).unflatten(0, (-1, per)).flatten(1, 2)

    def _vectors(self, run: Run[Options], source: Source) -> Tensor:
        """Every component behind every block as a vector over the tokens, (B, L D, n)."""
        changes = VectorChanges(run.observation)
        layers = [
            of_source(run, state, source, changes.after(state).to(run.like))
            for state in run.calls_into()
            if state.stream == source.name
        ]
        return torch.cat(layers, -1).mT


def k_means(vectors: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The centroids of the clusters that hold something, (K, n), by Lloyd's algorithm."""
    if k >= len(vectors):
        return vectors
    chosen = torch.randperm(len(vectors), generator=generator)[:k].to(vectors.device)
    centroids, before = vectors[chosen], None
    for _ in range(MOST_ROUNDS):
        nearest = torch.cdist(vectors, centroids).argmin(1)
        if before is not None and torch.equal(nearest, before):
            break
        counts = torch.bincount(nearest, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add_(0, nearest, vectors)
        centroids, before = sums[counts > 0] / counts[counts > 0, None], nearest
        if bool((counts == 0).any()):
            before = None  # the clusters are numbered anew
    return centroids


def _given(centroids: Tensor | None, example: int, batch: int, places: Tensor, n: int) -> Tensor:
    """The user's centroids of one example, (K, n of the tokens that may be hidden)."""
    assert centroids is not None
    rows = centroids[example] if centroids.ndim == 3 and len(centroids) == batch else centroids
    if rows.ndim != 2 or rows.shape[1] not in (len(places), n) or not rows.is_floating_point():
        raise OptionError(
            f"centroids: expected floats (K, {len(places)}), of the tokens that may be hidden, or "
            f"(K, {n}), of all, and such rows for each of {batch} examples; got {shown(centroids)}"
        )
    return rows if rows.shape[1] == len(places) else rows[:, places.to(rows.device)]
