"""`taut quantize`: a model into 4 or 8 bit, written as a folder that transformers + bitsandbytes read too."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from taut.auto import AnyLanguageModel
from taut.cli.facts import Facts, human_bytes
from taut.errors import RequestError
from taut.hub import default_model, resolve
from taut.quant.config import named
from taut.tokenizer import AutoTokenizer


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
    """Loads `model` packed as `form` and saves it, and its tokenizer, to the new folder `out`; prints the
    bytes of each format."""
    config = named(form, double_quant=double_quant)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} exists already; name a new folder, or remove it first")
    started = time.perf_counter()
    path = resolve(model or default_model(), revision=revision, local_files_only=local_files_only)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    loaded = AnyLanguageModel.from_pretrained(
        str(path), dtype=dtype, device_map=device, quantization_config=config
    )
    facts = Facts.of(time.perf_counter() - started, str(loaded.device))
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, count in loaded.memory_by_format().items():
        print(f"{name}: {human_bytes(count)}")
    print(f"saved to {out}")
    sys.stdout.flush()
    print(facts.line(), file=sys.stderr)
