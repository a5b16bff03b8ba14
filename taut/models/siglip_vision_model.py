"""The images' half of SigLIP."""

from __future__ import annotations

from taut.models.siglip import DENSE, IGNORED, VISION
from taut.models.siglip import read_vision as read
from taut.weights import Rename

ARCHITECTURE = "SiglipVisionModel"
WHOLE = "siglip"  # whose files hold it too

RULES = (Rename("vision_model", "model"), *VISION)

__all__ = ["DENSE", "IGNORED", "RULES", "read"]
