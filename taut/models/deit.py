"""DeiT: ViT with a second token ahead of the patches, that a teacher taught."""

from __future__ import annotations

from taut.config import ModelConfig, Reader
from taut.models.vit import IGNORED, body, vit
from taut.weights import Rename

ARCHITECTURE = "DeiTForImageClassification"
CLASSES = ("ForImageClassificationWithTeacher",)

RULES = (
    Rename("model.pooler.dense", "model.pooler.after.dense"),
    *body("deit", ("cls_token", "distillation_token")),
)

__all__ = ["IGNORED", "read"]


def read(r: Reader) -> ModelConfig:
    return vit(r, prefix=2)
