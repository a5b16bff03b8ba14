"""GGUF files for tests: tiny transformers models converted as llama.cpp converts them, and raw bytes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


def convert(model: Any, path: Path, quantization: gguf.GGMLQuantizationType | None = None) -> None:
    """Writes a transformers model the way llama.cpp's convert_hf_to_gguf.py does, in float32, or with its
    matrices quantized."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    gemma = config.model_type.startswith("gemma")

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(0)
    if config.model_type != "phi3" and (gemma or head_dim * config.num_attention_heads != config.hidden_size):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if not gemma:
        writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type in ("llama", "smollm3", "phi3", "mistral"):
        writer.add_rope_dimension_count(rope_dim)
    if config.model_type in ("gemma2", "phi3", "mistral"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _rope_settings(writer, model, rope_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for add, token in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, config.eos_token_id),
        (writer.add_pad_token_id, config.pad_token_id),
    ):
        if token is not None:
            add(token)

    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.SMOLLM3):
            if ".q_proj." in name:
                value = interleave(value, config.num_attention_heads)
            elif ".k_proj." in name:
                value = interleave(value, config.num_key_value_heads)
        if gemma and name.endswith("norm.weight"):
            value = value + 1
        stem, suffix = name.rsplit(".", 1)
        data = value.float().numpy()
        if quantization is not None and data.ndim == 2:
            writer.add_tensor(
                f"{names.get_name(stem)}.{suffix}",
                gguf.quants.quantize(data, quantization),
                raw_dtype=quantization,
            )
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: Tensor, heads: int) -> Tensor:
    """LlamaModel.permute of llama.cpp: rows (half, i) of a head to (i, half)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
        .contiguous()
    )


def _rope_settings(writer: gguf.GGUFWriter, model: Any, dim: int) -> None:
    config = model.config
    rope = config.rope_parameters
    kind = rope["rope_type"]
    original = rope.get("original_max_position_embeddings")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(original)
    elif kind == "llama3":
        # What each frequency is divided by, taken from the model itself.
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original or config.original_max_position_embeddings)
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(model.model.rotary_emb.attention_scaling)
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


# ------------------------------------------------------------------------------------------- raw bytes


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def text_entry(key: str, value: str) -> bytes:
    return entry(key, 8, string(value))


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """One tensor's header; `shape` in torch's order."""
    dims = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def assemble(
    entries: list[bytes],
    infos: list[bytes],
    data: bytes,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file from its parts; counts that are not given are the true ones."""
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    head += b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data
