"""The `Auto...` classes and the families' own class names, which load what a folder or Hub id holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from taut.config import ModelConfig
from taut.errors import ConfigError, nearest
from taut.modeling import (
    CausalLM,
    ContrastiveModel,
    EncoderModel,
    HeadlessModel,
    ImageClassifier,
    ImageModel,
    MaskedLM,
    QuestionAnswerer,
    Seq2SeqLM,
    Seq2SeqModel,
    SequenceClassifier,
    SpeechSeq2SeqLM,
    SpeechSeq2SeqModel,
    TextTower,
    TokenClassifier,
)
from taut.modeling.base import PreTrainedModel
from taut.modeling.causal import CAUSAL
from taut.modeling.configs import config_at
from taut.modeling.contrast import TextProjection
from taut.modeling.image import ImageProjection, TaughtImageClassifier
from taut.modeling.spectrogram import SpectrogramClassifier, SpectrogramEncoder
from taut.modeling.speech import CtcModel, SpeechClassifier, SpeechEncoder
from taut.modeling.speech_seq2seq import SpeechEncoderClassifier
from taut.models import families, family, kind, read_config, stem


class AutoConfig:
    """Reads what a model is, without its weights."""

    def __init__(self) -> None:
        raise TypeError("AutoConfig is not a config; call AutoConfig.from_pretrained(name)")

    @staticmethod
    def from_pretrained(
        name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        gguf_file: str | None = None,
        trust_remote_code: bool | None = None,
        **changes: Any,
    ) -> ModelConfig:
        """The config of a folder, a `.gguf` file or a Hub id, of which nothing else is downloaded. `changes`
        take the place of what `config.json` says, under its names. It has these names too
        (`config.hidden_size`), and `from_config` and `from_pretrained(config=...)` take it.

        Raises `CheckpointError` where there is none, and `ConfigError` for what Taut does not know or accept;
        no code of a repository is run, whatever `trust_remote_code` says.
        """
        where = {"revision": revision, "cache_dir": cache_dir, "token": token}
        where |= {"local_files_only": local_files_only, "gguf_file": gguf_file}
        return _checked(config_at(name, changes, **where), changes, str(name))

    @staticmethod
    def for_model(model_type: str, **values: Any) -> ModelConfig:
        """The config of a family, with these values and its defaults for others."""
        return _checked(read_config({"model_type": model_type, **values}, model_type), values, model_type)


def _checked(config: ModelConfig, given: Mapping[str, Any], source: str) -> ModelConfig:
    """The config, where it has read all that was `given` by hand."""
    for name in given:
        if name in config.unused:
            others = [key for key in config.source if key not in given]
            raise ConfigError(f"{source}: a {config.model_type!r} has no {name!r}{nearest(name, others)}")
    return config


class _Auto(PreTrainedModel):
    """Stands for a class of model of whatever family a folder, file or Hub id is; not instantiated itself.

    `kinds` gives the class of each kind of family, `model_type` the one family that it loads, if only one.
    """

    kinds: Mapping[str, type[PreTrainedModel]] = MappingProxyType({})
    model_type: str | None = None

    def __init__(self, *_: Any, **__: Any) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is not a model; call {name}.from_pretrained(name)")

    @classmethod
    def of(cls, config: ModelConfig, source: str = "the config") -> type[PreTrainedModel]:
        own = None if cls.model_type is None else family(cls.model_type)
        if getattr(own, "WHOLE", None) == config.model_type:  # a half of it
            return cls.kinds[kind(own)].of(config, source)
        if cls.model_type not in (None, config.model_type.replace("-", "_")):
            general = next((base for base in cls.__mro__ if base.__name__ in AUTO), AutoModel)
            raise ConfigError(
                f"{source} is a {config.model_type!r} and not a {cls.model_type!r}; "
                f"load it with {general.__name__}, which takes every family"
            )
        if config.kind not in cls.kinds:
            able = [name for name, auto in AUTO.items() if config.kind in auto.kinds]
            raise ConfigError(
                f"{source} is a {config.model_type!r}, a family of {config.kind}s, which {cls.__name__} does "
                f"not load; these do: {', '.join(able)}"
            )
        return cls.kinds[config.kind].of(config, source)


class AutoModel(_Auto):
    """Loads a model without a head: hidden states."""

    kinds = MappingProxyType(
        {
            "decoder": HeadlessModel,
            "encoder": HeadlessModel,
            "encoder-decoder": Seq2SeqModel,
            "image encoder": ImageModel,
            "image-text model": ContrastiveModel,
            "image tower": ImageModel,
            "spectrogram encoder": SpectrogramEncoder,
            "speech encoder": SpeechEncoder,
            "speech encoder-decoder": SpeechSeq2SeqModel,
            "text tower": TextTower,
        }
    )


class AutoModelForCausalLM(_Auto):
    """Loads a decoder that predicts the next token, and generates."""

    kinds = MappingProxyType({"decoder": CausalLM})


class AutoModelForSeq2SeqLM(_Auto):
    """Loads an encoder-decoder that predicts the next token, and generates."""

    kinds = MappingProxyType({"encoder-decoder": Seq2SeqLM})


class AutoModelForSpeechSeq2Seq(_Auto):
    """Loads an encoder of sound with a decoder that writes what was said."""

    kinds = MappingProxyType({"speech encoder-decoder": SpeechSeq2SeqLM})


class AnyLanguageModel(_Auto):
    """Loads whatever generates text, for those who don't mind what it is."""

    kinds = MappingProxyType({**AutoModelForCausalLM.kinds, **AutoModelForSeq2SeqLM.kinds})


