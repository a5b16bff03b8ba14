"""Taut runs Hugging Face transformer checkpoints packed from end to end: no padding, no conversion step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that `import taut` (and `taut --help`) costs nothing.
_HOMES = {
    "AsyncEngine": "taut.engine.async_engine",
    "AsyncTextIteratorStreamer": "taut.engine.streamers",
    "AutoConfig": "taut.auto",
    "AutoFeatureExtractor": "taut.processor",
    "AutoImageProcessor": "taut.processor",
    "AutoModel": "taut.auto",
    "AutoModelForAudioClassification": "taut.auto",
    "AutoModelForCTC": "taut.auto",
    "AutoModelForCausalLM": "taut.auto",
    "AutoModelForImageClassification": "taut.auto",
    "AutoModelForMaskedLM": "taut.auto",
    "AutoModelForQuestionAnswering": "taut.auto",
    "AutoModelForSeq2SeqLM": "taut.auto",
    "AutoModelForSequenceClassification": "taut.auto",
    "AutoModelForSpeechSeq2Seq": "taut.auto",
    "AutoModelForTextEncoding": "taut.auto",
    "AutoModelForTokenClassification": "taut.auto",
    "AutoModelForZeroShotImageClassification": "taut.auto",
    "AutoProcessor": "taut.processor",
    "AutoTokenizer": "taut.tokenizer",
    "BitsAndBytesConfig": "taut.quant.config",
    "Batch": "taut.batch",
    "CausalLM": "taut.modeling",
    "DynamicCache": "taut.engine.dynamic_cache",
    "Engine": "taut.engine.engine",
    "GenerationConfig": "taut.engine.generation",
    "Request": "taut.engine.request",
    "SamplingParams": "taut.engine.request",
    "SentenceTransformer": "taut.sentences",
    "TautError": "taut.errors",
    "TextIteratorStreamer": "taut.engine.streamers",
    "TextStreamer": "taut.engine.streamers",
    "attention_kernel": "taut.kernels.attention",
    "pipeline": "taut.pipelines",
    "reverse_bettertransformer": "taut.integrations.transformers",
    "to_bettertransformer": "taut.integrations.transformers",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from taut.auto import AutoConfig as AutoConfig
    from taut.auto import AutoModel as AutoModel
    from taut.auto import AutoModelForAudioClassification as AutoModelForAudioClassification
    from taut.auto import AutoModelForCausalLM as AutoModelForCausalLM
    from taut.auto import AutoModelForCTC as AutoModelForCTC
    from taut.auto import AutoModelForImageClassification as AutoModelForImageClassification
    from taut.auto import AutoModelForMaskedLM as AutoModelForMaskedLM
    from taut.auto import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
    from taut.auto import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
    from taut.auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from taut.auto import AutoModelForSpeechSeq2Seq as AutoModelForSpeechSeq2Seq
    from taut.auto import AutoModelForTextEncoding as AutoModelForTextEncoding
    from taut.auto import AutoModelForTokenClassification as AutoModelForTokenClassification
    from taut.auto import (
        AutoModelForZeroShotImageClassification as AutoModelForZeroShotImageClassification,
    )
    from taut.batch import Batch as Batch
    from taut.engine.async_engine import AsyncEngine as AsyncEngine
    from taut.engine.dynamic_cache import DynamicCache as DynamicCache
    from taut.engine.engine import Engine as Engine
    from taut.engine.generation import GenerationConfig as GenerationConfig
    from taut.engine.request import Request as Request
    from taut.engine.request import SamplingParams as SamplingParams
    from taut.engine.streamers import AsyncTextIteratorStreamer as AsyncTextIteratorStreamer
    from taut.engine.streamers import TextIteratorStreamer as TextIteratorStreamer
    from taut.engine.streamers import TextStreamer as TextStreamer
    from taut.errors import TautError as TautError
    from taut.integrations.transformers import reverse_bettertransformer as reverse_bettertransformer
    from taut.integrations.transformers import to_bettertransformer as to_bettertransformer
    from taut.kernels.attention import attention_kernel as attention_kernel
    from taut.modeling import CausalLM as CausalLM
    from taut.pipelines import pipeline as pipeline
    from taut.processor import AutoFeatureExtractor as AutoFeatureExtractor
    from taut.processor import AutoImageProcessor as AutoImageProcessor
    from taut.processor import AutoProcessor as AutoProcessor
    from taut.quant.config import BitsAndBytesConfig as BitsAndBytesConfig
    from taut.sentences import SentenceTransformer as SentenceTransformer
    from taut.tokenizer import AutoTokenizer as AutoTokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name.endswith(("Processor", "FeatureExtractor")):
        return getattr(import_module("taut.processor"), name)
    if name not in _HOMES and ("For" in name or name.endswith(("Model", "ModelWithProjection"))):
        return import_module("taut.auto").family_class(name)
    if name not in _HOMES:
        raise AttributeError(f"module 'taut' has no attribute {name!r}; it has: {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
