"""The texts' half of CLIP."""

from __future__ import annotations

from taut.models.clip import IGNORED, TEXT
from taut.models.clip import read_text as read
from taut.weights import Rename

ARCHITECTURE = "CLIPTextModel"
CLASSES = ("ModelWithProjection",)
WHOLE = "clip"  # whose files hold it too

RULES = (Rename("text_model", "model"), *TEXT)

__all__ = ["IGNORED", "RULES", "read"]
