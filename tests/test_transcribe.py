"""`generate` of models that hear: tokens and segments equal transformers', for short and long clips."""

from __future__ import annotations

import copy
import functools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin, _dynamic_time_warping

import taut
from taut.engine.alignment import warp
from taut.engine.drafts import Ledger
from taut.engine.segments import compression_ratio, cut
from taut.engine.timestamps import Timestamps, timed
from taut.errors import RequestError
from tests.families import VOCAB, checkpoint, oracle
from tests.speech_seq2seq import CASES, FRAMES, TIMES, features
from tests.test_families import every_device
from tests.test_speech_seq2seq import AUTO

END, PREV, SILENT = 89, 97, TIMES - 1
CONFIG = {
    "decoder_start_token_id": 90,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
    "lang_to_id": {"<|en|>": 91, "<|de|>": 92, "<|fr|>": 93},
    "task_to_id": {"translate": 94, "transcribe": 95},
    "prev_sot_token_id": PREV,
    "no_timestamps_token_id": SILENT,
    "is_multilingual": True,
    "max_initial_timestamp_index": 12,
    "suppress_tokens": [1, 2, 7, 90, 94, 95, 96, 97, 98],
    "begin_suppress_tokens": [5, END],
    "max_length": 40,
    "no_repeat_ngram_size": 2,  # so that random models say more than one thing
}
LONG, MASK = features(3, frames=200, seed=5), torch.zeros(3, 200, dtype=torch.int64)
for row, length in enumerate((200, 90, 61)):
    MASK[row, :length] = 1
PROMPT = torch.tensor([PREV, 11, 12, 13])
SEGMENTS = {"return_segments": True, "language": "en"}
GOES_ON = SEGMENTS | {"condition_on_prev_tokens": True, "max_new_tokens": 14}

SHORT_CALLS = {
    "language found": {},
    "language": {"language": "en"},
    "languages": {"language": ["en", "<|de|>", "French"], "task": "translate"},
    "task": {"task": "transcribe", "max_new_tokens": 9},
    "timestamps": {"return_timestamps": True},
    "timestamps in segments": {"return_timestamps": True, "return_segments": True, "language": "de"},
    "segments of unruled timestamps": {"return_segments": True, "language": "de"},
    "beams": {"num_beams": 3, "language": "de"},
    "beams with timestamps": {"num_beams": 3, "return_timestamps": True, "length_penalty": 0.5},
    "nothing suppressed": {"suppress_tokens": None, "begin_suppress_tokens": None},
    "prompt": {"prompt_ids": PROMPT, "language": "en"},
    "prompt and segments": {"prompt_ids": PROMPT, "return_timestamps": True, "return_segments": True},
    "copies": {"num_return_sequences": 2, "num_beams": 2},
    "at least": {"min_new_tokens": 12, "language": "en"},
    "decoder_input_ids": {"decoder_input_ids": torch.tensor([[90, 91, 95, SILENT, 4]] * 3)},
    "all fails": {"logprob_threshold": 0.0, "temperature": (0.0,), "return_timestamps": True},
    "some is silence": {
        "logprob_threshold": -1.0,
        "no_speech_threshold": 0.00265,
        "temperature": 0.0,
        "return_timestamps": True,
    },
}
LONG_CALLS = {
    "long": SEGMENTS,
    "long, language found": {},
    "long beams": SEGMENTS | {"num_beams": 2},
    "long, goes on": GOES_ON,
    "long, goes on without a marker": GOES_ON | {"prev_sot_token_id": None},
    "long, prompted once": GOES_ON | {"prompt_ids": PROMPT},
    "long, prompted always": GOES_ON | {"prompt_ids": PROMPT, "prompt_condition_type": "all-segments"},
    "long, silence": SEGMENTS
    | {"logprob_threshold": -0.5, "no_speech_threshold": 0.0032, "temperature": 0.0},
}


@functools.cache
def models(device: str = "cpu", **config):
    """Ours and theirs, with equal configs."""
    path = checkpoint(CASES[0], AUTO)
    ours = taut.WhisperForConditionalGeneration.from_pretrained(path, device=device)
    theirs = oracle(CASES[0], device=device, auto=AUTO)
    return ours, theirs


