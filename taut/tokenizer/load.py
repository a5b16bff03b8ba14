"""Loads a tokenizer from the files of a checkpoint: tokenizer.json, a SentencePiece model, or a GGUF file."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers

from taut.checkpoint.gguf import read_gguf
from taut.errors import TokenizerError, nearest
from taut.hub import resolve
from taut.tokenizer import byte_level, ctc, marian, translation, whisper
from taut.tokenizer.gguf import tokenizer_from_gguf
from taut.tokenizer.layouts import LAYOUTS
from taut.tokenizer.save import CONFIG, SPECIAL, TEMPLATE, TEMPLATES, TOKENIZER
from taut.tokenizer.sentencepiece import Kind, build_sentencepiece, read_sentencepiece
from taut.tokenizer.tokenizer import Tokenizer
from taut.tokenizer.vocabulary import SPECIAL_TOKENS

MODEL = "config.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")

_SETTINGS = (
    "padding_side", "truncation_side", "model_max_length", "model_input_names", "chat_template",
    "clean_up_tokenization_spaces", "split_special_tokens",
)  # fmt: skip
_LANGUAGES = ("src_lang", "tgt_lang")
# The options that only some classes have.
_OWN_OPTIONS = {
    ctc.CLASSES: ctc.SETTINGS, ("MarianTokenizer",): marian.SETTINGS, translation.CLASSES: _LANGUAGES,
    whisper.CLASSES: whisper.SETTINGS,
}  # fmt: skip
_OPTIONS = (
    *_SETTINGS, "add_bos_token", "add_eos_token", "extra_special_tokens",
    *(option for options in _OWN_OPTIONS.values() for option in options),
)  # fmt: skip
# Without meaning here, but part of many programs.
_IGNORED = ("use_fast", "trust_remote_code", "legacy", "torch_dtype", "dtype")

_BERT = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}  # fmt: skip
_ROBERTA = {
    "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip
_FAIRSEQ = {**_ROBERTA, "mask_token": AddedToken("<mask>", lstrip=True, special=True, normalized=False)}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"}
_WITH_TYPES = ("input_ids", "token_type_ids", "attention_mask")

# What the class named in tokenizer_config.json implies where the files say nothing; a token counts only if
# the vocabulary has it.
_CLASSES: dict[str, dict[str, Any]] = {
    "BartTokenizer": _ROBERTA,
    "BertTokenizer": {**_BERT, "model_input_names": _WITH_TYPES},
    "CodeLlamaTokenizer": _LLAMA,
    "CohereTokenizer": {"padding_side": "left"},
    "DebertaTokenizer": {**_BERT, "model_input_names": _WITH_TYPES},
    "DebertaV2Tokenizer": {**_BERT, "model_input_names": _WITH_TYPES},
    "GemmaTokenizer": {
        "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
        "padding_side": "left",
    },
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "LlamaTokenizer": _LLAMA,
    "MBart50Tokenizer": {key: token for key, token in _FAIRSEQ.items() if key != "bos_token"},
    "MBartTokenizer": _FAIRSEQ,
    "PegasusTokenizer": {
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask_2>",
    },
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    "RobertaTokenizer": _ROBERTA,
    "SiglipTokenizer": {
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "model_max_length": 64,
    },
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "WhisperTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "XLMRobertaTokenizer": _FAIRSEQ,
}  # fmt: skip
# Which class a model of this type has, for old folders that name none.
_BY_MODEL_TYPE = {
    "bart": "BartTokenizer", "codegen": "GPT2Tokenizer", "gpt2": "GPT2Tokenizer", "gpt_neo": "GPT2Tokenizer",
    "mbart": "MBartTokenizer", "mt5": "T5Tokenizer", "opt": "GPT2Tokenizer", "pegasus": "PegasusTokenizer",
    "roberta": "RobertaTokenizer", "t5": "T5Tokenizer", "whisper": "WhisperTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}  # fmt: skip


class AutoTokenizer:
    """Loads the tokenizer of a checkpoint, whatever its files."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        gguf_file: str | None = None,
        **options: Any,
    ) -> Tokenizer:
        """The tokenizer of a folder, a `.gguf` file or a Hub repository.

        `options` override the files: special tokens (`pad_token="<pad>"`), `extra_special_tokens`,
        `padding_side`, `truncation_side`, `model_max_length`, `model_input_names`, `chat_template`,
        `clean_up_tokenization_spaces`, `split_special_tokens`, `add_bos_token`, `add_eos_token`; for
        translation models that write the language beside a text, `src_lang` and `tgt_lang`, for Marian's
        `source_lang` and `target_lang`, for Whisper's `language`, `task` and `predict_timestamps`; and of a
        speech model's characters `word_delimiter_token`, `replace_word_delimiter_char`, `do_lower_case` and
        `target_lang`.
        Raises TokenizerError for missing or corrupt files, CheckpointError for a name that leads nowhere.
        """
        known = (*_OPTIONS, *SPECIAL_TOKENS)
        for option in options:
            if option not in (*known, *_IGNORED) and not option.endswith("_token"):
                raise TokenizerError(
                    f"unknown option {option!r}; known: {', '.join(known)}{nearest(option, known)}"
                )
        path = resolve(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            gguf_file=gguf_file,
            weights=False,
        )
        if path.is_dir() and (path / marian.SOURCE).is_file():
            _refuse_others(options, "MarianTokenizer", path)
            return _marian(path, str(name), options)
        if path.is_dir() and _is_ctc(path):
            _refuse_others(options, ctc.CLASSES[0], path)
            return _ctc(path, str(name), options)
        backend, settings = _from_folder(path) if path.is_dir() else _from_gguf(path)
        special = {
            key: value
            for key, value in options.items()
            if key.endswith("_token") and not key.startswith("add_")
        }
        settings["special_tokens"] = {**settings["special_tokens"], **special}
        settings.update({key: options[key] for key in _OPTIONS if key in options})
        kind = settings.pop("tokenizer_class", None)
        _refuse_others(options, kind, path)
        if kind in translation.CLASSES:
            return translation.TranslationTokenizer(
                backend, tokenizer_class=kind, name_or_path=str(name), **settings
            )
        if kind in whisper.CLASSES:
            return whisper.WhisperTokenizer(backend, name_or_path=str(name), **settings)
        return Tokenizer(backend, name_or_path=str(name), **settings)


