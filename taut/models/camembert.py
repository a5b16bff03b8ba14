"""CamemBERT: RoBERTa in French."""

from __future__ import annotations

from taut.models.roberta import IGNORED, RULES, read

ARCHITECTURE = "CamembertForMaskedLM"

__all__ = ["IGNORED", "RULES", "read"]
