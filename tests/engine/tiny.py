"""A small decoder in plain torch whose next token depends on the whole history, so cache mistakes show."""

from __future__ import annotations

import torch
from torch import Tensor

from taut.batch import Batch
from taut.config import Attn, Dynamic, Layer, LongRope, Mlp, ModelConfig, Norm, Rope

VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM = 61, 32, 4, 2, 8


class Tiny:
    """Two attention layers, read through pages one row at a time; float64, so that greedy ties can't flip.

    `boundary`: rows longer than this turn by other angles (as longrope does). `dynamic`: every token turns
    by angles of the length its row had when it was new (as NTK-aware scaling does).
    """

    def __init__(self, context: int = 128, boundary: int | None = None, dynamic: bool = False, seed: int = 0):
        scaling = None
        if boundary is not None:
            scaling = LongRope((1.0,) * 4, (2.0,) * 4, boundary, 1.0)
        elif dynamic:
            scaling = Dynamic(2.0, 4)
        rope = Rope(HEAD_DIM, 10000.0, scaling)
        layer = Layer(
            Attn(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, rope), Mlp(DIM, "silu"), Norm(1e-6), Norm(1e-6)
        )
        self.config = ModelConfig(
            "tiny", "Tiny", VOCAB, DIM, (layer, layer), Norm(1e-6), context, False, eos_token_ids=(0,)
        )
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.boundary, self.dynamic = boundary, dynamic
        self.calls: list[Batch] = []
        draw = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.5

        self.embed = weight(VOCAB, DIM) * DIM**0.5
        self.layers = [
            (
                weight(HEADS * HEAD_DIM, DIM) * 2,
                weight(KV_HEADS * HEAD_DIM, DIM),
                weight(KV_HEADS * HEAD_DIM, DIM),
                weight(DIM, HEADS * HEAD_DIM) * 2,
            )
            for _ in self.config.layers
        ]
        self.head = weight(VOCAB, DIM) * 4

    def decoder(self, batch: Batch) -> Tensor:
        self.calls.append(batch)
        x = self.embed[batch.ids]  # [tokens, dim]
        counts = batch.starts.diff().long()
        speed = torch.ones(len(x), dtype=torch.float64)
        totals = batch.totals.repeat_interleave(counts)
        if self.boundary is not None:
            speed[totals > self.boundary] = 0.5
        if self.dynamic:
            speed = 4.0 / totals.clamp(min=4)
        kv = batch.kv
        for index, (wq, wk, wv, wo) in enumerate(self.layers):
            norm = x / x.norm(dim=-1, keepdim=True) * DIM**0.5
            q, k, v = ((norm @ w.T).unflatten(-1, (-1, HEAD_DIM)) for w in (wq, wk, wv))
            angle = (
                batch.positions[:, None, None] * speed[:, None, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
            )
            q, k = (_turn(t, angle) for t in (q, k))
            kv.keys[index].view(-1, KV_HEADS, HEAD_DIM)[kv.slots] = k
            kv.values[index].view(-1, KV_HEADS, HEAD_DIM)[kv.slots] = v
            out = []
            for row in range(batch.rows):
                begin, end = batch.starts[row : row + 2].tolist()
                length = int(kv.lengths[row])
                table = kv.pages[row, : -(-length // kv.page_size)].long()
                keys, values = (
                    cache[table].flatten(0, 1)[:length].repeat_interleave(HEADS // KV_HEADS, 1)
                    for cache in (kv.keys[index], kv.values[index])
                )
                scores = torch.einsum("qhd,khd->hqk", q[begin:end], keys)
                seen = torch.arange(length) <= batch.positions[begin:end, None]
                weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
                out.append(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
            x = x + torch.cat(out) @ wo.T
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return (hidden / hidden.norm(dim=-1, keepdim=True) * DIM**0.5 @ self.head.T).float()


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
