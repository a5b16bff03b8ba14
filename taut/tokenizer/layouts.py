"""How families number the pieces of a SentencePiece model, and what encoding adds around a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import tokenizers
from tokenizers import processors

from taut.errors import TokenizerError
from taut.tokenizer.sentencepiece import Kind, Piece, Pieces

# The languages of mBART and of mBART-50, in the order of their ids (fairseq's dictionaries).
MBART = (
    "ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN", "it_IT",
    "ja_XX", "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO", "ru_RU", "si_LK",
    "tr_TR", "vi_VN", "zh_CN",
)  # fmt: skip
MBART50 = (
    *MBART, "af_ZA", "az_AZ", "bn_IN", "fa_IR", "he_IL", "hr_HR", "id_ID", "ka_GE", "km_KH", "mk_MK",
    "ml_IN", "mn_MN", "mr_IN", "pl_PL", "ps_AF", "pt_XX", "sv_SE", "sw_KE", "ta_IN", "te_IN", "th_TH",
    "tl_XX", "uk_UA", "ur_PK", "xh_ZA", "gl_ES", "sl_SI",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The vocabulary that a family makes of the pieces in the file.

    `arrange` takes the model and the values of tokenizer_config.json. `single` and `pair` are templates of
    the `tokenizers` library; None: they depend on the language of the text.
    """

    arrange: Callable[[Pieces, Mapping[str, Any]], Pieces]
    single: str | None = None
    pair: str | None = None

    def post_processor(self, backend: tokenizers.Tokenizer) -> processors.PostProcessor | None:
        if self.single is None or self.pair is None:
            return None
        tokens = {token for token in self.pair.split() if not token.startswith("$")}
        known = [(token, backend.token_to_id(token)) for token in sorted(tokens)]
        return processors.TemplateProcessing(single=self.single, pair=self.pair, special_tokens=known)


def _control(*texts: str) -> list[Piece]:
    return [Piece(text, kind=Kind.CONTROL) for text in texts]


def _t5(model: Pieces, config: Mapping[str, Any]) -> Pieces:
    """The sentinels come last, the first of them at the very end."""
    count = config.get("extra_ids", 100)
    if not isinstance(count, int) or count < 0:
        raise TokenizerError(f"tokenizer_config.json: extra_ids must be an int of at least 0, not {count!r}")
    sentinels = _control(*(f"<extra_id_{index}>" for index in reversed(range(count))))
    return replace(model, pieces=[*model.pieces, *sentinels])


def _pegasus(model: Pieces, config: Mapping[str, Any]) -> Pieces:
    """Between the end of text and the unknown piece lie `offset` tokens that only pretraining used."""
    offset = config.get("offset", 103)
    if not isinstance(offset, int) or offset < 2:
        raise TokenizerError(f"tokenizer_config.json: offset must be an int of at least 2, not {offset!r}")
    first = _control("<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, offset)))
    unknown = model.unk_id - 2 + len(first)
    return replace(model, pieces=[*first, *model.pieces[2:]], unk_id=unknown, bos_id=-1, eos_id=1, pad_id=0)


def _fairseq(*languages: str) -> Callable[[Pieces, Mapping[str, Any]], Pieces]:
    """fairseq's own four come first in place of SentencePiece's three; languages and the mask come last."""

    def arrange(model: Pieces, config: Mapping[str, Any]) -> Pieces:
        first = [*_control("<s>", "<pad>", "</s>"), Piece("<unk>", kind=Kind.UNKNOWN)]
        # The mask becomes special with flags of its own, when the special tokens are known.
        last = [*_control(*languages), Piece("<mask>", kind=Kind.UNUSED)]
        pieces = [*first, *model.pieces[3:], *last]
        return replace(model, pieces=pieces, unk_id=3, bos_id=-1, eos_id=2, pad_id=1)

    return arrange


# By the class that tokenizer_config.json names.
LAYOUTS = {
    "MBart50Tokenizer": Layout(_fairseq(*MBART50)),
    "MBartTokenizer": Layout(_fairseq(*MBART)),
    "PegasusTokenizer": Layout(_pegasus, "$A </s>", "$A $B </s>"),
    "T5Tokenizer": Layout(_t5, "$A </s>", "$A </s> $B </s>"),
    "XLMRobertaTokenizer": Layout(_fairseq(), "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
}
