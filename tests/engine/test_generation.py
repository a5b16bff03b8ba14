"""GenerationConfig: meaning, files, what is refused. StopMatcher: the same cut wherever the pieces end."""

from __future__ import annotations

import json

import pytest
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from taut.engine.generation import DEFAULTS, OPTIONS, UNSUPPORTED, GenerationConfig
from taut.engine.request import SamplingParams
from taut.engine.stops import StopMatcher
from taut.errors import RequestError

FILLED = {
    "bos_token_id": 1,
    "eos_token_id": [2, 7],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "bad_words_ids": [[3, 4], [5]],
    "sequence_bias": [[[9], 2.0], [[8, 9], -1.5]],
    "logit_bias": {4: 1.0},
    "stop_strings": ["END"],
    "transformers_version": "4.51.0",
    "num_beams": 1,
    "max_lenght": 7,
    "a_key_of_the_future": {"x": [1]},
}


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, r"temperature is -1; expected a number of at least 0"),
        ({"temperature": 0, "do_sample": True}, r"temperature is 0; .* do_sample=False"),
        ({"temperature": float("nan")}, r"temperature is nan"),
        ({"temperature": "hot"}, r"temperature is 'hot'"),
        ({"top_p": 0}, r"top_p is 0; expected a number more than 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p is 1.5"),
        ({"top_k": -3}, r"top_k is -3; expected an integer of at least 1, or 0 for all tokens"),
        ({"top_k": 5.0}, r"top_k is 5.0"),
        ({"min_p": 2}, r"min_p is 2"),
        ({"typical_p": 0}, r"typical_p is 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0"),
        ({"no_repeat_ngram_size": -1}, r"no_repeat_ngram_size is -1"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; expected an integer of at least 1"),
        ({"max_new_tokens": True}, r"max_new_tokens is True"),
        ({"max_time": 0}, r"max_time is 0"),
        ({"do_sample": "yes"}, r"do_sample is 'yes'"),
        ({"num_return_sequences": 0}, r"num_return_sequences is 0"),
        ({"bad_words_ids": [[]]}, r"bad_words_ids is \[\[\]\]"),
        ({"bad_words_ids": [["a"]]}, r"bad_words_ids"),
        ({"sequence_bias": {(): 1.0}}, r"sequence_bias is"),
        ({"sequence_bias": [[1, 2.0]]}, r"sequence_bias is"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]"),
        ({"stop_strings": ["a", ""]}, r"stop_strings is \['a', ''\]"),
        ({"stop_strings": [3]}, r"stop_strings is \[3\]"),
        ({"eos_token_id": "</s>"}, r"eos_token_id is '</s>'"),
        ({"seed": 0.5}, r"seed is 0.5"),
        ({"max_new_token": 5}, r"unknown generation option 'max_new_token'; nearest: max_new_tokens"),
        ({"temprature": 0.5}, r"nearest: temperature"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(RequestError, match=message):
        GenerationConfig(**options)


def test_every_default_of_transformers_is_valid_and_harmless():
    theirs = transformers.GenerationConfig._get_default_generation_params()
    mine = GenerationConfig(**{name: value for name, value in theirs.items() if value is not None})
    mine.require_supported()
    for name in set(theirs) & set(DEFAULTS):
        assert theirs[name] == DEFAULTS[name], name


def test_every_option_of_transformers_is_known():
    """A key of transformers' GenerationConfig is Taut's, without effect, or refused by name."""
    for name in transformers.GenerationConfig().to_dict():
        if not name.startswith("_"):
            assert GenerationConfig(**{name: None}).to_dict() is not None
            getattr(GenerationConfig(), name)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_taut_lacks_is_refused_only_where_it_matters(name):
    for neutral in UNSUPPORTED[name]:
        GenerationConfig(**{name: neutral}).require_supported()
    config = GenerationConfig(**{name: 5})
    with pytest.raises(RequestError, match=f"{name} is 5, which Taut does not support; without effect: "):
        config.require_supported()


def test_attributes_can_be_set_and_unknown_ones_are_refused():
    config = GenerationConfig()
    config.max_new_tokens = 3
    config.dola_layers = "low"
    assert (config.max_new_tokens, config.dola_layers, config.penalty_alpha) == (3, "low", None)
    with pytest.raises(RequestError, match="dola_layers is 'low'"):
        config.require_supported()
    with pytest.raises(RequestError, match="nearest: top_k"):
        config.top_kk = 3
    with pytest.raises(AttributeError, match="top_kk"):
        _ = config.top_kk


# -- files ---------------------------------------------------------------------------------------------


def test_a_file_is_read_and_written_back_whole(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(FILLED))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_ids == (2, 7)
    assert config.logit_bias == {4: 1.0}
    config.require_supported()
    path = config.save_pretrained(tmp_path / "new")
    expected = {**FILLED, "logit_bias": {"4": 1.0}}
    assert json.loads(path.read_text()) == expected
    assert GenerationConfig.from_pretrained(path) == config
    assert [file.name for file in path.parent.iterdir()] == ["generation_config.json"]


def test_transformers_reads_what_taut_writes(tmp_path):
    config = GenerationConfig(
        max_new_tokens=9, do_sample=True, top_p=0.5, eos_token_id=(1, 2), sequence_bias={(4, 5): 1.5}
    )
    config.save_pretrained(tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.max_new_tokens, theirs.top_p, theirs.eos_token_id) == (9, 0.5, [1, 2])
    assert theirs.sequence_bias == [[[4, 5], 1.5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not readable as JSON"),
        ("[]", "holds a list; expected a JSON object"),
        ('{"temperature": -1}', "generation_config.json: temperature is -1"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(RequestError, match=message):
        GenerationConfig.from_pretrained(tmp_path)


# -- meaning -------------------------------------------------------------------------------------------


def test_call_then_given_then_model_then_defaults():
    model = GenerationConfig(temperature=0.3, top_k=7, eos_token_id=5, extra={"kept": 1})
    given_ = GenerationConfig(temperature=0.5, top_p=0.9)
    config = given_.over(model, top_p=0.7, top_k=None)
    assert (config.temperature, config.top_p, config.top_k) == (0.5, 0.7, None)
    assert (config.eos_token_id, config.typical_p, config.extra) == (5, 1.0, {"kept": 1})
    assert (given_.top_p, model.top_k) == (0.9, 7)
    assert GenerationConfig().over(GenerationConfig()).top_k == 50


@pytest.mark.parametrize(
    ("options", "width", "length", "new"),
    [
        ({}, 8, 5, 20),
        ({}, 95, 95, 5),
        ({"max_new_tokens": 30}, 8, 5, 30),
        ({"max_new_tokens": 30, "max_length": 9}, 8, 5, 30),
        ({"max_length": 30}, 8, 5, 22),
    ],
)
def test_how_many_new_tokens(options, width, length, new):
    assert GenerationConfig(**options).new_tokens(width, length, context=100) == new


def test_new_tokens_stay_within_the_context():
    with pytest.warns(UserWarning, match="exceed the model's context of 100; generation ends after 10"):
        assert GenerationConfig(max_new_tokens=50).new_tokens(90, 90, 100) == 10
    with pytest.raises(RequestError, match=r"prompt has 100 tokens and the model's context is 100"):
        GenerationConfig(max_new_tokens=1).new_tokens(100, 100, 100)
    with pytest.raises(RequestError, match=r"max_length is 8 and the prompt is already 8 tokens wide"):
        GenerationConfig(max_length=8).new_tokens(8, 8, 100)


def test_sampling_params_hold_everything():
    config = GenerationConfig(
        **{name: value for name, value in FILLED.items() if name in OPTIONS},
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        no_repeat_ngram_size=3,
        suppress_tokens=[6],
        min_length=12,
        max_time=2.0,
    )
    assert config.sampling(30, width=10, seed=77) == SamplingParams(
        max_new_tokens=30,
        greedy=False,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        no_repeat_ngram_size=3,
        logit_bias={4: 1.0, 9: 2.0},
        sequence_bias={(8, 9): -1.5},
        bad_words=((3, 4), (5,)),
        suppress_tokens=(6,),
        seed=77,
        min_new_tokens=2,
        eos_token_ids=(2, 7),
        stop_strings=("END",),
        max_time=2.0,
    )
    assert GenerationConfig().sampling(5, 3, 0) == SamplingParams(max_new_tokens=5)
    assert GenerationConfig(min_length=9, min_new_tokens=4).sampling(5, 3, 0).min_new_tokens == 4
    assert GenerationConfig(eos_token_id=-1).sampling(5, 3, 0).eos_token_ids == ()


# -- stop strings --------------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, found by looking at every prefix."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


LETTERS = st.text(alphabet="abc", max_size=8)


@given(
    pieces=st.lists(LETTERS, max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
)
@example(pieces=["a", "ab"], stops=["aab"])
@example(pieces=["ab", "ab", "abc"], stops=["ababc"])
@example(pieces=["abcd"], stops=["abcd", "bc"])
@example(pieces=["ab", ""], stops=["abc"])
def test_the_shown_text_ends_before_the_first_stop_string(pieces, stops):
    matcher = StopMatcher(stops)
    text, stopped = cut("".join(pieces), stops)
    shown = seen = ""
    for piece in pieces:
        shown, seen = shown + matcher.push(piece), seen + piece
        assert text.startswith(shown)
        if not matcher.stopped:  # nothing is held that can't begin a stop string
            held = seen[len(shown) :]
            assert not held or any(stop.startswith(held) for stop in stops)
    assert matcher.stopped == stopped
    assert shown + matcher.finish() == text


def test_only_what_may_begin_a_stop_string_is_held():
    matcher = StopMatcher(["\n\nUser:", "<end>"])
    given_ = ["Hello", " <", "b>", "\n", "\nUs", "e it", "<en", "d>", "more"]
    shown = [matcher.push(piece) for piece in given_]
    assert shown == ["Hello", " ", "<b>", "", "", "\n\nUse it", "", "", ""]
    assert matcher.stopped and matcher.finish() == ""
