"""`model.plan()`: what runs for every op of every layer, and why not what would come before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from taut.kernels import cublas, gemv, onednn
from taut.kernels.attention import Call, KeyRows, Pages, explain
from taut.kernels.dispatch import compiled_refuses, device_refuses, triton_refuses
from taut.layers.linear import Linear
from taut.layers.mlp import PlainMlp
from taut.layers.moe import MoeMlp

if TYPE_CHECKING:
    from taut.layers.attention import Attention, CrossAttention
    from taut.layers.block import Block
    from taut.layers.moe import Experts
    from taut.modeling.base import PreTrainedModel

Offer = tuple[str, str | None]  # an implementation, and why it can't be taken


@dataclass(frozen=True)
class Choice:
    """Layers `[first, last]` run `op` by `chosen`; `passed` are those before it, each with its reason.
    `stack`: "encoder" or "decoder" in a model with both, whose layers are counted apart."""

    first: int
    last: int
    op: str
    chosen: str
    passed: tuple[tuple[str, str], ...]
    stack: str = ""


@dataclass(frozen=True)
class Plan:
    """The choices of a whole model, in order; printing it gives one table."""

    device: str
    dtype: str
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.device}, {self.dtype}", title_justify="left")
        for column in ("layers", "op", "runs on", "passed over"):
            table.add_column(column, overflow="fold")
        for c in self.choices:
            layers = str(c.first) if c.first == c.last else f"{c.first}-{c.last}"
            reasons = "\n".join(f"{name}: {why}" for name, why in c.passed)
            table.add_row(f"{c.stack} {layers}".lstrip(), c.op.replace(": ", ":\n"), c.chosen, reasons)
        console = Console(width=110)
        with console.capture() as text:
            console.print(table)
        return text.get()

    __repr__ = __str__


@torch.inference_mode()
def make_plan(model: PreTrainedModel) -> Plan:
    """What inference runs on the model's device, in its dtype; neighbours that run alike share a line."""
    choices = [
        choice
        for stack, blocks in _stacks(model).items()
        for choice in _choices(stack, [_layer(model, block) for block in blocks])
    ]
    return Plan(str(model.device), str(model.dtype).removeprefix("torch."), tuple(choices))


def _stacks(model: PreTrainedModel) -> dict[str, list[Block]]:
    """The blocks of each stack by its name; a lone stack needs none."""
    if model.config.pairing is None or not hasattr(model, "decoder"):
        return {"": list(model.blocks())}
    return {"encoder": list(model.encoder.layers), "decoder": list(model.decoder.layers)}


def _choices(stack: str, layers: list[dict[str, list[Offer]]]) -> Iterator[Choice]:
    for op in dict.fromkeys(op for layer in layers for op in layer):
        first = 0
        for last, layer in enumerate(layers):
            offers = layer.get(op)  # only some layers may have experts
            if last + 1 < len(layers) and layers[last + 1].get(op) == offers:
                continue
            if offers is not None:
                yield _choice(first, last, op, offers, stack)
            first = last + 1


def _choice(first: int, last: int, op: str, offers: list[Offer], stack: str) -> Choice:
    passed = []
    for name, why in offers:
        if why is None:
            return Choice(first, last, op, name, tuple(passed), stack)
        passed.append((name, why))
    return Choice(first, last, op, "nothing: it raises", tuple(passed), stack)


def _layer(model: PreTrainedModel, block: Block) -> dict[str, list[Offer]]:
    x = torch.empty(1, model.config.dim, dtype=model.dtype, device=model.device)
    triton: Offer = ("triton", triton_refuses(x))
    attn = block.self_attn
    experts = {"experts": _experts(x, block.mlp.experts)} if isinstance(block.mlp, MoeMlp) else {}
    cached = {}
    if attn.config.causal:
        cached = {
            "attention to a cached prefix": _attention(model, attn, 512, rows=1, cached=True),
            "attention of a decode step": _attention(model, attn, 1, rows=1, cached=True),
        }
    return {
        "norm, rotation": [triton, ("llvm", compiled_refuses(x)), ("reference", None)],
        **_activation(model, block, triton),
        **_products(x, block, 1),
        **_products(x, block, 512),
        **experts,
        "attention of even rows": _attention(model, attn, 512, rows=1),
        "attention of uneven rows": _attention(model, attn, 512, rows=2),
        **cached,
        **({} if block.encoder_attn is None else _cross(model, block.encoder_attn)),
    }


