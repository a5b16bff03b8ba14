"""Models of transformers as Taut's, over the same weights, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from taut import weights
from taut.auto import class_names
from taut.checkpoint.base import some
from taut.engine.generation import GenerationConfig
from taut.errors import RequestError, nearest
from taut.modeling.base import PreTrainedModel
from taut.models import family, read_config
from taut.weights import Piece


def to_bettertransformer(model: Any) -> PreTrainedModel:
    """A model that is packed, fused and flash; see `PreTrainedModel.to_bettertransformer`.

    A model of Taut is converted in place. Of a model of transformers whose class Taut has too
    (`BertModel`, `LlamaForCausalLM`), this gives Taut's, on the same device, in the same dtype and with the
    same weights: they are shared, not copied, wherever a tensor of either is a block of rows of one of the
    other's, or its transpose. That takes no memory but for one matrix at a time, and changing either model
    changes both. The model of transformers goes on working, its parameters the same objects; the few that
    Taut holds in another order are copied (`reverse_bettertransformer` brings them up to date).

    Raises `RequestError` for other objects and classes and for quantized or scattered models, and
    `ConfigError` where its config describes what Taut doesn't have.
    """
    if isinstance(model, PreTrainedModel):
        return model.to_bettertransformer()
    _check(model)
    name = type(model).__name__
    known = class_names()
    if name not in known:
        own = sorted(n for n, (kind, _) in known.items() if kind == model.config.model_type.replace("-", "_"))
        has = f"; of its family it has: {', '.join(own)}" if own else nearest(name, known)
        raise RequestError(f"Taut has no {name}{has}")
    config = read_config(json.loads(model.config.to_json_string()), f"the config of {name}")
    chosen = known[name][1].of(config, name)
    held = {key: _Held(key, tensor) for key, tensor in model.state_dict(keep_vars=True).items()}
    config, held = chosen.adapt(config, held)
    with torch.device("meta"):
        ours = chosen(config, dtype=model.dtype)
        if _has_pooler(name for name, _ in ours.named_parameters()) and not _has_pooler(held):
            config = replace(config, heads=replace(config.heads, pooler=None))
            ours = chosen(config, dtype=model.dtype)
    rules, held = _matched(ours, held)
    _adopt(ours, {key: lazy.tensor for key, lazy in held.items()}, rules, model.device)
    if ours.generation_config is not None and getattr(model, "generation_config", None) is not None:
        given = ours.generation_config.to_dict() | model.generation_config.to_diff_dict()
        ours.generation_config = GenerationConfig.from_dict(given)
    ours.set_attn_implementation("auto")
    ours.origin = Origin(model)
    return ours.train(model.training)


def reverse_bettertransformer(model: Any) -> Any:
    """The model of transformers that `to_bettertransformer` was given, with the weights as they are now; of
    any other model of Taut a new one, of transformers' class `model.architecture()`, with a copy of them. A
    model of transformers is returned as it is.

    Raises `RequestError` for quantized models, which transformers loads from what `save_pretrained` writes.
    """
    if not isinstance(model, PreTrainedModel):
        _check(model)
        return model
    if model.is_quantized:
        raise RequestError(
            f"this {model.architecture()} is quantized; save it with save_pretrained, and load that with "
            "transformers"
        )
    if model.origin is None:
        return _new(model)
    theirs = model.origin.model
    held = {key: _Held(key, tensor) for key, tensor in theirs.state_dict(keep_vars=True).items()}
    held = type(model).adapt(model.config, held)[1]
    rules, held = _matched(model, held)
    params = dict(model.named_parameters())
    shared = {disk: _view(pieces, params) for disk, pieces in _by_disk(weights.layout(model, rules)).items()}
    with torch.no_grad():
        for tensor in weights.store(model, rules):
            own = held[tensor.name].tensor if tensor.name in held else None
            if own is not None and not _same(own, shared[tensor.name]):
                own.data.copy_(tensor.read())
    return theirs.train(model.training)


@dataclass(frozen=True)
class Origin:
    """The model of transformers that one of Taut's shares its weights with."""

    model: Any


@dataclass(frozen=True)
class _Held:
    """A tensor in memory as a checkpoint's lazy one."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        whole = self.tensor.detach().cpu()
        return whole[start:stop] if whole.dim() else whole


def _check(model: Any) -> None:
    """Raise unless `model` is a whole model of transformers that lies on one device."""
    bases = {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in type(model).__mro__}
    if "transformers.PreTrainedModel" not in bases:
        raise RequestError(f"a {type(model).__name__} is given; expected a model of Taut or of transformers")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise RequestError(
            f"this {type(model).__name__} is quantized by transformers; load the checkpoint with Taut "
            f"(taut.{type(model).__name__}.from_pretrained(...)), which reads the same formats"
        )
    places = sorted({str(tensor.device) for tensor in model.state_dict().values()})
    if len(places) != 1 or places == ["meta"]:
        raise RequestError(f"this {type(model).__name__} lies on {', '.join(places)}; move it to one device")


def _has_pooler(names: Iterable[str]) -> bool:
    """Whether one of these parameters is a pooler's."""
    return any(".pooler." in f".{name}" for name in names)


