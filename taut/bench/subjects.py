"""Taut as a subject of measurement, and its weights as transformers names them."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taut import auto, weights
from taut.bench.cases import Inputs
from taut.bench.measure import DoesNotFit, synchronize
from taut.bench.shapes import Shape
from taut.checkpoint import Checkpoint
from taut.engine.request import Request, SamplingParams
from taut.engine.resident import Resident
from taut.errors import RequestError
from taut.models import module_rules
from taut.quant.base import Packed
from taut.quant.choose import choose
from taut.quant.config import BitsAndBytesConfig


def make_model(shape: Shape, *, context: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of a shape with random weights, the same each time, that takes at least `context` tokens; for
    inference, as one that is loaded."""
    config = dict(shape.config)
    config["max_position_embeddings"] = max(config["max_position_embeddings"], context)
    torch.manual_seed(0)
    return getattr(auto, shape.auto).from_config(config, dtype=dtype, device=device).eval()


@dataclass(frozen=True)
class _Held:
    """A tensor of a model as a file would give it."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensor[start:stop] if self.tensor.dim() else self.tensor


@torch.no_grad()
def quantized(model: Any, config: BitsAndBytesConfig) -> Any:
    """The same model with its linear layers packed, as loading it so would pack them; what stays as it is,
    the two share. `RequestError` where they are packed already, or nothing can be."""
    if model.is_quantized:
        raise RequestError(
            "--load-in packs what is in 16 bit, and the checkpoint is packed already; leave it out, or give "
            "the 16-bit one"
        )
    mapping = module_rules(model.config)
    tensors = {name: _Held(name, tensor) for name, tensor in shared_weights(model).items()}
    with torch.device("meta"):
        new = type(model)(model.config, dtype=model.dtype)
    layout = weights.layout(new, mapping)
    packing = choose(
        Checkpoint(Path("the model"), {}, {}, tensors),
        config,
        new.linears_on_disk(mapping),
        model.dtype,
        heads=new.heads_on_disk(layout, weights.prefix_of(layout)),
        keep_blocks=False,
    )
    weights.load(
        new, packing.tensors, mapping, dtype=model.dtype, device=model.device, packers=packing.packers
    )
    new.quantization_config = packing.config
    for name, param in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if getattr(new.get_submodule(path), kind) is not None:
            setattr(new.get_submodule(path), kind, param)
    return new.eval()


class Taut:
    """A Taut model under measurement."""

    def __init__(self, model: Any, *, name: str = "taut", all_logits: bool = False):
        self.model, self.name = model, name
        self.weights_bytes = model.get_memory_footprint()
        self._options = {} if all_logits or not hasattr(model, "generate") else {"logits_to_keep": 1}

    @property
    def packed(self) -> bool:
        """Whether some weights are kept in fewer bits than they are computed in."""
        return self.model.is_quantized

    def forward(self, inputs: Inputs) -> Any:
        return self.model(inputs.ids, attention_mask=inputs.mask, **self._options)

    def generate(self, inputs: Inputs, new_tokens: int) -> Tensor:
        mask = torch.ones_like(inputs.ids) if inputs.mask is None else inputs.mask
        out = self.model.generate(
            inputs.ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=0,
            use_cache=False,  # the prompt is the same each round: else only the first would compute it
        )
        return check_count(self.name, out, inputs, new_tokens)

    def decode(self, inputs: Inputs, new_tokens: int, uncounted: int) -> float:
        """As `generate` does it: requests in the model's own engine, stepped to their end."""
        params = SamplingParams(max_new_tokens=new_tokens)
        requests = [Request(prompt=row, params=params, scope=None) for row in inputs.ids.tolist()]
        try:
            engine = Resident.of(self.model).engine(self.model, requests)
        except RequestError as error:  # not even one row fits
            raise DoesNotFit(str(error)) from None
        needed = sum(engine.pages.needed(r.length + new_tokens) for r in requests)
        if needed > engine.pages.count or len(requests) > engine.scheduler.max_rows:
            raise DoesNotFit(f"{engine.pages.tokens} tokens of cache fit, not all {len(requests)} rows")
        for request in requests:
            engine.submit(request)
        device = torch.device(self.model.device)
        started = None
        while engine.has_work:
            engine.step()
            if started is None and all(len(r.output) >= uncounted for r in requests):
                started = time.perf_counter()
        synchronize(device)
        for request in requests:
            if request.error is not None:
                raise request.error
        return time.perf_counter() - started


def check_count(name: str, out: Tensor, inputs: Inputs, new_tokens: int) -> Tensor:
    """`out` `[rows, width + new]`, if it holds the tokens that were asked for: fewer can't be compared."""
    made = out.shape[1] - inputs.ids.shape[1]
    if made != new_tokens:
        raise RuntimeError(f"{name} generated {made} tokens in place of {new_tokens}")
    return out


@torch.no_grad()
def packed_weights(model: Any) -> dict[str, Packed]:
    """The matrices that a Taut model holds packed, in its own memory, by the names of transformers' modules;
    not those that transformers stacks, as it does experts."""
    return weights.units(model, weights.layout(model, module_rules(model.config)))


@torch.no_grad()
def shared_weights(model: Any, without: Collection[str] = ()) -> dict[str, Tensor]:
    """The weights of a Taut model under the names of transformers' modules, for a peer to compute with; but
    for the names `without`.

    They are views of Taut's own memory wherever rows lie together there, so that a peer costs none; a
    matrix that Taut keeps in fewer bits is unpacked to the model's dtype.
    """
    groups: dict[str, list[weights.Piece]] = {}
    for piece in weights.layout(model, module_rules(model.config)):
        if piece.disk not in without:
            groups.setdefault(piece.disk, []).append(piece)
    held = {name: param.data for name, param in model.named_parameters()}

    def dense(name: str) -> Tensor:
        if name not in held:
            held[name] = model.get_submodule(name.removesuffix(".weight")).packed.dequantize(model.dtype)
        return held[name]

    def stack(group: list[weights.Piece]) -> Tensor:
        param, first = dense(group[0].param), group[0]
        as_held = all((p.index, p.start, 1) == (p.entry, p.disk_start, p.disk_step) for p in group)
        if as_held and sum(piece.rows for piece in group) == param.shape[:2].numel():
            return param.mT if first.transposed else param
        whole = torch.empty_like(param.mT if first.transposed else param)
        for piece in group:
            piece.place(whole[piece.entry]).copy_(piece.view(param))
        return whole

    def whole(group: list[weights.Piece]) -> Tensor:
        if group[0].entry is not None:
            return stack(group)
        group = sorted(group, key=lambda piece: piece.disk_start)
        first = group[0]
        ends = [piece.start + piece.rows for piece in group]
        in_order = [piece.start for piece in group[1:]] == ends[:-1]
        if len(group) > 1 and in_order and all((p.param, p.index) == (first.param, None) for p in group):
            tensor = dense(first.param)[first.start : ends[-1]]
        else:
            parts = [piece.view(dense(piece.param)) for piece in group]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tensor.T if first.transposed else tensor

    return {name: whole(group) for name, group in groups.items()}
