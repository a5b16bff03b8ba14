"""DeiT: ViT with a second token ahead of the patches, that a teacher taught."""

from __future__ import annotations

from taut.config import ModelConfig, Reader
from taut.models.vit import IGNORED, POOLER, body, module_body, vit

ARCHITECTURE = "DeiTForImageClassification"
CLASSES = ("ForImageClassificationWithTeacher",)

_TOKENS = ("cls_token", "distillation_token")
RULES = (POOLER, *body("deit", _TOKENS))
MODULES = (POOLER, *module_body("deit", _TOKENS))

__all__ = ["IGNORED", "read"]


def read(r: Reader) -> ModelConfig:
    return vit(r, prefix=2)
