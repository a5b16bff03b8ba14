"""`PreTrainedModel`: what every model shares, whatever its head: loading, saving, its size, its attention."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from taut import weights
from taut.batch import Batch
from taut.checkpoint import LazyTensor, open_checkpoint, write_safetensors
from taut.checkpoint.base import some
from taut.config import GENERATION, ModelConfig
from taut.engine.generation import GenerationConfig
from taut.engine.replay import Replays
from taut.errors import RequestError, nearest
from taut.hub import resolve
from taut.kernels.attention import Call, explain
from taut.kernels.dispatch import compiled_refuses, triton_refuses
from taut.layers.attention import Attention
from taut.layers.block import Block, Stack
from taut.layers.embedding import Embedding, PositionEmbedding
from taut.layers.norm import HeadNorm, Norm
from taut.layers.siblings import rejoin, separate
from taut.modeling.configs import config_at
from taut.modeling.embeddings import set_head, set_table
from taut.modeling.labels import relabelled
from taut.modeling.plan import Plan, make_plan
from taut.modeling.resize import resize
from taut.models import family, layouts, read_config, stem
from taut.placement import DEVICE, pick_device, pick_dtype
from taut.quant.base import Packed
from taut.quant.base import Stack as PackedStack
from taut.quant.choose import asked, choose, keeps_blocks, unpacked
from taut.quant.config import BitsAndBytesConfig
from taut.weights import Rule

Self = TypeVar("Self", bound="PreTrainedModel")

# What a file may hold beside its weights: angles that older exports stored, and a head that is tied anyway.
_IGNORED = ("*.rotary_emb.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached", "*.masked_bias")


# Names of attention in transformers -> the candidates of `kernels.attention` that they stand for.
IMPLEMENTATIONS: Mapping[str, tuple[str, ...] | None] = MappingProxyType(
    {"auto": None, "flash_attention_2": ("paged", "flash"), "sdpa": ("sdpa",), "eager": ("eager",)}
)
# What `strict` leaves of "auto": where nothing needs to fall back, one of these runs.
STRICT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cuda": ("paged", "cudnn", "flash"), "cpu": ("paged", "packed", "sdpa")}
)


class PreTrainedModel(nn.Module):
    """A model that a checkpoint can be loaded into. Weights are empty until `from_pretrained`,
    `from_config` or `init_weights`; a subclass adds its modules and its `forward`.

    What it computes before its head is the module `model`. `suffix` ends the class's name in transformers.
    `head` names modules that a checkpoint may lack (they are then initialised, with a warning) and that stay
    dense when a model is quantized while loading; a class with `whole=False` also takes checkpoints with
    another head, which it leaves out. `computed` names modules and parameters that files may lack since they
    follow from the config.
    """

    suffix = ""
    head: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    whole = True

    origin: Any = None  # what a bridge made it of, and shares its weights with

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.generation_config: GenerationConfig | None = None  # of models that generate
        self.quantization_config: BitsAndBytesConfig | None = None
        self.load_report = weights.Report()
        self._replays: dict[nn.Module, Replays] = {}
        # What restricted each attention before the model was reversed; None while it is converted.
        self._attention_before: list[tuple[str, ...] | None] | None = None

    # ------------------------------------------------------------------------------------ what it is

    def blocks(self) -> Iterator[Block]:
        """Every block, in order of computation."""
        return (module for module in self.modules() if isinstance(module, Block))

    @property
    def device(self) -> torch.device:
        return next(self._tensors()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: that of its first parameter, which is never packed."""
        return next(self._tensors()).dtype

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.parameters()
        yield from self.buffers()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, a tied head counted once. What is held packed counts as what it stands for,
        and can't be trained. `exclude_embeddings`: without the tables of tokens, of their features and of
        positions."""
        tables = [m for m in self.modules() if isinstance(m, Embedding | PositionEmbedding)]
        out = {id(x) for m in tables for x in (*m.parameters(), *m.modules())} if exclude_embeddings else ()
        kept = (p for p in self.parameters() if id(p) not in out)
        dense = sum(p.numel() for p in kept if p.requires_grad or not only_trainable)
        packed = (m for m in self.modules() if isinstance(m, Packed) and not isinstance(m, PackedStack))
        held = sum(m.out_features * m.in_features for m in packed if id(m) not in out)
        return dense if only_trainable else dense + held

    def newly_initialised(self) -> list[str]:
        """Parameters that the checkpoint had no weights for, and that have to be trained."""
        computed = weights.Leeway(fresh=self.computed)
        return [param for param in self.load_report.fresh if not computed.may_lack(param)]

    def get_memory_footprint(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    def memory_by_format(self) -> dict[str, int]:
        """Bytes of parameters and buffers by what they are kept in: "bfloat16", "nf4", "int8" ..."""
        found: dict[str, int] = {}
        packed = [m for m in self.modules() if isinstance(m, Packed) and not isinstance(m, PackedStack)]
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

    # ------------------------------------------------------------------------------------ where it is

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """As `nn.Module.to`: a device ("auto" too), a dtype, or both. What is held packed moves, and stays as
        it is. `RequestError` for a device that is not there."""
        if isinstance(kwargs.get("device"), DEVICE):
            kwargs["device"] = pick_device(kwargs["device"])
        if args and isinstance(args[0], DEVICE):
            args = (pick_device(args[0]), *args[1:])
        return super().to(*args, **kwargs)

    def cuda(self: Self, device: int | torch.device | None = None) -> Self:
        """`to` a GPU, by its number; None: the current one."""
        return self.to("cuda" if device is None else device)

    # ------------------------------------------------------------------------------------ computing

    def packed(self, module: nn.Module, batch: Batch) -> Tensor:
        """`module(batch)` for one of this model's packed modules; on a GPU by a CUDA graph where launching
        its kernels would take longer than they do, and no gradient is wanted."""
        if module not in self._replays:
            self._replays[module] = Replays(self, module)
        return self._replays[module](batch)

    @contextmanager
    def _first_nonfinite(self) -> Iterator[list[str]]:
        """The first module, in order of computation inside the block, whose weights or output are not
        finite."""
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
            yield found
        finally:
            for handle in hooks:
                handle.remove()

    # ------------------------------------------------------------------------------------ training

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Keep the inputs of blocks alone for the backward pass, and compute the rest again there: gradients
        are the same, activations take the memory of one block, and a step takes one more forward pass.

        `gradient_checkpointing_kwargs`: `{"use_reentrant": False}`, which is how Taut does it anyway.
        `RequestError` for others.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False) or options:
            raise RequestError(
                f"gradient_checkpointing_kwargs is {dict(gradient_checkpointing_kwargs)}; known: "
                "use_reentrant=False; leave it out"
            )
        self._checkpoint(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all that the backward pass needs."""
        self._checkpoint(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return any(stack.gradient_checkpointing for stack in self._stacks())

    def enable_input_require_grads(self) -> None:
        """What enters the first block (of each stack) requires a gradient wherever gradients are computed,
        also if nothing before it is trained: a loss then reaches adapters inside a frozen model, and layers
        that are checkpointed by hand."""
        self._require_grads(True)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        self._require_grads(False)

    def _require_grads(self, on: bool) -> None:
        for stack in self._stacks():
            stack.input_requires_grad = on

    def _checkpoint(self, on: bool) -> None:
        for stack in self._stacks():
            stack.gradient_checkpointing = on

    def _stacks(self) -> Iterator[Stack]:
        return (module for module in self.modules() if isinstance(module, Stack))

    # ------------------------------------------------------------------------------------ the vocabulary

    def get_input_embeddings(self) -> nn.Module | None:
        """The module that looks tokens up, or makes tokens of an image; None for a model of sounds."""
        return None

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Look tokens up in the weight `[vocab, dim]` of `value`, an `nn.Embedding` or what
        `get_input_embeddings` gives of another model, from here on; the parameter is shared, not copied.

        The module that is there stays, with its hooks and the factor by which a family scales its vectors;
        what shares it goes along: a tied head, the decoder beside an encoder. `padding_idx` is taken from
        `value`. Make optimizers afterwards.

        Raises `RequestError` for a model without a table of tokens or which holds it packed, for other
        modules, and for a weight of another shape, dtype or device.
        """
        set_table(self, value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The module whose matrix scores tokens; None for a model that scores none."""
        return None

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Score tokens by the weight `[vocab, dim]` and the bias of `value`, an `nn.Linear` or what
        `get_output_embeddings` gives of another model, from here on; parameters are shared, not copied.

        A head that was the table of tokens is one of its own afterwards, also in the config and in what
        `save_pretrained` writes. Make optimizers afterwards.

        Raises `RequestError` for a model that scores no tokens, whose head is held packed or is the table
        behind a transform (masked tokens), for other modules, for a bias where files have none or none where
        they have one, and for a weight of another shape, dtype or device.
        """
        set_head(self, value)

    def tie_weights(self) -> None:
        """Nothing is left to do: a head that is tied to the table of tokens is that table itself."""

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Give the vocabulary `new_num_tokens` ids, rounded up to `pad_to_multiple_of`: the table of tokens,
        a head over them and the config. Those that there are stay, up to the new number; new ones begin at
        the mean of the old (`mean_resizing`; Hewitt 2021), otherwise drawn as `init_weights` does with biases
        of 0. Returns the table. Parameters are new objects: make optimizers afterwards.

        Raises `RequestError` for a model without one table, or which holds it packed.
        """
        return resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    # ------------------------------------------------------------------------------------ loading, saving

    def rules(self) -> tuple[Rule, ...]:
        """How the names in saved files map onto those of this model."""
        return tuple(weights.storable(self, self.layouts()))

    def layouts(self) -> list[tuple[Rule, ...]]:
        """Every layout that files of this model may have."""
        return layouts(self.config)

    def architecture(self) -> str:
        """The name of this class, of its family, in transformers."""
        return f"{stem(family(self.config.model_type))}{self.suffix}"

    def ignored(self) -> tuple[str, ...]:
        """Patterns of tensors that a checkpoint may hold beside those of this model."""
        return ()

    @classmethod
    def of(cls: type[Self], config: ModelConfig, source: str = "the config") -> type[Self]:
        """The class that `config` is a model of: this one, unless it stands for several. `ConfigError`, which
        names `source`, where there is none."""
        return cls

    @classmethod
    def adapt(
        cls, config: ModelConfig, tensors: Mapping[str, LazyTensor]
    ) -> tuple[ModelConfig, Mapping[str, LazyTensor]]:
        """The config, where a checkpoint's tensors know better than it, and these tensors."""
        return config, tensors

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str | Path,
        *,
        config: Any = None,
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
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        ignore_mismatched_sizes: bool = False,
        add_pooling_layer: bool = True,
        **changes: Any,
    ) -> Self:
        """Load a folder, a `.gguf` file or a Hub id.

        `config`, from `AutoConfig.from_pretrained` (or a dict, or transformers' own), takes the place of the
        checkpoint's; `changes` are to keys of its `config.json` alone. `dtype` (`torch_dtype` is its older
        name): "auto" takes the checkpoint's own; for 4- and 8-bit GGUF files bfloat16 where the device
        computes in it, and on such a CPU their linear layers then stay packed (any other choice dequantizes
        them). `device_map` (or `device`):
        "auto" (the first GPU, otherwise the CPU), a device, or `{"": device}`; default CPU.
        `attn_implementation`, `strict`: see `set_attn_implementation`; `use_flash_attention_2=True` is the
        older way to ask for "flash_attention_2". `load_in_4bit`, `load_in_8bit` and `quantization_config` (a
        `BitsAndBytesConfig`, transformers' own or a dict) pack the linear layers while loading; a checkpoint
        that is packed already needs none of them. `progress`: a bar on the terminal; default: only if stderr
        is one. `num_labels`, or the names `id2label` and `label2id`, and `problem_type` change what a
        classifier classifies. A head that the checkpoint lacks, or with `ignore_mismatched_sizes` has in
        another shape, is initialised, and a warning names it. `add_pooling_layer=False` leaves out an
        encoder's pooler.

        Raises `CheckpointError` (files), `ConfigError` (config.json) or `WeightsError` (tensors that don't
        fit the config); nothing half-loaded remains.
        """
        _reject(changes)
        changes = {name: value for name, value in changes.items() if name not in (*_OURS, *_LATER)}
        wanted = asked(load_in_4bit, load_in_8bit, quantization_config)
        if use_flash_attention_2:
            if attn_implementation not in (None, "flash_attention_2"):
                raise RequestError(
                    f"use_flash_attention_2=True and attn_implementation={attn_implementation!r} ask for two "
                    "things; leave one out"
                )
            attn_implementation = "flash_attention_2"
        where = {"revision": revision, "cache_dir": cache_dir, "token": token}
        where |= {"local_files_only": local_files_only, "gguf_file": gguf_file}
        if changes:
            config = _changed(str(name), config, changes, where)
        path = resolve(str(name), **where)
        checkpoint = unpacked(open_checkpoint(path))
        if config is None:
            config = read_config(checkpoint.config, f"{path}: config")
        elif not isinstance(config, ModelConfig):
            given = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
            config = read_config(given, "config")
        chosen = cls.of(config, str(path))
        config, tensors = chosen.adapt(config, checkpoint.tensors)
        config = relabelled(
            config,
            num_labels=num_labels,
            id2label=id2label,
            label2id=label2id,
            problem_type=problem_type,
        )
        if not add_pooling_layer:
            config = replace(config, heads=replace(config.heads, pooler=None))
        target = pick_device(device_map if device_map is not None else device)
        choice = torch_dtype if torch_dtype is not None else dtype
        kind = pick_dtype(choice, config, checkpoint, target)
        with torch.device("meta"):
            model = chosen(config, dtype=kind)
        known = model.layouts()
        prefix = weights.prefix_of(weights.layout(model, known[0]))
        names = {piece.disk for mapping in known for piece in weights.layout(model, mapping)}
        tensors = weights.without_greek(weights.with_prefix(tensors, prefix, names), names)
        checkpoint = replace(checkpoint, tensors=tensors)
        mapping = weights.fitting(model, known, tensors)
        layout = weights.layout(model, mapping)
        packing = choose(
            checkpoint,
            wanted,
            model.linears_on_disk(mapping),
            kind,
            heads=model.heads_on_disk(layout, prefix),
            tables=weights.embeddings(model, mapping),
            keep_blocks=keeps_blocks(checkpoint, choice, kind, target),
        )
        ignored = (*_IGNORED, *getattr(family(config.model_type), "IGNORED", ()), *model.ignored())
        with _progress(progress, str(name)) as report:
            model.load_report = weights.load(
                model,
                packing.tensors,
                mapping,
                dtype=kind,
                device=target,
                ignored=ignored,
                leeway=model.leeway(packing.tensors, prefix, reshape=ignore_mismatched_sizes),
                packers=packing.packers,
                progress=report,
            )
        if model.load_report.fresh:
            model.init_weights(only=model.load_report.fresh)
            _warn_fresh(model, str(name))
        model.quantization_config = packing.config
        if model.generation_config is not None:
            own = model.generation_config.to_dict()
            given = checkpoint.generation or {k: v for k, v in checkpoint.config.items() if k in GENERATION}
            model.generation_config = GenerationConfig.from_dict({**own, **given})
        model.set_attn_implementation(attn_implementation or "auto", strict=strict)
        return model.eval()

    @classmethod
    def from_config(
        cls: type[Self],
        config: ModelConfig | dict[str, Any],
        *,
        dtype: torch.dtype | None = None,
        device: Any = "cpu",
    ) -> Self:
        """A model with random weights, from a `ModelConfig` or a `config.json` as a dict."""
        config = config if isinstance(config, ModelConfig) else read_config(config)
        with torch.device("meta"):
            model = cls.of(config)(config, dtype=dtype or config.dtype or torch.float32)
        return model.to_empty(device=device).init_weights()

    def leeway(
        self, tensors: Collection[str], prefix: str | None, *, reshape: bool = False
    ) -> weights.Leeway:
        """Where a checkpoint with `tensors` may differ from this model: outside of `prefix` are heads."""
        spare = ()
        if not self.whole and prefix is not None:
            spare = tuple(name for name in tensors if not name.startswith(f"{prefix}."))
            spare += (f"{prefix}.pooler.*",)
        return weights.Leeway(fresh=(*self.head, *self.computed), reshape=reshape, spare=spare)

    def linears_on_disk(self, mapping: Sequence[Rule]) -> list[str]:
        """The names that files give to the matrices which small formats may pack: of all linear layers but
        those that the family keeps `DENSE`."""
        dense = getattr(family(self.config.model_type), "DENSE", ())
        names = weights.linears(self, mapping)
        return [name for name in names if name.removesuffix(".weight").rpartition(".")[2] not in dense]

    def heads_on_disk(self, layout: Sequence[weights.Piece], prefix: str | None) -> list[str]:
        """What files call the modules of `head`, less the word that headless files leave out."""
        owned = tuple(f"{module}." for module in self.head)
        names = (
            [p.disk for p in layout if p.param.startswith(owned) and p.disk.endswith(".weight")]
            if owned
            else []
        )
        return [name.removeprefix(f"{prefix}.").removesuffix(".weight") for name in names]

    @torch.no_grad()
    def init_weights(self: Self, std: float = 0.02, only: Collection[str] | None = None) -> Self:
        """Fill in place: matrices from N(0, std), norms with the identity, biases with zero, and what a
        module has in `initial` with that number. `only`: names of the parameters to fill; default: all."""
        for name, param in self.named_parameters():
            if only is not None and name not in only:
                continue
            module = self.get_submodule(name.rpartition(".")[0])
            constants = getattr(module, "initial", {})
            if (own := name.rpartition(".")[2]) in constants:
                nn.init.constant_(param, constants[own])
            elif name.endswith("bias"):
                nn.init.zeros_(param)
            elif isinstance(module, PositionEmbedding) and module.config.sinusoidal:
                module.compute()
            elif isinstance(module, Norm | HeadNorm):
                nn.init.constant_(param, 1.0 - module.config.offset)
            else:
                nn.init.normal_(param, std=std)
        return self

    def set_attn_implementation(self, name: str, *, strict: bool = False) -> None:
        """Restrict attention to one implementation; "auto" allows all, in order of preference.

        "flash_attention_2" is Taut's packed flash kernel and its decode kernel, for float16 and bfloat16 on
        a GPU; "sdpa" PyTorch's; "eager" the reference. `strict` with "auto": what the device runs best, or
        an error; no fallback, neither of attention nor of the kernels for all else. Raises `RequestError`
        where this model on its device can't have it.
        """
        if name not in IMPLEMENTATIONS:
            raise RequestError(
                f"attn_implementation is {name!r}; known: {', '.join(IMPLEMENTATIONS)}"
                f"{nearest(name, IMPLEMENTATIONS)}"
            )
        only, asked = IMPLEMENTATIONS[name], f"attn_implementation={name!r}"
        if name == "auto" and strict and self.device.type in STRICT:
            only, asked = STRICT[self.device.type], "strict=True"
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            why = triton_refuses(like) if like.is_cuda else compiled_refuses(like)
            if why is not None:
                raise RequestError(
                    f"strict=True, but {self.device} would run reference implementations: {why}; leave "
                    "strict out, and see model.plan()"
                )
        if name == "flash_attention_2" and self.dtype not in (torch.float16, torch.bfloat16):
            raise RequestError(
                f"flash_attention_2 takes float16 and bfloat16, and the model is {self.dtype}; load it with "
                "dtype=torch.bfloat16, or with attn_implementation='auto'"
            )
        moves = name == "flash_attention_2" and self.device.type == "cpu" and torch.cuda.is_available()
        if moves:
            warnings.warn(
                "flash_attention_2 runs on GPUs; move the model there: model.to('cuda')", stacklevel=2
            )
        for attn in (module for module in self.modules() if isinstance(module, Attention)):
            if only is not None and self.device.type != "meta" and not moves:
                self._require(attn, only, asked)
            attn.only = only

    def to_bettertransformer(self: Self) -> Self:
        """Convert in place, and return the model; models load converted, so this undoes
        `reverse_bettertransformer`.

        Converted means packed (no layer sees padding), fused (q, k and v are one product, gate and up
        another; norm, activation and residual are part of products where a kernel has them) and flash (the
        fastest attention that the device and PyTorch's `sdpa_kernel` allow). It is exact, for inference and
        training alike, and changes nothing of what `save_pretrained` writes. Parameters are new objects, over
        the same memory wherever it lies together: make optimizers afterwards.
        """
        if self._attention_before is not None:
            rejoin(self)
            for attn, only in zip(self._attentions(), self._attention_before, strict=True):
                attn.only = only
            self._attention_before = None
        return self

    def reverse_bettertransformer(self: Self) -> Self:
        """Undo `to_bettertransformer` in place, and return the model.

        Each matrix of the files is then a module of its own (`self_attn.q_proj`), and attention is the
        reference: plain PyTorch, a row at a time. It computes the same numbers, slower, and `save_pretrained`
        writes the same bytes. Experts stay stacked, and rows are still packed at the door: nothing in Taut
        computes on padding.
        """
        if self._attention_before is None:
            self._attention_before = [attn.only for attn in self._attentions()]
            separate(self)
            for attn in self._attentions():
                attn.only = IMPLEMENTATIONS["eager"]
        return self

    @property
    def is_bettertransformer(self) -> bool:
        """Whether the model is converted, as models load."""
        return self._attention_before is None

    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def _require(self, attn: Attention, only: tuple[str, ...], asked: str) -> None:
        """Raise unless one of `only` can take this layer's attention on its device."""
        q = torch.empty(1, attn.config.heads, attn.config.head_dim, dtype=self.dtype, device=self.device)
        offers = explain(Call(q, 1, 2, attn.scoring), only)
        if all(why is not None for _, why in offers):
            reasons = "; ".join(f"{candidate}: {why}" for candidate, why in offers if candidate in only)
            raise RequestError(
                f"{asked} can't run layer {attn.index} of this model on {self.device}: {reasons}; load it "
                "with attn_implementation='auto'" + (", strict=False" if asked == "strict=True" else "")
            )

    def plan(self) -> Plan:
        """What runs for every op of every layer on the model's device, and why not what comes before it."""
        return make_plan(self)

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write `config.json`, `generation_config.json` and safetensors under the names that transformers
        and every other reader know; shards of at most `max_shard_size`."""
        folder = Path(folder)
        tensors = weights.store(self, self.rules())
        write_safetensors(folder, tensors, max_shard_size)
        rewritten = ("torch_dtype", "dtype", "quantization_config")
        source = {k: v for k, v in self.config.source.items() if k not in rewritten}
        if self.quantization_config is not None:
            source["quantization_config"] = self.quantization_config.to_dict()
        source["dtype"] = str(self.dtype).removeprefix("torch.")
        source["architectures"] = [self.architecture()]
        (folder / "config.json").write_text(json.dumps(source, indent=2, sort_keys=True) + "\n", "utf-8")
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)


def _warn_fresh(model: PreTrainedModel, name: str) -> None:
    fresh, report = model.newly_initialised(), model.load_report
    if not fresh:
        return
    left_out = f"; of the checkpoint, {some(report.left_out)} was left out" if report.left_out else ""
    warnings.warn(
        f"{name} has no weights for {some(fresh, 12)} of a {model.architecture()}: they are newly "
        f"initialised, and should be trained before they are used{left_out}",
        stacklevel=3,
    )


_LATER = {
    "max_memory": "placement under memory caps",
}


# Already how Taut loads, or nothing it would ever do.
_OURS = ("low_cpu_mem_usage", "use_safetensors", "trust_remote_code", "use_cache")


def _reject(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _LATER and value not in (None, False):
            raise RequestError(f"{name}={value!r}: {_LATER[name]} is not in this release; leave it out")


def _changed(name: str, config: Any, changes: Mapping[str, Any], where: Mapping[str, Any]) -> ModelConfig:
    """The config of a checkpoint with changes to its keys, all of which it has to read."""
    if config is not None:
        raise RequestError(f"config is given, and changes to one: {', '.join(changes)}; change the config")
    found, known = config_at(name, changes, **where), PreTrainedModel.from_pretrained.__kwdefaults__
    for option in changes:
        if option in found.unused:
            near = nearest(option, [*known, *(key for key in found.source if key not in changes)])
            raise RequestError(
                f"from_pretrained has no option {option!r}, nor the config such a key{near}; known: "
                f"{', '.join(known)}, and what config.json has"
            )
    return found


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