class AnyImageModel(_Auto):
    """Loads what sees images, of a model of images and texts its half that does."""

    kinds = MappingProxyType(
        {"image encoder": ImageModel, "image tower": ImageModel, "image-text model": ImageModel}
    )


class AutoModelForTextEncoding(_Auto):
    """Loads the encoder of an encoder-decoder alone."""

    kinds = MappingProxyType({"encoder-decoder": EncoderModel})


class AutoModelForMaskedLM(_Auto):
    """Loads an encoder that predicts masked tokens."""

    kinds = MappingProxyType({"encoder": MaskedLM})


class AutoModelForSequenceClassification(_Auto):
    """Loads a model that classifies texts, or gives them numbers."""

    kinds = MappingProxyType({"decoder": SequenceClassifier, "encoder": SequenceClassifier})


class AutoModelForTokenClassification(_Auto):
    """Loads a model that classifies tokens."""

    kinds = MappingProxyType({"decoder": TokenClassifier, "encoder": TokenClassifier})


class AutoModelForQuestionAnswering(_Auto):
    """Loads an encoder that finds the answer to a question in a text."""

    kinds = MappingProxyType({"encoder": QuestionAnswerer})


class AutoModelForImageClassification(_Auto):
    """Loads a model that classifies images."""

    kinds = MappingProxyType({"image encoder": ImageClassifier, "image-text model": ImageClassifier})


class AutoModelForZeroShotImageClassification(_Auto):
    """Loads a model that compares images with texts."""

    kinds = MappingProxyType({"image-text model": ContrastiveModel})


class AutoModelForCTC(_Auto):
    """Loads a speech encoder that scores frames for characters."""

    kinds = MappingProxyType({"speech encoder": CtcModel})


class AutoModelForAudioClassification(_Auto):
    """Loads a model that classifies sounds."""

    kinds = MappingProxyType(
        {
            "spectrogram encoder": SpectrogramClassifier,
            "speech encoder": SpeechClassifier,
            "speech encoder-decoder": SpeechEncoderClassifier,
        }
    )


class _Projection(_Auto):
    """Stands for half a model of images and texts, with the projection behind it."""

    kinds = MappingProxyType({"image tower": ImageProjection, "text tower": TextProjection})


class _TaughtImageClassification(_Auto):
    """Stands for image classifiers that a teacher taught."""

    kinds = MappingProxyType({"image encoder": TaughtImageClassifier})


AUTO: Mapping[str, type[_Auto]] = MappingProxyType(
    {
        auto.__name__: auto
        for auto in (
            AutoModel,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoModelForSpeechSeq2Seq,
            AutoModelForTextEncoding,
            AutoModelForMaskedLM,
            AutoModelForSequenceClassification,
            AutoModelForTokenClassification,
            AutoModelForQuestionAnswering,
            AutoModelForImageClassification,
            AutoModelForZeroShotImageClassification,
            AutoModelForCTC,
            AutoModelForAudioClassification,
        )
    }
)

# How the families' own class names end, and the class that loads them.
SUFFIXES: Mapping[str, type[_Auto]] = MappingProxyType(
    {
        name.removeprefix("Auto").removeprefix("Model") or "Model": auto
        for name, auto in AUTO.items()
        if auto is not AutoModelForZeroShotImageClassification  # it loads what AutoModel does
    }
    | {"LMHeadModel": AutoModelForCausalLM}
)
# Classes that only some families have, which list them in `CLASSES`.
RARE: Mapping[str, type[_Auto]] = MappingProxyType(
    {"ModelWithProjection": _Projection, "ForImageClassificationWithTeacher": _TaughtImageClassification}
)


def family_class(name: str) -> type[_Auto]:
    """The loader that programs call by a family's own class name, such as `LlamaForCausalLM`: it refuses
    checkpoints of other families. `AttributeError` for a name that no family has."""
    known = class_names()
    if name not in known:
        raise AttributeError(f"Taut has no {name}{nearest(name, known)}; it has: {', '.join(sorted(known))}")
    model_type, auto = known[name]
    return type(name, (auto,), {"model_type": model_type})


def class_names() -> dict[str, tuple[str, type[_Auto]]]:
    """The families' own class names, each with its `model_type` and the class that loads it."""
    found = {}
    for model_type in families():
        module = family(model_type)
        for suffix, auto in SUFFIXES.items():
            name = f"{stem(module)}{suffix}"
            if suffix in CAUSAL or auto in (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq):
                name = module.ARCHITECTURE
            if auto is AutoModelForTextEncoding:  # transformers has such a class for few
                name = f"{stem(module)}{EncoderModel.suffix}"
                if not getattr(module, "ENCODER_ALONE", False):
                    continue
            if auto is AutoModelForAudioClassification and kind(module) in auto.kinds:
                name = f"{stem(module)}{auto.kinds[kind(module)].suffix}"  # transformers has two
            if kind(module) in auto.kinds:
                found[name] = model_type, auto
        for suffix in getattr(module, "CLASSES", ()):
            found[f"{stem(module)}{suffix}"] = model_type, RARE[suffix]
    return found
