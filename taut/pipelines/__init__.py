"""`pipeline`: a model and all around it for one task, from text, images or sounds to results."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from taut import hub
from taut.auto import AutoConfig
from taut.config import ModelConfig
from taut.errors import RequestError
from taut.modeling.base import PreTrainedModel
from taut.pipelines.base import ItemError as ItemError
from taut.pipelines.base import Pipeline as Pipeline
from taut.pipelines.datasets import KeyDataset as KeyDataset
from taut.pipelines.datasets import KeyPairDataset as KeyPairDataset
from taut.pipelines.similarity import SentenceSimilarity
from taut.pipelines.tasks import MEDIA, TASKS, TEXT, Task, find, fitting, lacks, likeliest
from taut.placement import pick_device
from taut.processor import AutoFeatureExtractor, AutoProcessor
from taut.sentences import SentenceTransformer
from taut.tokenizer import AutoTokenizer

# Models used where none is named.
DEFAULTS = {
    "text-generation": hub.default_model,
    "feature-extraction": hub.default_encoder,
    "sentence-similarity": hub.default_encoder,
}


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: ModelConfig | str | Path | None = None,
    tokenizer: Any = None,
    feature_extractor: Any = None,
    image_processor: Any = None,
    processor: Any = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    use_fast: bool = True,
    trust_remote_code: bool | None = None,
    framework: str | None = None,
    num_workers: int | None = None,
    device: int | str | torch.device | None = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    window: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline for `task`, or for what `model` is made for.

    `model` is a folder, a `.gguf` file, a Hub id, or a loaded model; then `tokenizer`, or for images and
    sounds `image_processor` or `feature_extractor`, are needed too (each loaded, or a name; `processor` has
    them all). Default: those of the model's folder. `model_kwargs` are further options of `from_pretrained`
    (`load_in_8bit` ...); `device`: "auto" (the default: the first GPU, otherwise the CPU), a device, or
    transformers' numbers, of which -1 is the CPU.

    `batch_size`: items computed together; default: as many tokens as the device likes, which is as fast or
    faster. `window`: items that are read ahead and sorted by length. `progress`: a bar on the terminal.
    `options` are the task's own, and hold for every call that doesn't give others. `use_fast`,
    `trust_remote_code`, `framework` and `num_workers` are transformers', and change nothing here.

    Raises `RequestError` for a task that isn't known or that the model has no head for, and what loading
    raises.
    """
    if framework not in (None, "pt"):
        raise RequestError(f"framework is {framework!r}; known: 'pt'")
    access = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
    }
    if model is None:
        if task is None:
            raise RequestError("name a task, a model, or both: pipeline('text-generation', 'my-folder')")
        name, _ = find(task)
        if name not in DEFAULTS:
            raise RequestError(
                f"there is no default model for {name}; name one: pipeline({name!r}, 'my-folder')"
            )
        model = DEFAULTS[name]()
    place = _place(device, device_map)
    if isinstance(model, (str, os.PathLike)):
        source = str(model)
        if config is None or isinstance(config, (str, os.PathLike)):
            config = AutoConfig.from_pretrained(config or model, **access)
        name, found = _chosen(task, config, source)
        choice = torch_dtype if torch_dtype is not None else dtype
        loading = {
            "dtype": "auto" if choice is None else choice,
            "device": "auto" if place is None else place,
        }
        loaded = _load(source, name, found, config, {**access, **loading, **(model_kwargs or {})})
    else:
        source, loaded = None, _given(model)
        config = loaded.config if isinstance(loaded, PreTrainedModel) else loaded.model.config
        name, found = _chosen(task, config, f"the model ({type(model).__name__})", loaded)
        if model_kwargs or torch_dtype is not None or dtype is not None:
            raise RequestError("dtype and model_kwargs are for loading, and the model is loaded already")
        if place is not None:
            (loaded if isinstance(loaded, PreTrainedModel) else loaded.model).to(pick_device(place))
    if isinstance(processor, (str, os.PathLike)):
        processor = AutoProcessor.from_pretrained(processor, **access)
    own = {"task": name, "batch_size": batch_size, "window": window, "progress": progress}
    if TEXT in found.needs and found.pipeline is not SentenceSimilarity:
        spoken = getattr(processor, "tokenizer", None)
        own["tokenizer"] = _part("tokenizer", AutoTokenizer, source, access, tokenizer, spoken)
    if MEDIA in found.needs:
        given = image_processor if image_processor is not None else feature_extractor
        media = getattr(processor, "media", processor)
        own["processor"] = _part("feature_extractor", AutoFeatureExtractor, source, access, given, media)
    return found.pipeline(loaded, **own, **options)


