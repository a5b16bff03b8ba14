"""`taut quantize`: a model into 4 or 8 bit, written as a folder that transformers + bitsandbytes read too."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from taut.auto import AutoConfig, class_names
from taut.cli.facts import Facts, human_bytes
from taut.config import ModelConfig
from taut.errors import RequestError
from taut.hub import default_model, resolve
from taut.modeling.base import PreTrainedModel
from taut.models import family
from taut.processor import AutoFeatureExtractor
from taut.processor.files import has_settings
from taut.quant.config import named
from taut.sentences import SentenceTransformer
from taut.tokenizer import AutoTokenizer

# Families of these kinds read no text, but for models with a head of characters; nor do those that classify
# sounds.
_WORDLESS = ("image encoder", "image tower", "spectrogram encoder", "speech encoder")


def run(
    model: str | None,
    out: Path,
    *,
    form: str,
    double_quant: bool,
    dtype: str,
    device: str,
    revision: str | None,
    local_files_only: bool,
) -> None:
    """Loads `model`, with the head that it has, packed as `form` and saves it, and what makes its inputs, to
    the new folder `out`; prints the bytes of each format."""
    config = named(form, double_quant=double_quant)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} exists already; name a new folder, or remove it first")
    started = time.perf_counter()
    name, access = model or default_model(), {"revision": revision, "local_files_only": local_files_only}
    path = resolve(name, **access)
    about, options = AutoConfig.from_pretrained(path), {"dtype": dtype, "quantization_config": config}
    own = about.source.get("quantization_config") or {}
    if own and own.get("quant_method") != "mxfp4":  # that is unpacked on loading
        raise RequestError(
            f"{name} is quantized already, its config.json says; quantizing it again would only lose more: "
            "start from the 16-bit model"
        )
    if (path / "modules.json").is_file() and about.architecture.endswith("Model"):
        whole = SentenceTransformer(name, device=device, **options, **access)
        loaded, parts = whole.model, [whole]
    else:
        inputs = _inputs(path, about)
        loaded = _class(about).from_pretrained(path, device=device, **options)
        parts = [loaded, *inputs]
    facts = Facts.of(time.perf_counter() - started, str(loaded.device))
    for part in parts:
        part.save_pretrained(out)
    for name, count in loaded.memory_by_format().items():
        print(f"{name}: {human_bytes(count)}")
    print(f"saved to {out}")
    sys.stdout.flush()
    print(facts.line(), file=sys.stderr)


def _class(config: ModelConfig) -> type[PreTrainedModel]:
    """What loads a checkpoint with its head: of an architecture that Taut has not, the family's usual one."""
    known = class_names()
    name = config.architecture if config.architecture in known else family(config.model_type).ARCHITECTURE
    return known[name][1]


def _inputs(path: Path, config: ModelConfig) -> list[Any]:
    """What makes the inputs of a checkpoint: a tokenizer, if it reads or writes text, and the processor that
    is there. Raises `TokenizerError` or `ConfigError` for one that is missing or damaged."""
    found: list[Any] = []
    wordless = config.kind in _WORDLESS and not config.architecture.endswith("ForCTC")
    if not wordless and not config.architecture.endswith("ForAudioClassification"):
        found.append(AutoTokenizer.from_pretrained(str(path)))
    if path.is_dir() and has_settings(path):
        found.append(AutoFeatureExtractor.from_pretrained(path))
    return found
