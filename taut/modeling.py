"""`CausalLM`: the Hugging Face-shaped door around a packed decoder."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut import weights
from taut.batch import Batch, pack
from taut.checkpoint import open_checkpoint, write_safetensors
from taut.config import ModelConfig
from taut.engine.generate import generate, stream
from taut.engine.generation import GenerationConfig
from taut.engine.stream import Stream
from taut.errors import ConfigError, RequestError, nearest
from taut.hub import resolve
from taut.kernels.attention import explain
from taut.layers.attention import Attention
from taut.layers.block import Decoder
from taut.layers.linear import Linear
from taut.layers.norm import HeadNorm, Norm
from taut.models import family, read_config, rules
from taut.placement import pick_device, pick_dtype
from taut.plan import Plan, make_plan
from taut.quant.base import Packed, Stack
from taut.quant.choose import asked, choose
from taut.quant.config import BitsAndBytesConfig

# What a file may hold beside its weights: angles that older exports stored, and a head that is tied anyway.
_IGNORED = ("*.rotary_emb.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached", "*.masked_bias")


# Names of attention in transformers -> the candidates of `kernels.attention` that they stand for.
IMPLEMENTATIONS: Mapping[str, tuple[str, ...] | None] = MappingProxyType(
    {"auto": None, "flash_attention_2": ("paged", "flash"), "sdpa": ("sdpa",), "eager": ("eager",)}
)


class ModelOutput(dict):
    """A result whose fields are keys, attributes and, in order, items; fields that are None are absent."""

    def __init__(self, **fields: Any):
        super().__init__({name: value for name, value in fields.items() if value is not None})
        self._names = tuple(fields)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if not name.startswith("_") and name in self._names:
            return None
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has: {', '.join(self._names)}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class CausalLM(nn.Module):
    """A decoder with a language-model head.

    `model.decoder(batch)` is the packed call that everything goes through; `model(input_ids, ...)` and
    `model.generate(...)` are the padded ones. Weights are empty until `from_pretrained` or `init_weights`.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig.from_dict(_token_ids(config))
        self.model = Decoder(config, dtype=dtype)
        self.lm_head = None
        if not config.tied:
            width = config.embed_dim or config.dim
            self.lm_head = Linear(width, config.vocab_size, bias=config.head_bias, dtype=dtype)
        self.quantization_config: BitsAndBytesConfig | None = None
        self.eval()

    # ------------------------------------------------------------------------------------ what it is

    @property
    def decoder(self) -> Decoder:
        """`decoder(batch) -> hidden [tokens, dim]`."""
        return self.model

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_memory_footprint(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    def memory_by_format(self) -> dict[str, int]:
        """Bytes of parameters and buffers by what they are kept in: "bfloat16", "nf4", "int8" ..."""
        found: dict[str, int] = {}
        packed = [m for m in self.modules() if isinstance(m, Packed) and not isinstance(m, Stack)]
        for module in packed:
            found[module.kind] = found.get(module.kind, 0) + module.nbytes
        inside = {id(t) for module in packed for t in module.buffers()}
        for tensor in (*self.parameters(), *self.buffers()):
            if id(tensor) not in inside:
                name = str(tensor.dtype).removeprefix("torch.")
                found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()
        return found

    @property
    def is_loaded_in_4bit(self) -> bool:
        return self.quantization_config is not None and self.quantization_config.load_in_4bit

    @property
    def is_loaded_in_8bit(self) -> bool:
        return self.quantization_config is not None and self.quantization_config.load_in_8bit

    @property
    def is_quantized(self) -> bool:
        """Whether any linear layer is held packed."""
        return any(isinstance(module, Packed) for module in self.modules())

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    # ------------------------------------------------------------------------------------ computing

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits `[n, vocab]` (float64 for a float64 model) of hidden states `[n, dim]`."""
        scores = self.model.embed_tokens.project(hidden) if self.lm_head is None else self.lm_head(hidden)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.config.logit_scale is not None:
            scores = scores * self.config.logit_scale
        if self.config.logit_softcap is not None:
            scores = self.config.logit_softcap * torch.tanh(scores / self.config.logit_softcap)
        return scores

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Logits, and the loss where `labels` are given, in the padded shape.

        `input_ids` `[rows, width]` int64 (or `inputs_embeds` `[rows, width, dim]`), `attention_mask`
        `[rows, width]` with padding anywhere, `position_ids` `[rows, width]` that may restart to mark
        packed sequences, `labels` `[rows, width]` with -100 where there is nothing to predict. Each row is
        computed as if it were alone. Gives `loss` (mean over predicted tokens, or their sum divided by
        `num_items_in_batch`), `logits` `[rows, width, vocab]` float32, zeros at padding (the last
        `logits_to_keep` positions alone, if positive) and `hidden_states` if asked.

        Raises `RequestError` for shapes that don't match, ids out of range and options of later releases.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give exactly one of input_ids and inputs_embeds")
        if past_key_values is not None:
            raise RequestError("past_key_values is not supported by forward; model.generate keeps the cache")
        if output_attentions:
            raise RequestError("output_attentions is not supported: attention weights are never materialised")
        if input_ids is not None:
            self._check_ids(input_ids)
        batch, padding = pack(input_ids, attention_mask, position_ids, inputs_embeds)
        with self._collect(output_hidden_states) as states:
            hidden = self.decoder(batch)
        kept = hidden
        if logits_to_keep:
            keep = padding.index % padding.width >= padding.width - logits_to_keep
            kept = hidden[keep]
            padding = replace(
                padding,
                index=padding.index[keep] // padding.width * logits_to_keep
                + padding.index[keep] % padding.width
                - (padding.width - logits_to_keep),
                width=logits_to_keep,
            )
        logits = self.logits(kept)
        loss = None
        if labels is not None:
            if labels.shape != (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]:
                raise RequestError(f"labels has shape {list(labels.shape)}; expected the shape of the inputs")
            if logits_to_keep:
                raise RequestError("labels need every position's logits; leave logits_to_keep at 0")
            loss = _loss(logits, padding.pack(labels.to(logits.device)), batch, num_items_in_batch)
        output = ModelOutput(
            loss=loss,
            logits=padding.unpack(logits),
            past_key_values=None,
            hidden_states=tuple(padding.unpack(state) for state in states) or None,
        )
        return output if return_dict else output.to_tuple()

    def prepare_inference(self) -> None:
        """Bring weights into the layout in which inference reads them fastest, one at a time; they go back
        by themselves when a gradient, a save or a move needs them dense. The engine calls this; a model in
        training mode is left alone."""
        if self.training:
            return
        for module in self.modules():
            if isinstance(module, Linear):
                module.block()
        if self.lm_head is None:
            self.model.embed_tokens.block()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts; see `taut.engine.generate.generate`, which documents every option."""
        return generate(self, *args, **kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Stream:
        """Continue one prompt piece by piece; see `taut.engine.generate.stream`."""
        return stream(self, *args, **kwargs)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.is_floating_point():
            raise RequestError(f"input_ids is {ids.dtype} {list(ids.shape)}; expected int64 [rows, width]")
        # Looking at values on a GPU would wait for it; there the embedding kernel reports them itself.
        if ids.device.type == "cpu" and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                row, column = (ids == bad).nonzero()[0].tolist()
                raise RequestError(
                    f"input_ids[{row}, {column}] is {bad}; the vocabulary has ids 0 to "
                    f"{self.config.vocab_size - 1}: is the tokenizer the one of this model?"
                )

    @contextmanager
    def _collect(self, wanted: bool) -> Iterator[list[Tensor]]:
        """What enters each block, and what leaves the decoder, as they are computed."""
        states: list[Tensor] = []
        hooks = []
        if wanted:
            hooks = [
                layer.register_forward_pre_hook(lambda _m, given: states.append(given[0]))
                for layer in self.model.layers
            ]
            hooks.append(self.model.register_forward_hook(lambda _m, _i, out: states.append(out)))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def locate_nonfinite(self, batch: Batch) -> str:
        """The first module whose weights or output are not finite for this batch, in order of computation;
        runs the batch once more."""
        found: list[str] = []

        def hook(name: str) -> Any:
            def look(module: nn.Module, _inputs: Any, output: Any) -> None:
                if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                    bad = [
                        n for n, p in module.named_parameters(recurse=False) if not torch.isfinite(p).all()
                    ]
                    found.append(f"{name} ({bad[0]} itself is not finite)" if bad else name)

            return look

        leaves = [(n, m) for n, m in self.named_modules() if not any(m.children())]
        hooks = [module.register_forward_hook(hook(name)) for name, module in leaves]
        try:
            self.logits(self.decoder(batch))
        finally:
            for handle in hooks:
                handle.remove()
        return found[0] if found else "the head's logits"

    # ------------------------------------------------------------------------------------ loading, saving

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        use_flash_attention_2: bool = False,
        strict: bool = False,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        quantization_config: Any = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        gguf_file: str | None = None,
        progress: bool | None = None,
        model_type: str | None = None,
        **unknown: Any,
    ) -> CausalLM:
        """Load a folder, a `.gguf` file or a Hub id.

        `dtype` (`torch_dtype` is its older name): "auto" takes the checkpoint's own; for 4- and 8-bit GGUF
        files bfloat16 where the device computes in it, and on such a CPU their linear layers then stay
        packed (any other choice dequantizes them). `device_map` (or `device`):
        "auto" (the first GPU, otherwise the CPU), a device, or `{"": device}`; default CPU.
        `attn_implementation`, `strict`: see `set_attn_implementation`; `use_flash_attention_2=True` is the
        older way to ask for "flash_attention_2". `load_in_4bit`, `load_in_8bit` and `quantization_config` (a
        `BitsAndBytesConfig`, transformers' own or a dict) pack the linear layers while loading; a checkpoint
        that is packed already needs none of them. `progress`: a bar on the terminal; default: only if stderr
        is one. `model_type`: the family that it has to be.

        Raises `CheckpointError` (files), `ConfigError` (config.json) or `WeightsError` (tensors that don't
        fit the config); nothing half-loaded remains.
        """
        _reject(unknown)
        wanted = asked(load_in_4bit, load_in_8bit, quantization_config)
        if use_flash_attention_2:
            if attn_implementation not in (None, "flash_attention_2"):
                raise RequestError(
                    f"use_flash_attention_2=True and attn_implementation={attn_implementation!r} ask for two "
                    "things; leave one out"
                )
            attn_implementation = "flash_attention_2"
        path = resolve(
            str(name),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            gguf_file=gguf_file,
        )
        checkpoint = open_checkpoint(path)
        config = read_config(checkpoint.config, f"{path}: config")
        if model_type not in (None, config.model_type):
            raise ConfigError(
                f"{path} is a {config.model_type!r} and not a {model_type!r}; "
                "load it with AutoModelForCausalLM, which takes every family"
            )
        target = pick_device(device_map if device_map is not None else device)
        choice = torch_dtype if torch_dtype is not None else dtype
        kind = pick_dtype(choice, config, checkpoint, target)
        with torch.device("meta"):
            model = cls(config, dtype=kind)
        mapping = rules(config)
        names = [piece.disk for piece in weights.layout(model, mapping)]
        checkpoint = replace(checkpoint, tensors=weights.with_prefix(checkpoint.tensors, names))
        keep = choice in ("auto", None) and kind is torch.bfloat16 and target.type == "cpu"
        packing = choose(
            checkpoint,
            wanted,
            weights.linears(model, mapping),
            kind,
            keep_blocks=keep and bool(checkpoint.metadata),
        )
        ignored = (*_IGNORED, *getattr(family(config.model_type), "IGNORED", ()))
        ignored = (*ignored, "lm_head.weight") if config.tied else ignored
        with _progress(progress, str(name)) as report:
            weights.load(
                model,
                packing.tensors,
                mapping,
                dtype=kind,
                device=target,
                ignored=ignored,
                packers=packing.packers,
                progress=report,
            )
        model.quantization_config = packing.config
        model.generation_config = GenerationConfig.from_dict({**_token_ids(config), **checkpoint.generation})
        model.set_attn_implementation(attn_implementation or "auto", strict=strict)
        return model.eval()

    @classmethod
    def from_config(
        cls, config: ModelConfig | dict[str, Any], *, dtype: torch.dtype | None = None, device: Any = "cpu"
    ) -> CausalLM:
        """A model with random weights, from a `ModelConfig` or a `config.json` as a dict."""
        config = config if isinstance(config, ModelConfig) else read_config(config)
        with torch.device("meta"):
            model = cls(config, dtype=dtype or config.dtype or torch.float32)
        return model.to_empty(device=device).init_weights()

    def init_weights(self, std: float = 0.02) -> CausalLM:
        """Fill in place: matrices from N(0, std), norms with the identity, biases with zero."""
        for name, param in self.named_parameters():
            module = self.get_submodule(name.rpartition(".")[0])
            if name.endswith("bias"):
                nn.init.zeros_(param)
            elif isinstance(module, Norm | HeadNorm):
                nn.init.constant_(param, 1.0 - module.config.offset)
            else:
                nn.init.normal_(param, std=std)
        return self

    def set_attn_implementation(self, name: str, *, strict: bool = False) -> None:
        """Restrict attention to one implementation; "auto" allows all, in order of preference.

        "flash_attention_2" is Taut's packed flash kernel and its decode kernel, for float16 and bfloat16 on
        a GPU; "sdpa" PyTorch's; "eager" the reference. `strict` with "auto": what the device runs best, or
        an error; no fallback. Raises `RequestError` where this model on its device can't have it.
        """
        if name not in IMPLEMENTATIONS:
            raise RequestError(
                f"attn_implementation is {name!r}; known: {', '.join(IMPLEMENTATIONS)}"
                f"{nearest(name, IMPLEMENTATIONS)}"
            )
        if name == "auto" and strict:
            name = "flash_attention_2" if self.device.type == "cuda" else "sdpa"
        if name == "flash_attention_2" and self.dtype not in (torch.float16, torch.bfloat16):
            raise RequestError(
                f"flash_attention_2 takes float16 and bfloat16, and the model is {self.dtype}; load it with "
                "dtype=torch.bfloat16, or with attn_implementation='auto'"
            )
        only = IMPLEMENTATIONS[name]
        moves = name == "flash_attention_2" and self.device.type == "cpu" and torch.cuda.is_available()
        if moves:
            warnings.warn(
                "flash_attention_2 runs on GPUs; move the model there: model.to('cuda')", stacklevel=2
            )
        for layer in self.model.layers:
            if only is not None and self.device.type != "meta" and not moves:
                self._require(layer.self_attn, only, name)
            layer.self_attn.only = only

    def _require(self, attn: Attention, only: tuple[str, ...], name: str) -> None:
        """Raise unless one of `only` can take this layer's attention on its device."""
        q = torch.empty(1, attn.config.heads, attn.config.head_dim, dtype=self.dtype, device=self.device)
        offers = explain(q, 2, attn.scoring, only=only)
        if all(why is not None for _, why in offers):
            reasons = "; ".join(f"{candidate}: {why}" for candidate, why in offers if candidate in only)
            raise RequestError(
                f"attn_implementation={name!r} can't run layer {attn.index} of this model on {self.device}: "
                f"{reasons}; load it with attn_implementation='auto'"
            )

    def plan(self) -> Plan:
        """What runs for every op of every layer on the model's device, and why not what comes before it."""
        return make_plan(self)

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write `config.json`, `generation_config.json` and safetensors under the names that transformers
        and every other reader know; shards of at most `max_shard_size`."""
        folder = Path(folder)
        tensors = weights.store(self, rules(self.config))
        write_safetensors(folder, tensors, max_shard_size)
        rewritten = ("torch_dtype", "dtype", "quantization_config")
        source = {k: v for k, v in self.config.source.items() if k not in rewritten}
        if self.quantization_config is not None:
            source["quantization_config"] = self.quantization_config.to_dict()
        source["dtype"] = str(self.dtype).removeprefix("torch.")
        source["architectures"] = [self.config.architecture]
        (folder / "config.json").write_text(json.dumps(source, indent=2, sort_keys=True) + "\n", "utf-8")
        self.generation_config.save_pretrained(folder)


def _loss(logits: Tensor, labels: Tensor, batch: Batch, items: int | Tensor | None) -> Tensor:
    """Cross-entropy of each token's logits against the next token of its row."""
    targets = torch.full_like(labels, -100)
    targets[:-1] = labels[1:]
    targets[
        batch.starts[1:][batch.starts.diff() > 0].long() - 1
    ] = -100  # a row's last token predicts nothing
    if items is None:
        return F.cross_entropy(logits, targets, ignore_index=-100)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / items


def _token_ids(config: ModelConfig) -> dict[str, Any]:
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


_LATER = {
    "max_memory": "placement under memory caps",
}


def _reject(unknown: dict[str, Any]) -> None:
    for name, value in unknown.items():
        if name in ("low_cpu_mem_usage", "use_safetensors", "trust_remote_code", "use_cache"):
            continue  # already how Taut loads, or nothing it would ever do
        if name in _LATER:
            if value not in (None, False):
                raise RequestError(f"{name}={value!r}: {_LATER[name]} is not in this release; leave it out")
            continue
        known = [p for p in CausalLM.from_pretrained.__kwdefaults__ if p != "unknown"]
        raise RequestError(
            f"from_pretrained has no option {name!r}{nearest(name, known)}; known: {', '.join(known)}"
        )


@contextmanager
def _progress(wanted: bool | None, name: str) -> Iterator[Any]:
    """A bar over the bytes of the finished model, or nothing."""
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("Loading {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(Path(name).name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