def _place(device: Any, device_map: Any) -> Any:
    """The device that is asked for, None if none is."""
    if device is not None and device_map is not None:
        raise RequestError("device and device_map both say where the model goes; give one of them")
    if isinstance(device, int) and not isinstance(device, bool):
        return f"cuda:{device}" if device >= 0 else "cpu"
    return device_map if device is None else device


def _chosen(task: str | None, config: ModelConfig, source: str, loaded: Any = None) -> tuple[str, Task]:
    """The name of the task and what it is, of a checkpoint or a loaded model that has its head."""
    if loaded is None:
        name, found = find(likeliest(config, source) if task is None else task)
        return name, fitting(config, name, found, source)
    able = {name: one for name, entries in TASKS.items() for one in entries if _does(loaded, one)}
    if not able:
        raise RequestError(f"{source} has no head for any task; known: {', '.join(TASKS)}")
    name, found = find(next(iter(able)) if task is None else task)
    if (does := next((one for one in found if one in able.values()), None)) is None:
        raise RequestError(f"{source} has no head for {name}; its tasks: {', '.join(able)}")
    return name, does


def _does(loaded: Any, task: Task) -> bool:
    """Whether a loaded model has the head of a task."""
    if isinstance(loaded, SentenceTransformer) or task.pipeline is SentenceSimilarity:
        return isinstance(loaded, SentenceTransformer) and task.pipeline is SentenceSimilarity
    if loaded.config.kind not in task.loader.kinds:
        return False
    return isinstance(loaded, task.loader.of(loaded.config))


def _given(model: Any) -> PreTrainedModel | SentenceTransformer:
    """A loaded model, if it is one of Taut's."""
    if isinstance(model, (PreTrainedModel, SentenceTransformer)):
        return model
    bridge = ""
    if type(model).__module__.startswith("transformers."):
        bridge = "; make it one with taut.to_bettertransformer(model)"
    raise RequestError(
        f"model is a {type(model).__name__}; expected a folder, a .gguf file, a Hub id or a model of Taut"
        f"{bridge}"
    )


def _load(source: str, name: str, task: Task, config: ModelConfig, options: dict[str, Any]) -> Any:
    """The model of a task. Raises `RequestError` where the checkpoint turns out to have no weights for its
    head."""
    if task.pipeline is SentenceSimilarity:
        return SentenceTransformer(source, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* has no weights for .* newly initialised")
        if not task.heads and task.needs == (TEXT,) and config.kind == "encoder":
            options = {"add_pooling_layer": False, **options}  # of which nothing is asked
        model = task.loader.from_pretrained(source, **options)
    own = [param for param in model.newly_initialised() if task.heads]
    if own and not ({"num_labels", "id2label", "label2id", "ignore_mismatched_sizes"} & options.keys()):
        raise RequestError(
            f"{source}, a {config.architecture}, has no weights for {own[0]}: it {lacks(name, config)}"
        )
    return model


def _part(name: str, auto: Any, source: str | None, access: Mapping[str, Any], *given: Any) -> Any:
    """A tokenizer or processor: the first that is given, loaded if it is a name; otherwise the model's."""
    found = next((one for one in given if one is not None), source)
    if found is None:
        raise RequestError(f"the model is loaded already, so pass {name}= beside it")
    return auto.from_pretrained(found, **access) if isinstance(found, (str, os.PathLike)) else found
