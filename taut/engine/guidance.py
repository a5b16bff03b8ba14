"""`Guidance`: classifier-free guidance, two rows of one request that get the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from taut.engine.request import Branch, Request, Row
from taut.errors import RequestError


class Guidance:
    """Moves a row away from what the model would say without its prompt (Sanchez et al. 2023,
    arXiv:2306.17806): `negative + scale * (row - negative)`, in log-probabilities.

    The negative row begins with `negative` in place of the prompt, or with the prompt's last token alone.
    """

    width = 2

    def __init__(self, scale: float, negative: Sequence[int] = ()):
        if not scale > 0:
            raise RequestError(f"guidance_scale is {scale!r}; expected a number more than 0 (1 for none)")
        self.scale, self.negative = scale, list(negative)

    def rows(self, request: Request) -> list[Row]:
        """The request's own row and the negative one."""
        return [request, Branch(request, self.negative or request.prompt[-1:], [])]

    def combine(self, logits: Tensor) -> Tensor:
        """Scores `[1, vocab]` of the logits `[2, vocab]` of both rows."""
        row, negative = logits.log_softmax(-1)
        return (negative + self.scale * (row - negative)).unsqueeze(0)
