"""What a classifier's labels are called and mean, and the loss of its scores against them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.config import ModelConfig
from taut.errors import ConfigError, RequestError

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def relabelled(
    config: ModelConfig,
    *,
    num_labels: int | None = None,
    id2label: Mapping[Any, str] | None = None,
    label2id: Mapping[str, Any] | None = None,
    problem_type: str | None = None,
) -> ModelConfig:
    """`config` with other labels for a classifier, from their number, their names, or both; and what they
    mean to its loss. `ConfigError` where these disagree."""
    source = dict(config.source)
    if id2label is None and label2id is not None:
        id2label = {index: name for name, index in label2id.items()}
    if id2label is not None:
        id2label = {int(index): name for index, name in id2label.items()}
        if sorted(id2label) != list(range(len(id2label))):
            raise ConfigError(f"id2label has the ids {sorted(id2label)}; expected 0, 1, 2 ...")
        if label2id is not None and {n: int(i) for n, i in label2id.items()} != {
            name: index for index, name in id2label.items()
        }:
            raise ConfigError("label2id is not the reverse of id2label; leave one of them out")
        if num_labels not in (None, len(id2label)):
            raise ConfigError(f"num_labels is {num_labels}, and id2label has {len(id2label)} labels")
    elif num_labels is not None:
        if not isinstance(num_labels, int) or num_labels < 1:
            raise ConfigError(f"num_labels is {num_labels!r}; expected an integer >= 1")
        id2label = {index: f"LABEL_{index}" for index in range(num_labels)}
    if id2label is not None:
        source["id2label"] = {str(index): id2label[index] for index in sorted(id2label)}
        source["label2id"] = {name: index for index, name in sorted(id2label.items())}
        source.pop("num_labels", None)
    if problem_type is not None:
        if problem_type not in PROBLEMS:
            raise ConfigError(f"problem_type is {problem_type!r}; known: {', '.join(PROBLEMS)}")
        source["problem_type"] = problem_type
    return replace(config, source=source)


def problem(config: ModelConfig, labels: Tensor) -> str:
    """Which of `PROBLEMS` the labels of rows are: what the config says, else regression for one label, one of
    several for int64 and int32, and any of several for others."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    single = labels.dtype in (torch.int64, torch.int32)
    return "single_label_classification" if single else "multi_label_classification"


def row_loss(scores: Tensor, labels: Tensor, config: ModelConfig) -> Tensor:
    """Loss of `scores` `[rows, labels]`: mean squared error, cross-entropy or binary cross-entropy, as
    `problem` says. `labels` `[rows]`, or `[rows, labels]` where each label has a value of its own."""
    kind, labels = problem(config, labels), labels.to(scores.device)
    if kind == "single_label_classification":
        if labels.numel() != scores.shape[0]:
            raise RequestError(
                f"labels has shape {list(labels.shape)}; expected {[scores.shape[0]]}, one a row"
            )
        return F.cross_entropy(scores, labels.view(-1))
    if labels.numel() != scores.numel():
        raise RequestError(
            f"labels has shape {list(labels.shape)}, and this {kind} has scores {list(scores.shape)}"
        )
    wanted = labels.view_as(scores).to(scores.dtype)
    if kind == "regression":
        return F.mse_loss(scores, wanted)
    return F.binary_cross_entropy_with_logits(scores, wanted)


def token_loss(scores: Tensor, labels: Tensor, items: int | Tensor | None = None) -> Tensor:
    """Cross-entropy of `scores` `[tokens, labels]` against `labels` `[tokens]`, where they aren't -100: the
    mean, or the sum divided by `items`."""
    if items is None:
        return F.cross_entropy(scores, labels, ignore_index=-100)
    return F.cross_entropy(scores, labels, ignore_index=-100, reduction="sum") / items


def span_loss(scores: Tensor, positions: Tensor, real: Tensor) -> Tensor:
    """Cross-entropy of `scores` `[rows, width]` of the tokens of each row against `positions` `[rows]`, the
    columns of the right ones; a position outside of the row's tokens, which are those that are `real`
    `[rows, width]`, counts for nothing (an answer that was cut off)."""
    rows, width = scores.shape
    if positions.numel() != rows:
        raise RequestError(f"positions has shape {list(positions.shape)}; expected {[rows]}, one a row")
    at = positions.to(scores.device).view(-1)
    inside = (at >= 0) & (at < width) & real.gather(1, at.clamp(0, width - 1)[:, None]).squeeze(1)
    return F.cross_entropy(scores, at.where(inside, -100))


def warn_at_padding(labels: Tensor, attention_mask: Tensor | None) -> None:
    """Warn where `labels` `[rows, width]` name something to predict at padding. Nothing is computed there, so
    that they count for nothing; where padding is computed like all else, as in transformers, they count."""
    if attention_mask is None or labels.shape != attention_mask.shape:
        return
    if bool(((labels != -100) & (attention_mask.to(labels.device) == 0)).any()):
        warnings.warn(
            "labels are other than -100 at padding, where nothing is computed: the loss leaves them out; "
            "set them to -100: labels.masked_fill(attention_mask == 0, -100)",
            stacklevel=5,  # the line that called the model, past two of torch's own
        )