def configured(device: str = "cpu", **changes):
    ours, theirs = models(device)
    values = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    ours.generation_config = taut.GenerationConfig.from_dict(values)
    theirs.generation_config = transformers.GenerationConfig(**values)
    return ours, theirs


def whole(result) -> list[int]:
    return (result if isinstance(result, torch.Tensor) else result["sequences"]).tolist()


def plain(output) -> tuple[list, list]:
    """The sequences and segments of an output, as numbers."""
    if isinstance(output, torch.Tensor):
        return output.tolist(), []
    segments = [
        [
            (
                round(float(one["start"]), 6),
                round(float(one["end"]), 6),
                one["tokens"].tolist(),
                tuple(one["idxs"]),
                whole(one["result"])[slice(*one["idxs"])],
            )
            for one in clip
        ]
        for clip in output["segments"]
    ]
    return output["sequences"].tolist(), segments


def same(given: torch.Tensor, options: dict, device: str = "cpu"):
    """What both give, which must be equal."""
    changes = {name: options[name] for name in ("prev_sot_token_id",) if name in options}
    options = {name: value for name, value in options.items() if name not in changes}
    options = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    ours, theirs = configured(device, **changes)
    want = plain(theirs.generate(given.clone().to(device), **options))
    got = plain(ours.generate(given.to(device), **options))
    assert got == want
    return got


@every_device
@pytest.mark.parametrize("name", SHORT_CALLS)
def test_short_clips(name, device):
    sequences, segments = same(features(3), SHORT_CALLS[name], device)
    if name == "some is silence":
        assert 0 < sum(set(row) <= {END} for row in sequences) < 3
    elif name != "all fails":
        assert len({tuple(row) for row in sequences}) > 1  # what is said depends on what is heard
    assert bool(segments) == SHORT_CALLS[name].get("return_segments", False)


@every_device
@pytest.mark.parametrize("name", LONG_CALLS)
def test_long_clips_alone_and_together(name, device):
    _, segments = same(LONG[:1], LONG_CALLS[name], device)
    assert not segments or len(segments[0]) > 2
    if "goes on" in name or "prompted" in name:  # theirs pads rows, and what others hear changes that
        ours, _ = configured(device)
        options = {n: v for n, v in LONG_CALLS[name].items() if n != "prev_sot_token_id"}
        got = plain(ours.generate(LONG.to(device), attention_mask=MASK, **options))
        alone = plain(ours.generate(LONG[1:2, :, :90].to(device), **options))
        assert [one[:3] for one in got[1][1]] == [one[:3] for one in alone[1][0]]
    else:
        same(LONG, LONG_CALLS[name] | {"attention_mask": MASK}, device)


def test_forced_tokens_of_older_files():
    forced = [[1, 92], [2, 94], [3, SILENT]]
    ours, theirs = configured(
        lang_to_id=None, task_to_id=None, is_multilingual=None, forced_decoder_ids=forced
    )
    heard = features(2)
    want = theirs.generate(heard).tolist()
    assert ours.generate(heard).tolist() == want
    ours.generation_config.forced_decoder_ids = None  # what a program for fine-tuning does
    assert ours.generate(heard, forced_decoder_ids=forced).tolist() == want
    assert ours.generate(heard).tolist() != want
    ours, theirs = configured(forced_decoder_ids=[[1, None], [2, 94]])
    assert ours.generate(heard).tolist() == theirs.generate(heard).tolist()
    ours.generation_config.language = "German"
    assert ours.generate(heard).tolist() == theirs.generate(heard, language="de").tolist()


def test_fewer_frames_are_filled_up_and_what_the_encoder_gave_takes_their_place():
    ours, theirs = configured()
    heard = features(2, frames=41)
    filled = torch.nn.functional.pad(heard, (0, FRAMES - 41))
    want = theirs.generate(heard, language="en", return_timestamps=True).tolist()
    assert ours.generate(heard, language="en", return_timestamps=True).tolist() == want
    states = ours.get_encoder()(filled)
    options = {"language": "de", "suppress_tokens": list(range(TIMES, VOCAB))}
    got = ours.generate(encoder_outputs=states, **options)
    assert torch.equal(got, ours.generate(inputs=filled, **options))
    want = theirs.detect_language(features(3)).tolist()
    assert (
        ours.detect_language(features(3)).tolist()
        == want
        == ours.detect_language(encoder_outputs=ours.get_encoder()(features(3))).tolist()
    )


