"""`SentenceTransformer`: an encoder and what sentence-transformers' files say makes vectors of its tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut import hub
from taut.auto import AutoModel
from taut.batch import Batch
from taut.checkpoint.safetensors import open_safetensors
from taut.errors import ConfigError, RequestError, nearest
from taut.kernels import onednn
from taut.layers.encoder import pool
from taut.tokenizer import AutoTokenizer

# What sentence-transformers calls ways to pool, and in files before release 5.
POOLING: Mapping[str, str] = {"cls": "first", "mean": "mean", "lasttoken": "last"}
OLDER = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
OLDER |= {f"pooling_mode_{mode}_tokens": mode for mode in ("mean", "max", "mean_sqrt_len", "weightedmean")}
ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU}

# Files beside config.json: of texts, and of prompts and similarity.
_SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")

# Tokens of a batch: on a CPU as many as caches hold well.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


class SentenceTransformer:
    """Vectors of texts, as sentence-transformers makes them of the same folder or Hub id.

    `modules.json` says what follows the encoder: pooling ("cls", "mean" or "lasttoken"), dense layers,
    normalisation; without it, mean pooling. `options` are those of `AutoModel.from_pretrained` (`dtype`,
    `load_in_8bit` ...); `device` defaults to the first GPU, otherwise the CPU. Raises `ConfigError` for
    modules and pooling that Taut doesn't have, and what loading a model raises.
    """

    def __init__(self, name: str | Path, *, device: str | torch.device | None = "auto", **options: Any):
        self.model = AutoModel.from_pretrained(name, device=device, **options)
        access = ("revision", "cache_dir", "token", "local_files_only")
        files = self._files = _Files(
            str(name), {key: value for key, value in options.items() if key in access}
        )
        self.tokenizer = AutoTokenizer.from_pretrained(name, **files.access)
        text = files.optional(_SETTINGS[0]) or {}
        limits = (text.get("max_seq_length"), self.tokenizer.model_max_length, self.model.config.context)
        self.max_seq_length = int(min(limit for limit in limits if limit))
        self.lower = bool(text.get("do_lower_case"))
        own = files.optional(_SETTINGS[1]) or {}
        self.prompts: dict[str, str] = own.get("prompts") or {}
        self.default_prompt_name: str | None = own.get("default_prompt_name")
        self.similarity_fn_name: str = own.get("similarity_fn_name") or "cosine"
        self.pooling, self.after = _modules(files)
        self.after = [module.to(self.model.device, self.model.dtype) for module in self.after]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.inference_mode()
    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        *,
        batch_tokens: int | None = None,
        normalize_embeddings: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Vectors `[texts, dim]` in the order of the texts, float32; of a single text `[dim]`.

        A numpy array, with `convert_to_tensor` a tensor on the model's device, without `convert_to_numpy` a
        list of tensors. Texts are cut at `max_seq_length` tokens, and `prompt`, or the one of the model's
        `prompts` that `prompt_name` names, comes before each. Rows are packed in the order of their lengths,
        so that a batch has at most `batch_tokens` tokens and, if given, `batch_size` rows. On a CPU, several
        batches hold dense weights a second time while they run, in the order that products are fastest in.
        """
        single = isinstance(sentences, str)
        texts = [sentences] if single else list(sentences)
        if (odd := next((text for text in texts if not isinstance(text, str)), None)) is not None:
            raise RequestError(f"a sentence is {odd!r}; expected text")
        ids = self.token_ids(texts, prompt_name, prompt)
        most = batch_tokens or BATCH_TOKENS.get(self.device.type, 16384)
        order, found = sorted(range(len(ids)), key=lambda i: -len(ids[i])), []
        batches = list(_batches(ids, order, most, batch_size))
        with onednn.reordering() if len(batches) > 1 else nullcontext():
            for rows in _progress(batches, show_progress_bar):
                found.append(self.vectors([ids[row] for row in rows]))
        place = torch.tensor(order, dtype=torch.int64, device=self.device).argsort()
        vectors = torch.cat(found)[place] if found else torch.zeros(0, self.dimension, device=self.device)
        vectors = F.normalize(vectors, dim=-1) if normalize_embeddings else vectors
        vectors = vectors[0] if single else vectors
        if convert_to_tensor:
            return vectors
        if convert_to_numpy:
            return vectors.cpu().numpy()
        return vectors if single else list(vectors)

    def similarity(self, first: Any, second: Any) -> Tensor:
        """Scores `[n, m]` of vectors `[n, dim]` and `[m, dim]` (or `[dim]`): "cosine" or "dot", as
        `similarity_fn_name` says."""
        a, b = (torch.atleast_2d(torch.as_tensor(vectors)).float() for vectors in (first, second))
        if self.similarity_fn_name not in ("cosine", "dot"):
            raise RequestError(f"similarity_fn_name is {self.similarity_fn_name!r}; known: cosine, dot")
        if self.similarity_fn_name == "cosine":
            a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        return a @ b.to(a.device).T

    @property
    def dimension(self) -> int:
        """How long a vector is."""
        sizes = [module.linear.out_features for module in self.after if isinstance(module, _Dense)]
        return sizes[-1] if sizes else self.model.config.dim

    def get_sentence_embedding_dimension(self) -> int:
        """`dimension`, by sentence-transformers' name."""
        return self.dimension

    def token_ids(
        self, texts: Sequence[str], prompt_name: str | None = None, prompt: str | None = None
    ) -> list[list[int]]:
        """The tokens of each text, behind its prompt and cut at `max_seq_length`."""
        prefix = self._prompt(prompt_name, prompt)
        texts = [f"{prefix}{text}" for text in texts]
        texts = [text.lower() for text in texts] if self.lower else texts
        if not texts:
            return []
        return self.tokenizer(texts, truncation=True, max_length=self.max_seq_length)["input_ids"]

    def vectors(self, rows: Sequence[list[int]]) -> Tensor:
        """The vectors `[rows, dim]`, float32, of rows of tokens, in one batch."""
        batch = Batch.of(rows, self.device)
        vectors = pool(self.model.packed(self.model.model, batch), batch, self.pooling)
        for module in self.after:
            vectors = module(vectors)
        return vectors.float()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its tokenizer and what follows them to a folder, as sentence-transformers reads
        them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        for name, path in self._files.modules().items():
            target = Path(folder) / name
            if target.resolve() != path.resolve():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        if prompt is not None:
            return prompt
        name = name or self.default_prompt_name
        if name is not None and name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise RequestError(f"prompt_name is {name!r}; known: {known}{nearest(name, self.prompts)}")
        return self.prompts.get(name, "")


