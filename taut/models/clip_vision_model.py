"""The images' half of CLIP."""

from __future__ import annotations

from taut.models.clip import IGNORED, VISION
from taut.models.clip import read_vision as read
from taut.weights import Rename

ARCHITECTURE = "CLIPVisionModel"
CLASSES = ("ModelWithProjection",)
WHOLE = "clip"  # whose files hold it too

RULES = (Rename("vision_model", "model"), *VISION)

__all__ = ["IGNORED", "RULES", "read"]
