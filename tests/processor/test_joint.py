"""Text beside images or sounds, against transformers' processors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import taut
from taut import AutoProcessor, processor
from taut.errors import CheckpointError, ConfigError, MediaError
from tests.processor.media import picture, sound
from tests.tokenizer.conftest import CORPUS
from tests.tokenizer.test_ctc import USUAL


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder as CLIP's are, and transformers' processor of it."""
    folder = tmp_path_factory.mktemp("clip")
    letters = transformers.CLIPTokenizer()
    trained = letters.train_new_from_iterator(CORPUS, 300)
    theirs = transformers.CLIPProcessor(transformers.CLIPImageProcessorPil(size=30, crop_size=20), trained)
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """The same for Wav2Vec2."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(USUAL)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    theirs = transformers.Wav2Vec2Processor(extractor, tokenizer)
    theirs.save_pretrained(folder)
    return theirs, folder


def same(got, want) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_images_and_texts_equal_the_oracles(clip):
    theirs, folder = clip
    ours = AutoProcessor.from_pretrained(folder)
    texts, images = ["the quick dog", "a fox"], [picture(40, 50), picture(50, 40)]
    options = {"padding": True, "return_tensors": "pt"}
    same(ours(text=texts, images=images, **options), theirs(text=texts, images=images, **options))
    same(ours(images, texts, **options), theirs(images, texts, **options))
    same(ours(images=images, return_tensors="pt"), theirs(images=images, return_tensors="pt"))
    same(ours(text=texts, **options), theirs(text=texts, **options))
    ids = theirs.tokenizer(texts[0])["input_ids"]
    assert (
        ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True) == texts[0]
    )
    assert type(ours) is taut.CLIPProcessor and ours.feature_extractor is None


def test_sounds_and_labels_equal_the_oracles(speech):
    theirs, folder = speech
    ours = AutoProcessor.from_pretrained(folder)
    clips, options = (
        [sound(4000), sound(5000)],
        {"sampling_rate": 16000, "padding": True, "return_tensors": "pt"},
    )
    texts = ["HELLO", "A WORLD"]
    same(ours(clips, **options), theirs(clips, **options))
    same(ours(audio=clips, text=texts, **options), theirs(audio=clips, text=texts, **options))
    assert ours(text=texts)["input_ids"] == theirs(text=texts)["input_ids"]
    assert ours.batch_decode([[5, 5, 0, 6, 4, 7]]) == theirs.batch_decode([[5, 5, 0, 6, 4, 7]])


def test_saved_by_one_and_read_by_the_other(clip, speech, tmp_path):
    for theirs, folder in (clip, speech):
        AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
        again = AutoProcessor.from_pretrained(tmp_path)
        oracle = type(theirs).from_pretrained(tmp_path)
        if again.image_processor is not None:
            given = {"images": np.asarray(picture(40, 50)), "text": "the dog"}
        else:
            given = {"audio": sound(3000), "sampling_rate": 16000}
        same(again(**given, return_tensors="pt"), oracle(**given, return_tensors="pt"))


def test_a_folder_without_text_has_its_one_part_and_an_empty_one_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no preprocessor_config.json there"):
        processor.Processor.from_pretrained(tmp_path)
    processor.ViTImageProcessor().save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is processor.ViTImageProcessor
    assert AutoProcessor.from_pretrained(tmp_path, size=9).size == {"height": 9, "width": 9}


def test_what_can_not_be_asked_for_is_named(clip, speech, tmp_path):
    images = AutoProcessor.from_pretrained(clip[1])
    with pytest.raises(MediaError, match="this model takes images, and no audio"):
        images(audio=sound(400))
    with pytest.raises(MediaError, match="nothing to process"):
        images()
    with pytest.raises(TypeError, match=r"call AutoProcessor\.from_pretrained"):
        AutoProcessor()
    (tmp_path / "preprocessor_config.json").write_text('{"processor_class": "Wav2Vec2ProcessorWithLM"}')
    with pytest.raises(ConfigError, match="decoding with a language model is not supported"):
        AutoProcessor.from_pretrained(tmp_path)