def _matched(
    ours: PreTrainedModel, held: Mapping[str, _Held]
) -> tuple[Sequence[weights.Rule], dict[str, _Held]]:
    """The rules from the names of transformers' modules to those of `ours`, and its tensors under the names
    that these expect, checked one to one."""
    known = ours.layouts()
    prefix = weights.prefix_of(weights.layout(ours, known[0]))
    names = {piece.disk for rules in known for piece in weights.layout(ours, rules)}
    found = dict(weights.with_prefix(held, prefix, names))
    rules = weights.fitting(ours, known, found)
    ignored = (*getattr(family(ours.config.model_type), "IGNORED", ()), *ours.ignored())
    shapes = {name: param.shape for name, param in ours.named_parameters()}
    leeway = weights.Leeway(fresh=ours.computed)
    weights.check(weights.layout(ours, rules), shapes, found, ignored, leeway)
    return rules, found


def _by_disk(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.disk, []).append(piece)
    return groups


@torch.no_grad()
def _adopt(
    ours: PreTrainedModel,
    theirs: Mapping[str, Tensor],
    rules: Sequence[weights.Rule],
    device: torch.device,
) -> None:
    """Fill `ours`, built on the meta device, one parameter at a time; what can be shared then is."""
    pieces = weights.layout(ours, rules)
    by_disk, by_param = _by_disk(pieces), {}
    for piece in pieces:
        by_param.setdefault(piece.param, []).append(piece)
    fresh = []
    for name, meta in list(ours.named_parameters()):
        own = by_param[name]
        lacking = [piece.disk for piece in own if piece.disk not in theirs]
        sources = [theirs[piece.disk] for piece in own] if not lacking else []
        if len(own) == 1 and _is_all(own[0], sources, meta):
            data = sources[0].data
        else:
            data = torch.empty(meta.shape, dtype=meta.dtype, device=device)
            for piece, source in zip(own, sources, strict=not lacking):
                entry = source if piece.entry is None else source[piece.entry]
                piece.view(data).copy_(piece.place(entry))
        grad = all(source.requires_grad for source in sources) and meta.requires_grad
        path, _, kind = name.rpartition(".")
        setattr(ours.get_submodule(path), kind, nn.Parameter(data, requires_grad=grad))
        fresh += [name] if lacking else []
        for disk in dict.fromkeys(piece.disk for piece in own):
            view = _view(by_disk[disk], {name: data})
            if view is not None and disk in theirs and theirs[disk].dtype is view.dtype:
                theirs[disk].data = view
    if fresh:
        ours.init_weights(only=fresh)


def _is_all(piece: Piece, sources: Sequence[Tensor], param: Tensor) -> bool:
    """Whether a piece says that a parameter is a tensor as it lies there."""
    plain = not piece.transposed and piece.index is None and piece.disk_step == 1
    return (
        plain
        and all(s.shape == param.shape and s.dtype is param.dtype and s.is_contiguous() for s in sources)
        and bool(sources)
    )


def _view(pieces: Sequence[Piece], params: Mapping[str, Tensor]) -> Tensor | None:
    """A tensor of the file as a view of one parameter, if it is one."""
    first = min(pieces, key=lambda piece: piece.disk_start)
    if first.param not in params:
        return None
    param, begin = params[first.param].data, first.start - first.disk_start
    for piece in pieces:
        steady = piece.start - piece.disk_start == begin and (piece.disk_step == 1 or piece.rows == 1)
        if piece.param != first.param or piece.index != piece.entry or not steady:
            return None
    if not param.dim():
        return param
    stop = max(piece.start + piece.rows for piece in pieces)
    whole = param[first.start : stop] if first.entry is None else param[:, first.start : stop]
    return whole.mT if first.transposed else whole


def _same(tensor: Tensor, view: Tensor | None) -> bool:
    """Whether a tensor lies where a view does."""
    return view is not None and (
        (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        == (view.data_ptr(), view.shape, view.stride(), view.dtype)
    )


def _new(model: PreTrainedModel) -> Any:
    """A model of transformers with a copy of the weights."""
    import transformers

    name, source = model.architecture(), dict(model.config.source)
    kind = getattr(transformers, name, None)
    if kind is None:
        raise RequestError(f"transformers {transformers.__version__} has no {name}")
    config = transformers.AutoConfig.for_model(source.pop("model_type"), **source)
    tensors = {tensor.name: tensor.read() for tensor in weights.store(model, model.rules())}
    theirs, report = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=model.dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise RequestError(
            f"transformers' {name} wants what this model lacks: {some(report['missing_keys'])}"
        )
    return theirs.to(model.device).train(model.training)
