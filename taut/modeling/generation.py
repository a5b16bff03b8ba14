"""`GenerationMixin`: what every model that generates can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from taut.engine.generate import generate, stream
from taut.engine.offline import generate_batch
from taut.engine.output import transition_scores
from taut.engine.resident import Resident
from taut.engine.stream import Stream


class GenerationMixin:
    """Generation through the engine that stays with the model. The first call makes it: its cache and, on a
    GPU, the graphs of decode steps serve all further calls, from any thread."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts; see `taut.engine.generate.generate`, which documents every option."""
        return generate(self, *args, **kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Stream:
        """Continue one prompt piece by piece; see `taut.engine.generate.stream`."""
        return stream(self, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Answer a whole set of prompts; see `taut.engine.offline.generate_batch`."""
        return generate_batch(self, *args, **kwargs)

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """Scores `[rows, new]` of the tokens that were generated, from what `generate` returned; see
        `taut.engine.output.transition_scores`."""
        return transition_scores(sequences, scores, beam_indices, normalize_logits)

    def free_cache(self) -> None:
        """Give back the memory of the cache and of decode graphs; the next call makes them anew. To be called
        too after weights were written through `.data`, which leaves no trace."""
        Resident.of(self).free()
