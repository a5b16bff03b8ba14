"""The tasks of `pipeline`: what does each, and which checkpoints have a head for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from taut.auto import (
    AnyImageModel,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
)
from taut.config import ModelConfig
from taut.errors import RequestError, nearest
from taut.modeling.base import PreTrainedModel
from taut.pipelines.audio import AudioClassification
from taut.pipelines.base import Pipeline
from taut.pipelines.classification import TextClassification, ZeroShotClassification
from taut.pipelines.ctc import CtcRecognition
from taut.pipelines.features import FeatureExtraction
from taut.pipelines.generation import Summarization, Text2TextGeneration, TextGeneration, Translation
from taut.pipelines.images import ImageClassification, ImageFeatureExtraction
from taut.pipelines.masked import FillMask
from taut.pipelines.questions import QuestionAnswering
from taut.pipelines.similarity import SentenceSimilarity
from taut.pipelines.tokens import TokenClassification
from taut.pipelines.whisper import WhisperRecognition

TEXT, MEDIA = "tokenizer", "processor"


@dataclass(frozen=True)
class Task:
    """What does a task, the class that loads its model, how the architectures end that have its head (none:
    whatever the class loads has it), and what makes the model's inputs."""

    pipeline: type[Pipeline]
    loader: type[PreTrainedModel]
    heads: tuple[str, ...] = ()
    needs: tuple[str, ...] = (TEXT,)


# In the order in which one is chosen for a checkpoint where none is named.
_ALL = (
    Task(TextGeneration, AutoModelForCausalLM, ("ForCausalLM", "LMHeadModel")),
    Task(Text2TextGeneration, AutoModelForSeq2SeqLM),
    Task(Summarization, AutoModelForSeq2SeqLM),
    Task(Translation, AutoModelForSeq2SeqLM),
    Task(TextClassification, AutoModelForSequenceClassification, ("ForSequenceClassification",)),
    Task(ZeroShotClassification, AutoModelForSequenceClassification, ("ForSequenceClassification",)),
    Task(TokenClassification, AutoModelForTokenClassification, ("ForTokenClassification",)),
    Task(QuestionAnswering, AutoModelForQuestionAnswering, ("ForQuestionAnswering",)),
    Task(FillMask, AutoModelForMaskedLM, ("ForMaskedLM",)),
    Task(
        ImageClassification,
        AutoModelForImageClassification,
        ("ForImageClassification", "ForImageClassificationWithTeacher"),
        (MEDIA,),
    ),
    Task(CtcRecognition, AutoModelForCTC, ("ForCTC",), (TEXT, MEDIA)),
    Task(
        AudioClassification,
        AutoModelForAudioClassification,
        ("ForAudioClassification", "ForSequenceClassification"),
        (MEDIA,),
    ),
    Task(WhisperRecognition, AutoModelForSpeechSeq2Seq, ("ForConditionalGeneration",), (TEXT, MEDIA)),
    Task(ImageFeatureExtraction, AnyImageModel, (), (MEDIA,)),
    Task(FeatureExtraction, AutoModel),
    Task(SentenceSimilarity, AutoModel),
)
# A task has several entries where models of several kinds do it.
TASKS: Mapping[str, tuple[Task, ...]] = MappingProxyType(
    {one.pipeline.task: tuple(t for t in _ALL if t.pipeline.task == one.pipeline.task) for one in _ALL}
)
ALIASES: Mapping[str, str] = MappingProxyType(
    {"sentiment-analysis": "text-classification", "ner": "token-classification"}
)
# Hidden states of these are vectors of texts; `AutoModel` loads others too.
TEXT_KINDS = ("decoder", "encoder")
_HEADS = tuple(head for task in _ALL for head in task.heads)


def find(name: str) -> tuple[str, tuple[Task, ...]]:
    """A task and its name, of an alias or a pair of languages too; `RequestError` for one that isn't
    known."""
    named = ALIASES.get(name, name)
    general = "translation" if re.fullmatch(r"translation_.+_to_.+", named) else named
    if general not in TASKS:
        known = (*TASKS, *ALIASES)
        raise RequestError(
            f"task is {name!r}{nearest(name, known)}; known: {', '.join(known)}, translation_xx_to_yy"
        )
    return named, TASKS[general]


def tasks_of(config: ModelConfig) -> list[str]:
    """The tasks that a checkpoint has all for, by what its config says."""
    return [name for name, found in TASKS.items() if any(has_head(config, task) for task in found)]


def has_head(config: ModelConfig, task: Task) -> bool:
    """Whether a checkpoint has a task's head, as far as its config says: where its architecture is none that
    is known here, only its weights do."""
    if config.kind not in task.loader.kinds:
        return False
    if task.loader is AutoModel:
        return config.kind in TEXT_KINDS
    named = config.architecture
    if not task.heads or named.endswith(task.heads):
        return task.pipeline is not ZeroShotClassification or _entails(config)
    return not named.endswith((*_HEADS, "Model"))


def _entails(config: ModelConfig) -> bool:
    return any(name.lower().startswith("entail") for name in config.label2id)


def fitting(config: ModelConfig, name: str, tasks: tuple[Task, ...], source: str) -> Task:
    """Which of a task's entries is for a checkpoint; `RequestError`, with the tasks that it has, for one
    without a head for any."""
    for task in tasks:
        if has_head(config, task):
            return task
    raise RequestError(f"{source} is a {config.architecture}, which {lacks(name, config)}")


def lacks(name: str, config: ModelConfig) -> str:
    """That there is no head for a task, and which there are."""
    found = [task for task in tasks_of(config) if task != name]
    return f"has no head for {name}; its tasks: {', '.join(found) or 'none'}"


def likeliest(config: ModelConfig, source: str) -> str:
    """The task of a checkpoint for which none is named; `RequestError` where there is none."""
    found = tasks_of(config)
    if not found:
        raise RequestError(f"{source} is a {config.architecture}, and there is no task for that")
    return found[0]
