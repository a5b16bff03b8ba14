"""The texts' half of SigLIP."""

from __future__ import annotations

from taut.models.siglip import IGNORED, TEXT
from taut.models.siglip import read_text as read
from taut.weights import Rename

ARCHITECTURE = "SiglipTextModel"
WHOLE = "siglip"  # whose files hold it too

RULES = (Rename("text_model", "model"), *TEXT)

__all__ = ["IGNORED", "RULES", "read"]
