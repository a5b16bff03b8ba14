"""XLM-RoBERTa: RoBERTa in a hundred languages."""

from __future__ import annotations

from taut.models.roberta import IGNORED, RULES, read

ARCHITECTURE = "XLMRobertaForMaskedLM"

__all__ = ["IGNORED", "RULES", "read"]