def test_outputs_of_the_engine():
    ours, theirs = configured()
    silent = list(range(TIMES, VOCAB))
    for beams in (2, 1):
        options = {
            "return_dict_in_generate": True,
            "output_scores": True,
            "num_beams": beams,
            "language": "de",
        }
        got, want = (made.generate(features(2), suppress_tokens=silent, **options) for made in (ours, theirs))
        assert got.sequences.tolist() == want.sequences.tolist()
        if beams == 1:  # of beams theirs are those of the best alone, whose indices then lead elsewhere
            for mine, other in list(zip(got.scores, want.scores, strict=True))[:4]:  # before any row ends
                real = other.isfinite()
                assert torch.equal(mine.isfinite(), real)
                assert (mine[real] - other[real]).abs().max() < 1e-4
        options["return_timestamps"] = True
        got, want = (made.generate(features(2), **options) for made in (ours, theirs))
        for mine, other in zip(got["segments"], want["segments"], strict=True):
            for one, two in zip(mine, other, strict=True):
                width = len(two["result"]["sequences"])
                assert one["result"]["sequences"][:width].tolist() == two["result"]["sequences"].tolist()
                assert len(one["result"]["scores"]) >= one["idxs"][1] - one["idxs"][0]


@every_device
def test_an_assistant_hears_for_itself_and_changes_no_token(device, monkeypatch):
    monkeypatch.setattr(Ledger, "affords", lambda self, rows, drafted: True)
    ours, _ = configured(device)
    small = next(case for case in CASES if case.name == "whisper-assistant")
    assistant = taut.WhisperForConditionalGeneration.from_pretrained(checkpoint(small, AUTO), device=device)
    heard, rounds = [], []
    assistant.encoder.register_forward_hook(lambda _m, _i, out: heard.append(out.shape[0]))
    options = {"language": "en", "return_timestamps": True}
    want = ours.generate(features(3).to(device), **options).tolist()
    assert ours.generate(features(3).to(device), assistant_model=assistant, **options).tolist() == want
    assert heard[0] == 3 * FRAMES // 2
    # One that is like the model itself guesses all.
    twin, options = copy.deepcopy(ours), {"language": "en", "suppress_tokens": list(range(TIMES, VOCAB))}
    ours.decoder.register_forward_hook(lambda _m, given, _o: rounds.append(given[0].rows))
    ours.generate(features(1).to(device), **options)
    plain_rounds = len(rounds)
    ours.generate(features(1).to(device), assistant_model=twin, **options)
    assert len(rounds) - plain_rounds < plain_rounds / 2
    models.cache_clear()  # the hooks stay with the model


@every_device
@pytest.mark.parametrize("beams", [1, 2])
def test_times_of_tokens(beams, device):
    heads, heard = {"alignment_heads": [[0, 2], [1, 0], [1, 3]]}, features(3).to(device)
    ours, theirs = configured(device, **heads)
    options = {"language": "de", "num_beams": beams, "return_token_timestamps": True}
    options |= {"return_segments": True, "return_timestamps": True}
    for mask in (None, torch.ones(3, FRAMES, dtype=torch.int64, device=device)):
        together = ours.generate(heard, attention_mask=mask, **options)
        for row in range(3):
            own = None if mask is None else mask[:1]
            want = theirs.generate(heard[row : row + 1], attention_mask=own, **options)
            got = ours.generate(heard[row : row + 1], attention_mask=own, **options)
            segments = [made["segments"][at] for made, at in ((got, 0), (together, row), (want, 0))]
            for *mine, other in zip(*segments, strict=True):
                for one in mine:
                    assert (one["token_timestamps"] - other["token_timestamps"].cpu()).abs().max() < 1e-4
            times = torch.cat([one["token_timestamps"] for one in segments[0]])
            assert torch.equal(got["token_timestamps"][0], times) and times.unique().numel() > 2
    options |= {
        "return_timestamps": False,
        "return_segments": False,
        "suppress_tokens": list(range(TIMES, VOCAB)),
    }
    cut_off = (torch.arange(FRAMES) < 33).long()[None].to(device)  # where the rest is silence
    got, want = (made.generate(heard[:1], attention_mask=cut_off, **options) for made in (ours, theirs))
    assert got.keys() == want.keys() == {"sequences", "token_timestamps"}
    assert (got["token_timestamps"] - want["token_timestamps"].cpu()).abs().max() < 1e-4
    assert got["token_timestamps"].max() <= 0.33
    ours.generation_config = taut.GenerationConfig.from_dict(CONFIG)
    with pytest.raises(RequestError, match="needs 'alignment_heads'"):
        ours.generate(heard, **options)