def _activation(model: PreTrainedModel, block: Block, triton: Offer) -> dict[str, list[Offer]]:
    """What an activation is part of; one that gates runs by itself."""
    if not isinstance(block.mlp, PlainMlp):
        return {"activation by itself": [triton, ("reference", None)]}
    act, up = block.mlp.config.act, block.mlp.up_proj
    alone: Offer = ("PyTorch, by itself", None)
    if up.packed is not None:
        return {f"{act} behind a product of 512 rows": [alone]}
    x = torch.empty(512, up.in_features, dtype=model.dtype, device=model.device)
    offers: list[Offer] = [("cuBLAS, with the product", cublas.refuses(x, up.weight, up.bias, act))]
    if x.is_cpu:
        has = None if act in onednn.POINTWISE else f"has no {act}"
        offers.append(("oneDNN, with the product", has or onednn.refuses(x, up.weight)))
    return {f"{act} behind a product of 512 rows": [*offers, alone]}


def _cross(model: PreTrainedModel, attn: CrossAttention) -> dict[str, list[Offer]]:
    return {
        "attention to an encoder's states": _attention(model, attn, 512, rows=2, source=512),
        "attention to a cached source": _attention(model, attn, 1, rows=1, cached=True),
    }


def _attention(
    model: PreTrainedModel,
    attn: Attention,
    tokens: int,
    *,
    rows: int,
    cached: bool = False,
    source: int | None = None,
) -> list[Offer]:
    """`tokens` queries, the longest row with all of them but one a row for the others; `source` keys a row
    where the keys have rows of their own."""
    c, longest = attn.config, tokens - rows + 1
    q = torch.empty(1, c.heads, c.head_dim, dtype=model.dtype, device=model.device).expand(tokens, -1, -1)
    pages = None
    if cached:
        keys = torch.empty(1, 16, c.kv_heads, c.head_dim, dtype=model.dtype, device=model.device)
        table = torch.zeros(1, 1, dtype=torch.int32, device=model.device)
        pages = Pages(keys, keys, table, table[0], longest)
    keys_of = None
    if source is not None:
        starts = torch.empty(rows + 1, dtype=torch.int32, device=model.device)
        keys_of = KeyRows(starts, source)
    return explain(Call(q, rows, longest, attn.scoring, pages, c.kv_heads, keys_of), attn.only)


def _experts(x: torch.Tensor, experts: Experts) -> list[Offer]:
    grouped, held = triton_refuses(x), experts.gate_up_proj.packed
    if held is None:
        return [("one grouped product", grouped), ("a product for each expert in use", None)]
    offers: list[Offer] = []
    if (codes := held.codes()) is not None and grouped is None:
        from taut.kernels.moe_packed import refuses

        offers = [(f"one grouped product of {held.whole.kind}", refuses(codes, x.shape[1], x.dtype))]
    return [*offers, ("unpacked, one grouped product", grouped), ("a product for each expert in use", None)]


def _products(x: torch.Tensor, block: Block, rows: int) -> dict[str, list[Offer]]:
    """The products of a block's linear layers: a line for all, or one for those that run alike."""
    alike: list[tuple[list[Offer], list[str]]] = []
    for name, linear in block.named_modules():
        if isinstance(linear, Linear):
            offers, word = _product(x, linear, rows), name.rpartition(".")[2]
            names = next((names for known, names in alike if known == offers), None)
            if names is None:
                alike.append((offers, [word]))
            elif word not in names:
                names.append(word)
    op = f"products of {rows} row{'s' if rows > 1 else ''}"
    return {op if len(alike) == 1 else f"{op}: {', '.join(names)}": offers for offers, names in alike}


def _product(x: torch.Tensor, linear: Linear, rows: int) -> list[Offer]:
    x = x.new_empty(1, linear.in_features).expand(rows, -1)
    if linear.packed is not None:
        return [(linear.packed.runs_on(x), None)]
    weight = linear.weight
    if x.is_cuda:
        why = device_refuses(x.device) or gemv.refuses(x, weight)
        if why is None and rows > gemv.WINNING_ROWS:
            why = f"cuBLAS is as fast beyond {gemv.WINNING_ROWS} rows"
        return [("gemv", why), ("cuBLAS", None)]
    many = onednn.refuses(x.contiguous(), weight)
    return [("gemv", gemv.refuses(x, weight)), ("oneDNN", many), ("PyTorch", None)]
