"""Processors: images and sounds to what models take."""

from __future__ import annotations

from taut.processor.image import (
    BeitImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    DeiTImageProcessor,
    ImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)
from taut.processor.joint import AutoProcessor, Processor, WhisperProcessor
from taut.processor.load import AutoFeatureExtractor, AutoImageProcessor
from taut.processor.output import BatchFeature
from taut.processor.read import open_image, read_sound, resample
from taut.processor.sound import (
    ASTFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

CLIPProcessor = SiglipProcessor = Wav2Vec2Processor = Processor

__all__ = [
    "ASTFeatureExtractor",
    "AutoFeatureExtractor",
    "AutoImageProcessor",
    "AutoProcessor",
    "BatchFeature",
    "BeitImageProcessor",
    "BitImageProcessor",
    "CLIPImageProcessor",
    "CLIPProcessor",
    "DeiTImageProcessor",
    "ImageProcessor",
    "Processor",
    "SiglipImageProcessor",
    "SiglipProcessor",
    "ViTImageProcessor",
    "Wav2Vec2FeatureExtractor",
    "Wav2Vec2Processor",
    "WhisperFeatureExtractor",
    "WhisperProcessor",
    "open_image",
    "read_sound",
    "resample",
]