def test_paths_of_least_cost_equal_transformers():
    draw = np.random.default_rng(0)
    for _ in range(60):
        costs = draw.standard_normal(draw.integers(1, (12, 40)))
        costs = costs.round(1) if draw.random() < 0.5 else costs  # some steps cost the same
        rows, columns = _dynamic_time_warping(costs)
        assert warp(costs) == columns[np.diff(rows, prepend=-1).astype(bool)].tolist()


def test_what_fails_is_said_again_at_the_next_temperature():
    ours, _ = configured()
    heard, options = features(4), {"language": "en", "seed": 3, "suppress_tokens": list(range(TIMES, VOCAB))}
    greedy = ours.generate(heard, **options).tolist()
    drawn = ours.generate(heard, temperature=0.9, **options).tolist()
    assert drawn == ours.generate(heard, temperature=0.9, **options).tolist()
    options["temperature"] = (0.0, 0.9)
    ratios = [compression_ratio([t for t in row if t != END] + [END], VOCAB) for row in greedy]
    options["compression_ratio_threshold"] = sorted(ratios)[1]
    rows = [[t for t in row if t != END] for row in ours.generate(heard, **options).tolist()]
    kept = [row == [t for t in first if t != END] for row, first in zip(rows, greedy, strict=True)]
    assert kept == [ratio <= sorted(ratios)[1] for ratio in ratios]
    assert ours.generate(heard, do_sample=True, language="en", seed=3).shape[0] == 4


def test_progress_and_a_streamer():
    ours, _ = configured()
    seen, shown = [], []
    streamer = SimpleNamespace(
        put=lambda t: shown.append(t.flatten().tolist()), end=lambda: shown.append("end")
    )
    said = ours.generate(LONG[:1], language="en", monitor_progress=lambda p: seen.append(p.tolist()))
    assert seen[0] == [[0, 200]] and [row[0][0] for row in seen] == sorted(row[0][0] for row in seen)
    assert len(seen) > 3 and said.shape[0] == 1
    options = {"language": "en", "suppress_tokens": list(range(TIMES, VOCAB))}
    want = ours.generate(features(1), **options).tolist()
    ours.generate(features(1), streamer=streamer, **options)
    assert shown[0] == [90, 91, 95, SILENT] and shown[-1] == "end"
    assert [t for (t,) in shown[1:-1] if t != END] == [t for t in want[0] if t != END]