@dataclass(frozen=True)
class _Files:
    """The files of a folder or Hub repository."""

    name: str
    access: Mapping[str, Any]

    def optional(self, file: str) -> Any:
        """What a JSON file beside `config.json` says; None where there is no such file."""
        path = hub.resolve(self.name, **self.access) / file
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def path(self, file: str) -> Path:
        """A file in a folder of its own."""
        return hub.beside(self.name, file, **self.access)

    def modules(self) -> dict[str, Path]:
        """The files, by their names here, that say how vectors are made of a model's tokens."""
        root, own = hub.resolve(self.name, **self.access), ("modules.json", *_SETTINGS)
        found = {file: root / file for file in own if (root / file).is_file()}
        for entry in self.optional("modules.json") or ():
            kind, folder = entry["type"].rpartition(".")[2], entry["path"]
            if kind in ("Pooling", "Dense"):
                found[f"{folder}/config.json"] = self.path(f"{folder}/config.json")
            if kind == "Dense":
                found[f"{folder}/model.safetensors"] = self.path(f"{folder}/model.safetensors")
        return found

    def config(self, folder: str) -> Any:
        """What the `config.json` of a module's folder says."""
        return json.loads(self.path(f"{folder}/config.json").read_text("utf-8"))


class _Dense(nn.Module):
    """`act(linear(x))`"""

    def __init__(self, linear: nn.Linear, act: nn.Module):
        super().__init__()
        self.linear, self.act = linear, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


class _Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def _modules(files: _Files) -> tuple[str, list[nn.Module]]:
    """How tokens are pooled, and what follows."""
    pooling, after = "mean", []
    for entry in files.optional("modules.json") or ():
        kind, folder = entry["type"].rpartition(".")[2], entry["path"]
        if kind == "Pooling":
            pooling = _pooling(files.config(folder), f"{files.name}/{folder}")
        elif kind == "Dense":
            after.append(_dense(files, folder))
        elif kind == "Normalize":
            after.append(_Normalize())
        elif kind != "Transformer":
            raise ConfigError(
                f"{files.name}/modules.json: type {entry['type']!r} is not supported; known: Transformer, "
                "Pooling, Dense, Normalize"
            )
    return pooling, after


def _pooling(config: Mapping[str, Any], where: str) -> str:
    mode = config.get("pooling_mode") or [mode for key, mode in OLDER.items() if config.get(key)]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in POOLING:
        raise ConfigError(
            f"{where}/config.json: pooling is {' and '.join(modes) or 'nothing'}; known: one of "
            f"{', '.join(POOLING)}"
        )
    if not config.get("include_prompt", True):
        raise ConfigError(f"{where}/config.json: 'include_prompt' is False, which is not supported")
    return POOLING[modes[0]]


def _dense(files: _Files, folder: str) -> nn.Module:
    config = files.config(folder)
    act = config["activation_function"].rpartition(".")[2]
    if act not in ACTIVATIONS:
        raise ConfigError(
            f"{files.name}/{folder}/config.json: 'activation_function' is {act!r}; known: "
            f"{', '.join(ACTIVATIONS)}"
        )
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    tensors = open_safetensors(files.path(f"{folder}/model.safetensors").parent)
    linear.load_state_dict({name.removeprefix("linear."): t.read() for name, t in tensors.items()})
    return _Dense(linear, ACTIVATIONS[act]())


def _batches(ids: list[list[int]], order: list[int], most: int, rows: int | None) -> Iterator[list[int]]:
    """Runs of `order`, each with at most so many tokens and rows, and at least one row."""
    batch, tokens = [], 0
    for row in order:
        full = tokens + len(ids[row]) > most or (rows is not None and len(batch) >= rows)
        if batch and full:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += len(ids[row])
    if batch:
        yield batch


def _progress(batches: list[list[int]], wanted: bool | None) -> Iterator[list[int]]:
    """The batches, with a bar on standard error if it is wanted."""
    if not wanted:
        yield from batches
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(batches, "Encoding", console=Console(stderr=True), transient=True)
