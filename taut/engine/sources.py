"""What an encoder reads and what its decoder begins with, as users give them to `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taut.engine.generation import GenerationConfig
from taut.errors import RequestError

Read = Callable[..., tuple[Tensor, list[list[int]]]]  # `read_prompts`, less what is the same for a call


def read_sources(
    inputs: Any, attention_mask: Any, encoder_outputs: Any, *, dim: int, read: Read
) -> list[tuple[int, ...] | Tensor]:
    """What the encoder of each row reads, token ids of `inputs`; or in their place its hidden states
    `[length, dim]`, from `encoder_outputs`. Both are padded as `attention_mask` says."""
    if encoder_outputs is None:
        return [tuple(row) for row in read(inputs, attention_mask)[1]]
    states = encoder_states(encoder_outputs, dim)
    if attention_mask is None:
        return list(states)
    mask = torch.as_tensor(attention_mask, device=states.device) != 0
    if mask.shape != states.shape[:2]:
        raise RequestError(
            f"attention_mask has shape {tuple(mask.shape)} and encoder_outputs {tuple(states.shape)}; they "
            "must agree: 1 for a token, 0 for padding"
        )
    return [row[real] for row, real in zip(states, mask, strict=True)]


def encoder_states(encoder_outputs: Any, dim: int) -> Tensor:
    """The hidden states `[rows, width, dim]` in what an encoder gave: an output, a tuple or they alone."""
    states = encoder_outputs
    if not isinstance(states, Tensor):
        states = getattr(encoder_outputs, "last_hidden_state", None)
        if states is None and isinstance(encoder_outputs, list | tuple) and encoder_outputs:
            states = encoder_outputs[0]
    if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[-1] != dim:
        shape = list(states.shape) if isinstance(states, Tensor) else type(encoder_outputs).__name__
        raise RequestError(
            f"encoder_outputs is {shape}; expected what the encoder gives, its last_hidden_state "
            f"[rows, width, {dim}] first"
        )
    return states


def read_beginnings(
    config: GenerationConfig, rows: int, inputs: Any, attention_mask: Any, *, device: torch.device, read: Read
) -> tuple[Tensor, list[list[int]]]:
    """What the decoder of each row begins with, padded `[rows, width]` and without padding: the start token,
    and behind it `inputs`, the `decoder_input_ids`, which may have it themselves."""
    starts = _starts(config, rows)
    first = torch.tensor(starts, device=device).view(rows, 1)
    if inputs is None:
        return first, [[token] for token in starts]
    given, prompts = read(inputs, attention_mask, name="decoder_input_ids")
    if len(prompts) != rows:
        raise RequestError(f"decoder_input_ids has {len(prompts)} rows, and the encoder reads {rows}")
    if all(prompt[0] != start for prompt, start in zip(prompts, starts, strict=True)):
        given = torch.cat((first.to(given.device), given), 1)
        prompts = [[start, *prompt] for prompt, start in zip(prompts, starts, strict=True)]
    return given, prompts


def _starts(config: GenerationConfig, rows: int) -> list[int]:
    """The start token of each row."""
    start = config.decoder_start_token_id
    start = config.bos_token_id if start is None else start
    if start is None:
        raise RequestError(
            "the model names no token that its decoder starts with. Next step: pass decoder_start_token_id"
        )
    if isinstance(start, int):
        return [start] * rows
    if len(start) != rows:
        raise RequestError(f"decoder_start_token_id has {len(start)} tokens for {rows} rows; give one each")
    return list(start)