def test_bad_requests_are_named():
    ours, _ = configured()
    other = taut.WhisperForConditionalGeneration.from_pretrained(checkpoint(CASES[1], AUTO))
    for options, message in (
        ({"language": "klingon"}, "language is 'klingon'; known: english, chinese"),
        ({"language": "english "}, "nearest: english"),
        ({"language": "ja"}, r"language is 'ja', and the model has: <\|en\|>, <\|de\|>, <\|fr\|>"),
        ({"language": ["en"]}, r"language is \['en'\]; expected a text, or one for each of 2 clips"),
        ({"task": "sing"}, "task is 'sing'; known: translate, transcribe"),
        ({"is_multilingual": False, "language": "en"}, "this one knows English alone"),
        ({"prompt_condition_type": "all"}, "prompt_condition_type is 'all'; known: first-segment"),
        ({"prompt_condition_type": "all-segments"}, "needs condition_on_prev_tokens=True"),
        ({"no_speech_threshold": 0.6}, "logprob_threshold is not set"),
        ({"max_new_tokens": 100}, "the decoder begins with 3 tokens .* and 100 new ones .* has 64 positions"),
        (
            {"input_features": features(2, bins=3)},
            r"input_features is \[2, 3, 60\]; expected floats \[clips, 20",
        ),
        ({"input_features": None}, "exactly one of input_features and encoder_outputs"),
        (
            {"input_features": LONG, "return_timestamps": False},
            "has 200 frames, more than the 60 of a window",
        ),
        ({"input_features": LONG}, "need an attention_mask"),
        ({"forced_decoder_ids": [[1, 5], [3, 6]]}, "the places 1, 2, 3"),
        ({"langauge": "en"}, "unknown generation option 'langauge'; nearest: language"),
        ({"streamer": SimpleNamespace()}, "a streamer shows one row, but the call makes 2"),
        (
            {"assistant_model": other},
            "assistant_model hears 33 mel bins at 30 positions, and the model 20 at 30",
        ),
        ({"assistant_model": ours, "num_beams": 2}, "assistant_model guesses for single rows"),
        ({"inputs_embeds": features(1)}, "generation starts from token ids"),
        ({"guidance_scale": 2.0}, "guidance_scale is 2.0, which is for decoders"),
    ):
        with pytest.raises(RequestError, match=message):
            ours.generate(**{"input_features": features(2), **options})
    for call in (ours.stream, ours.generate_batch):
        with pytest.raises(RequestError, match="Next step: call generate with"):
            call(features(2))
    ours, _ = configured(no_timestamps_token_id=None, lang_to_id=None, task_to_id=None)
    for options, message in (
        ({"return_timestamps": True}, "no 'no_timestamps_token_id'"),
        ({"language": "en"}, "no 'lang_to_id', which language= needs"),
        ({"task": "translate"}, "no 'task_to_id', which task= needs"),
    ):
        with pytest.raises(RequestError, match=message):
            ours.generate(features(2), **options)


# -- the rules, apart from any model -------------------------------------------------------------------


def rows_of_tokens(count: int) -> list[list[int]]:
    """Random rows with many timestamps, most of them in order."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        row, time = [], TIMES
        for _ in range(draw.randrange(9)):
            if draw.random() < 0.5:
                time = min(time + draw.randrange(4), VOCAB - 1) if draw.random() < 0.9 else TIMES
                row.append(time)
            else:
                row.append(draw.randrange(END))
        rows.append(row)
    return rows


@pytest.mark.parametrize("initial", [None, 6])
def test_rules_of_timestamps_equal_transformers(initial):
    rows = rows_of_tokens(300)
    config = transformers.GenerationConfig(
        no_timestamps_token_id=SILENT, eos_token_id=END, max_initial_timestamp_index=initial
    )
    theirs = WhisperTimeStampLogitsProcessor(config, begin_index=2)
    scores = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    want = torch.cat(
        [theirs(torch.tensor([[7, TIMES, *row]]), scores[at : at + 1]) for at, row in enumerate(rows)]
    )
    rule = SimpleNamespace(timestamps=Timestamps(TIMES, SILENT, END, initial))
    got = timed(scores, [SimpleNamespace(params=rule, output=row) for row in rows])
    assert torch.equal(got, want)


def test_segments_equal_transformers():
    lengths = set()
    for row in rows_of_tokens(400):
        if not row:
            continue
        segments, done = WhisperGenerationMixin._retrieve_segment(
            seek_sequence=torch.tensor(row),
            seek_outputs=[None],
            time_offset=torch.tensor([0.0], dtype=torch.float64),
            timestamp_begin=TIMES,
            seek_num_frames=torch.tensor([57]),
            time_precision=0.02,
            time_precision_features=0.01,
            input_stride=2,
            prev_idx=0,
            idx=0,
            return_token_timestamps=False,
            decoder_input_ids=torch.zeros(1, 0),
        )
        pieces, ours = cut(row, TIMES, 57)
        assert ours == (int(done) or 57)
        want = [(*s["idxs"], float(s["start"]), float(s["end"])) for s in segments]
        assert [(p.first, p.last) for p in pieces] == [w[:2] for w in want]
        for piece, (*_, start, end) in zip(pieces, want, strict=True):
            assert abs(piece.start * 0.02 - start) < 1e-9 and abs(piece.end * 0.02 - end) < 1e-9
        lengths.add(len(pieces))
    assert len(lengths) > 2
