"""A padded batch through an encoder: Taut, PyTorch's fast path and transformers, over the same weights.

    python benchmarks/bench_encoder.py --json benchmarks/results/encoder.json

BERT-base with random weights, 32 rows of up to 512 tokens, of which 100, 73, 50 and 27 % are real; float16 on
a GPU. All run in this process, in turns, on the same ids and mask, from an idle device to an idle device:

- `taut`: the model as it loads; `taut int8` and `taut nf4`: the same weights in 8 and 4 bits
- `pytorch`: `nn.TransformerEncoder` with `src_key_padding_mask`, which takes its fast path over nested
  tensors (eval, inference mode), behind transformers' embedding
- `transformers`: with scaled_dot_product_attention

Each figure is a median over the rounds, with the smallest and the largest; `difference` is how far a
subject's hidden states of real tokens are from those of transformers, relative to the largest. `--shape tiny`
runs anywhere in seconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import taut
from taut.bench.measure import seconds
from taut.bench.report import describe, versions
from taut.bench.shapes import SHAPES
from taut.bench.subjects import quantized

BASE = SHAPES["bert-base"].config
TINY = BASE | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
CONFIGS = {"bert-base": BASE, "tiny": TINY}
FORMS = {
    "taut int8": {"load_in_8bit": True},
    "taut nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def grid(rows: int, width: int, share: float, device: torch.device) -> dict[str, Tensor]:
    """Ids and mask `[rows, width]` with a share of real tokens: row i of n has `width * (i / n) ** k`, and
    the longest is whole."""
    power = 1 / share - 1
    lengths = [max(1, round(width * ((row + 0.5) / rows) ** power)) for row in range(rows - 1)] + [width]
    ids = torch.randint(999, BASE["vocab_size"], (rows, width), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def fast_path(model: Any, ours: Any) -> Callable[..., Tensor]:
    """PyTorch's encoder behind transformers' embedding, with the weights of Taut's model: its fused
    projection is PyTorch's `in_proj_weight`."""
    c = model.config
    layer = nn.TransformerEncoderLayer(
        c.hidden_size,
        c.num_attention_heads,
        c.intermediate_size,
        activation="gelu",
        batch_first=True,
        layer_norm_eps=c.layer_norm_eps,
        device="meta",
    )
    encoder = nn.TransformerEncoder(layer, c.num_hidden_layers, enable_nested_tensor=True, mask_check=False)
    for theirs, block in zip(encoder.layers, ours.model.layers, strict=True):
        theirs.self_attn.in_proj_weight = block.self_attn.qkv_proj.weight
        theirs.self_attn.in_proj_bias = block.self_attn.qkv_proj.bias
        pairs = (
            (theirs.self_attn.out_proj, block.self_attn.o_proj),
            (theirs.norm1, block.after_attention_layernorm),
            (theirs.linear1, block.mlp.up_proj),
            (theirs.linear2, block.mlp.down_proj),
            (theirs.norm2, block.after_feedforward_layernorm),
        )
        for module, own in pairs:
            module.weight, module.bias = own.weight, own.bias
    encoder.eval()

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return encoder(model.embeddings(input_ids), src_key_padding_mask=attention_mask == 0)

    return run


def subjects(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[..., Tensor]]:
    """What is measured, by name: from ids and mask to hidden states `[rows, width, dim]`."""
    torch.manual_seed(0)
    own = transformers.AutoConfig.for_model(**config)
    theirs = (
        transformers.AutoModel.from_config(own, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    )
    ours = taut.to_bettertransformer(theirs)
    found = {"taut": ours, "pytorch": fast_path(theirs, ours), "transformers": theirs}
    for name, form in FORMS.items():
        found[name] = quantized(ours, taut.BitsAndBytesConfig(**form))
    return {
        name: run if name == "pytorch" else lambda run=run, **given: run(**given).last_hidden_state
        for name, run in found.items()
    }


@torch.inference_mode()
def measure(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    runs, points = subjects(CONFIGS[args.shape], dtype, device), []
    for share in args.real:
        given = grid(args.rows, args.length, share / 100, device)
        real = given["attention_mask"].bool()
        want = runs["transformers"](**given)[real].float()
        for name, run in runs.items():
            for _ in range(args.warm):
                got = run(**given)[real].float()
            points.append(
                {
                    "subject": name,
                    "real_percent": share,
                    "real_tokens": int(real.sum()),
                    "difference": float((got - want).abs().max() / want.abs().max()),
                    "ms": [],
                }
            )
        for _ in range(args.rounds):
            for point in points[-len(runs) :]:
                run = runs[point["subject"]]
                point["ms"].append(seconds(partial(run, **given), device) * 1e3)
    for point in points:
        samples = point["ms"]
        point |= {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
    return points


def show(report: dict[str, Any], shares: Sequence[float]) -> None:
    rows, width, device = report["rows"], report["length"], report["device"]["name"]
    table = Table(title=f"{report['shape']}, {rows} x {width}, {report['dtype']}, {device}: ms")
    for column in ("", *(f"{share:g} % real" for share in shares), "difference"):
        table.add_column(column, justify="right" if column else "left")
    for name in dict.fromkeys(point["subject"] for point in report["points"]):
        own = [point for point in report["points"] if point["subject"] == name]
        cells = [f"{p['median']:.2f} ({p['min']:.2f} to {p['max']:.2f})" for p in own]
        table.add_row(name, *cells, f"{max(p['difference'] for p in own):.1e}")
    Console(width=max(140, Console().width)).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=CONFIGS, default="bert-base")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--real", type=float, nargs="+", default=[100, 73, 50, 27], help="percent, of each case"
    )
    parser.add_argument("--rounds", type=int, default=20, help="counted rounds")
    parser.add_argument("--warm", type=int, default=5, help="uncounted runs of each subject and case")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16" if cuda else "float32"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    report = {
        "benchmark": "encoder",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": describe(device),
        "versions": versions(),
        "shape": args.shape,
        "rows": args.rows,
        "length": args.length,
        "dtype": args.dtype,
        "points": measure(args, getattr(torch, args.dtype), device),
    }
    show(report, args.real)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