def _refuse_others(options: Mapping[str, Any], kind: str | None, path: Path) -> None:
    """Raises TokenizerError for an option that only tokenizers of another kind have."""
    own = {option for kinds, names in _OWN_OPTIONS.items() if kind in kinds for option in names}
    for kinds, names in _OWN_OPTIONS.items():
        for option in names:
            if option in options and option not in own:
                raise TokenizerError(
                    f"{option} is an option of {' and '.join(kinds)}, and {path} has another tokenizer"
                )


def _from_gguf(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    metadata, _ = read_gguf(path)
    return tokenizer_from_gguf(path, metadata)


def _from_folder(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    config = _read_json(folder / CONFIG)
    model_type = str(_read_json(folder / MODEL).get("model_type"))
    name = str(config.get("tokenizer_class") or _BY_MODEL_TYPE.get(model_type, "")).removesuffix("Fast")
    settings: dict[str, Any] = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
    if (folder / TOKENIZER).is_file():
        backend = _read_backend(folder / TOKENIZER)
        implied = _from_backend(backend)
        if name == "LlamaTokenizer" and type(backend.decoder).__name__ == "ByteLevel":
            name = ""  # Llama 3 and others: the class named is the model's, the tokenizer is another
    elif (folder / byte_level.MERGES).is_file() and (folder / byte_level.VOCABULARY).is_file():
        backend = byte_level.build_byte_level(folder, name, config)
        implied = {key: config[key] for key in ("add_bos_token", "add_eos_token") if config.get(key)}
    else:
        backend, implied = _from_sentencepiece(folder, config, name)
    implied = {**_in_vocabulary(backend, _CLASSES.get(name, {})), **implied}
    settings = {
        "tokenizer_class": name,
        **{key: config[key] for key in _LANGUAGES if name in translation.CLASSES and key in config},
        **{key: config[key] for key in whisper.SETTINGS if name in whisper.CLASSES and key in config},
        **{key: implied[key] for key in (*_SETTINGS, "add_bos_token", "add_eos_token") if key in implied},
        **settings,
    }
    special, extra = _special_tokens(folder, config)
    for key, value in {**_from_model_config(folder, backend), **implied}.items():
        if key in SPECIAL_TOKENS:
            special.setdefault(key, value)
    extra = extra or implied.get("extra_special_tokens", [])
    _add_missing(folder, backend, config)
    settings["chat_template"] = _chat_templates(folder, config)
    return backend, {**settings, "special_tokens": special, "extra_special_tokens": extra}


def _is_ctc(folder: Path) -> bool:
    """Whether a folder's tokenizer is a `vocab.json` of characters."""
    if not (folder / ctc.VOCABULARY).is_file():
        return False
    named = _read_json(folder / CONFIG).get("tokenizer_class")
    others = any((folder / file).is_file() for file in (TOKENIZER, "merges.txt", *SENTENCEPIECE))
    return named in ctc.CLASSES or (named is None and not others)


def _ctc(folder: Path, name: str, options: Mapping[str, Any]) -> ctc.CTCTokenizer:
    config = {**_read_json(folder / CONFIG), **options}
    special, extra = _special_tokens(folder, config)
    special = ctc.SPECIAL_TOKENS | special
    settings = {key: config[key] for key in (*_SETTINGS, *ctc.SETTINGS) if config.get(key) is not None}
    vocabulary = _read_json(folder / ctc.VOCABULARY)
    backend = ctc.ctc_backend(
        folder / ctc.VOCABULARY,
        vocabulary,
        config.get("target_lang"),
        str(special.get("unk_token")),
        str(special["word_delimiter_token"]),
    )
    _add_missing(folder, backend, config)
    return ctc.CTCTokenizer(
        backend,
        name_or_path=name,
        special_tokens=special,
        extra_special_tokens=extra,
        vocabularies=vocabulary if config.get("target_lang") is not None else None,
        **settings,
    )


def _marian(folder: Path, name: str, options: Mapping[str, Any]) -> marian.MarianTokenizer:
    config = {**_read_json(folder / CONFIG), **options}
    if config.get("separate_vocabs"):
        raise TokenizerError(f"{folder}: separate_vocabs, a vocabulary for each side, is not supported")
    missing = [file for file in (marian.TARGET, marian.VOCABULARY) if not (folder / file).is_file()]
    if missing:
        raise TokenizerError(f"{folder}: {marian.SOURCE} without {' and '.join(missing)}; download it again")
    special, extra = _special_tokens(folder, config)
    special = marian.SPECIAL_TOKENS | special
    backend = marian.marian_backend(
        folder / marian.VOCABULARY, _read_json(folder / marian.VOCABULARY), special
    )
    _add_missing(folder, backend, config)
    return marian.MarianTokenizer(
        backend,
        folder,
        name_or_path=name,
        special_tokens=special,
        extra_special_tokens=extra,
        **{"model_max_length": 512}
        | {key: config[key] for key in (*_SETTINGS, *marian.SETTINGS) if config.get(key) is not None},
        **{key: options[key] for key in ("add_bos_token", "add_eos_token") if key in options},
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain exceptions
        raise TokenizerError(
            f"{path}: not a tokenizer that can be read, or a damaged one ({error}); download it again"
        ) from error
    suffix = getattr(backend.model, "end_of_word_suffix", None)
    if suffix and type(backend.decoder).__name__ == "ByteLevel":  # CLIP's files leave it in the text
        steps = [decoders.ByteLevel(), decoders.Replace(suffix, " "), decoders.Strip(" ", 0, 1)]
        backend.decoder = decoders.Sequence(steps)
    return backend


def _from_backend(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """What the padding and truncation settings in a tokenizer.json imply."""
    implied: dict[str, Any] = {}
    if (padding := backend.padding) is not None:
        implied |= {"pad_token": padding["pad_token"], "padding_side": padding["direction"]}
    if (truncation := backend.truncation) is not None:
        implied["truncation_side"] = truncation["direction"]
    return implied


def _from_sentencepiece(
    folder: Path, config: Mapping[str, Any], name: str
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    path = next((folder / file for file in SENTENCEPIECE if (folder / file).is_file()), None)
    if path is None:
        held = sorted(entry.name for entry in folder.iterdir())
        shown = ", ".join(held[:12]) + (f" and {len(held) - 12} more" if len(held) > 12 else "")
        raise TokenizerError(
            f"{folder}: no tokenizer; looked for {TOKENIZER}, {', '.join(SENTENCEPIECE)}, "
            f"{byte_level.VOCABULARY} with {byte_level.MERGES}, {marian.SOURCE} or a .gguf file. "
            f"The folder holds: {shown or 'nothing'}. "
            "If the tokenizer is elsewhere, name that folder or repository"
        )
    model, layout = read_sentencepiece(path), LAYOUTS.get(name)
    if layout is not None:
        model = layout.arrange(model, config)
    backend = build_sentencepiece(model)
    ids = {
        "bos_token": model.bos_id,
        "eos_token": model.eos_id,
        "unk_token": model.unk_id,
        "pad_token": model.pad_id,
    }
    implied = {key: token for key, index in ids.items() if (token := model.text(index)) is not None}
    if layout is not None:
        backend.post_processor = layout.post_processor(backend)
        control = [piece.text for piece in model.pieces if piece.kind == Kind.CONTROL]
        named = {str(token) for token in _CLASSES[name].values()}
        implied["extra_special_tokens"] = [text for text in control if text not in named]
        return backend, implied
    if name == "SiglipTokenizer":  # pictures are described in small letters without punctuation
        letters = [normalizers.Lowercase()] if config.get("do_lower_case", True) else []
        plain = [normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), "")]
        spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        backend.normalizer = normalizers.Sequence([*letters, *plain, *spaces, backend.normalizer])
        implied["pad_token"] = "</s>"
    # T5 and SigLIP end a text; Llama and its relatives begin one.
    ends = name == "SiglipTokenizer" or (not name and path.name == "spiece.model")
    implied["add_bos_token"] = bool(config.get("add_bos_token", not ends))
    implied["add_eos_token"] = bool(config.get("add_eos_token", ends))
    return backend, implied


def _in_vocabulary(backend: tokenizers.Tokenizer, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if key not in SPECIAL_TOKENS or backend.token_to_id(str(value)) is not None
    }


def _from_model_config(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Special tokens by the ids that the model's configuration gives."""
    tokens: dict[str, str] = {}
    for file in (MODEL, "generation_config.json"):
        values = _read_json(folder / file)
        for name in ("bos_token", "eos_token", "pad_token"):
            index = values.get(f"{name}_id")
            index = index[0] if isinstance(index, list) and index else index
            if isinstance(index, int) and index >= 0 and (token := backend.id_to_token(index)) is not None:
                tokens.setdefault(name, token)
    return tokens


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Named and extra special tokens; a name with None is one that the files leave out on purpose."""
    values = dict(config)
    if "added_tokens_decoder" not in config:  # otherwise the map repeats what the config has
        values.update(_read_json(folder / SPECIAL))
    named = {
        key: _token(folder, key, value)
        for key, value in values.items()
        if key.endswith("_token") and isinstance(value, (str, Mapping, type(None)))
    }
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    if isinstance(extra, Mapping):
        named.update({key: _token(folder, key, value) for key, value in extra.items()})
        extra = []
    if not isinstance(extra, list):
        raise TokenizerError(
            f"{folder / CONFIG}: extra_special_tokens must be a list, not {type(extra).__name__}"
        )
    return named, [_token(folder, "extra_special_tokens", value) for value in extra]


def _token(folder: Path, key: str, value: Any) -> str | AddedToken | None:
    if value is None or isinstance(value, str):
        return value
    content = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(content, str):
        raise TokenizerError(f"{folder / CONFIG}: {key} must be a string or have a 'content', not {value!r}")
    flags = {
        flag: bool(value[flag]) for flag in ("single_word", "lstrip", "rstrip", "normalized") if flag in value
    }
    return AddedToken(content, special=bool(value.get("special", True)), **flags)


def _add_missing(folder: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Adds the tokens that tokenizer_config.json or added_tokens.json list and the vocabulary lacks."""
    listed: dict[int, Any] = {}
    added = config.get("added_tokens_decoder")
    if isinstance(added, Mapping):
        listed = {
            _index(folder, index): _token(folder, "added_tokens_decoder", token)
            for index, token in added.items()
        }
    elif not (folder / TOKENIZER).is_file():
        file = _read_json(folder / "added_tokens.json")
        listed = {_index(folder, index): AddedToken(token, normalized=False) for token, index in file.items()}
    have = {token.content for token in backend.get_added_tokens_decoder().values()}
    for index, token in sorted(listed.items()):
        if str(token) in have:
            continue
        backend.add_tokens([token])
        if (got := backend.token_to_id(str(token))) != index:
            raise TokenizerError(
                f"{folder}: the added token {str(token)!r} should have id {index} but gets {got}; "
                "the tokenizer files don't belong together"
            )


def _index(folder: Path, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise TokenizerError(f"{folder}: the id {value!r} of an added token is not a number") from None


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template files if there are any, else what tokenizer_config.json has."""
    files = {"default": folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if files:
        templates = {name: _read_text(path) for name, path in files.items()}
        return templates["default"] if list(templates) == ["default"] else templates
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if not isinstance(template, list) or not all(
        isinstance(one, Mapping) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in template
    ):
        raise TokenizerError(
            f"{folder / CONFIG}: chat_template must be a string or a list of {{'name': ..., 'template': ...}}"
        )
    return {one["name"]: one["template"] for one in template}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: can't be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value
