"""transformers as a peer: the same weights under its own modules, one subject for each attention."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from taut.bench.cases import Inputs
from taut.bench.measure import synchronize
from taut.bench.subjects import check_count
from taut.errors import RequestError, nearest
from taut.quant.base import Packed
from taut.quant.int8 import Int8

# Attention of transformers -> the name that charts show.
ATTENTIONS: Mapping[str, str] = MappingProxyType(
    {
        "eager": "transformers eager",
        "sdpa": "transformers sdpa",
        "flash_attention_2": "transformers flash-attn",
    }
)
PEERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"none": (), "sdpa": ("sdpa",), "transformers": ("eager", "sdpa"), "all": tuple(ATTENTIONS)}
)

# What config.json says of the file that it lies beside, and not of the model.
_OF_THE_FILE = ("model_type", "transformers_version", "quantization_config", "_name_or_path", "auto_map")


def require(peers: str, *, packed: bool = False) -> None:
    """`RequestError` for a name of `--peers` that is unknown, and where transformers, or bitsandbytes for
    `packed` weights, is not installed."""
    if peers not in PEERS:
        raise RequestError(f"--peers is {peers!r}; known: {', '.join(PEERS)}{nearest(peers, PEERS)}")
    if PEERS[peers] and importlib.util.find_spec("transformers") is None:
        raise RequestError(
            f"--peers {peers} needs transformers, which is not installed; pip install transformers, or "
            "measure Taut alone with --peers none"
        )
    if PEERS[peers] and packed and importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError(
            f"--load-in with --peers {peers} needs bitsandbytes, which is not installed; pip install "
            "bitsandbytes, or measure Taut alone with --peers none"
        )


def attentions(peers: str, *, dtype: torch.dtype, device: torch.device) -> tuple[list[str], list[str]]:
    """The attentions that `peers` asks for and that can run, and a note for each that can't."""
    wanted = list(PEERS[peers])
    notes = []
    if "flash_attention_2" in wanted:
        why = None
        if importlib.util.find_spec("flash_attn") is None:
            why = "flash-attn is not installed"
        elif device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
            why = "flash-attn takes float16 and bfloat16 on a GPU"
        if why is not None:
            wanted.remove("flash_attention_2")
            notes.append(f"transformers with flash_attention_2 is left out: {why}")
    return wanted, notes


class Transformers:
    """A transformers model under measurement."""

    def __init__(self, model: Any, attention: str, *, form: str | None = None, all_logits: bool = False):
        self.model = model
        self.name = ATTENTIONS[attention] if form is None else f"{ATTENTIONS[attention]} {form}"
        held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers(), *_scales(model))}
        self.weights_bytes = sum(held.values())
        self.generates = model.can_generate()
        self._options: dict[str, Any] = {}
        if self.generates:
            self._options = {"use_cache": False} if all_logits else {"use_cache": False, "logits_to_keep": 1}
            # Random weights may well say that the text ends; rates need all tokens that were asked for.
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0

    def forward(self, inputs: Inputs) -> Any:
        return self.model(input_ids=inputs.ids, attention_mask=inputs.mask, **self._options)

    def generate(self, inputs: Inputs, new_tokens: int, stopping_criteria: Any = None) -> Tensor:
        out = self.model.generate(
            input_ids=inputs.ids,
            attention_mask=torch.ones_like(inputs.ids) if inputs.mask is None else inputs.mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=stopping_criteria,
        )
        return check_count(self.name, out, inputs, new_tokens)

    def decode(self, inputs: Inputs, new_tokens: int, uncounted: int) -> float:
        width = inputs.ids.shape[1]
        times: list[float] = []

        def stamp(ids: Tensor, scores: Any, **_: Any) -> Tensor:  # a criterion is asked after every token
            if ids.shape[1] - width in (uncounted, new_tokens):
                synchronize(ids.device)
                times.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        self.generate(inputs, new_tokens, [stamp])
        return times[1] - times[0]


def make_peers(
    wanted: Sequence[str],
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    auto: str,
    dtype: torch.dtype,
    device: torch.device,
    packed: Mapping[str, Packed] = MappingProxyType({}),
    form: str | None = None,
    all_logits: bool = False,
) -> tuple[list[Transformers], list[str]]:
    """One subject for each attention in `wanted`: `config` is what config.json says, `state` the weights
    under the names of transformers' modules. The subjects compute with the very tensors of `state`, and
    through bitsandbytes with those of `packed`, which take the place of linear layers. `form` is added to
    their names. Also a note for each attention that transformers does not have for the family.

    `RequestError` where transformers does not know the family, or names its weights otherwise.
    """
    if not wanted:
        return [], []
    import transformers

    transformers.logging.set_verbosity_error()
    options = {key: value for key, value in config.items() if key not in _OF_THE_FILE}
    found, notes = [], []
    for attention in wanted:
        try:
            own = transformers.AutoConfig.for_model(config["model_type"], **options)
        except ValueError as error:
            raise RequestError(
                f"transformers {transformers.__version__} does not know the family {config['model_type']!r} "
                f"({error}); measure Taut alone with --peers none"
            ) from None
        try:
            with _parameters_on_meta():
                made = getattr(transformers, auto)
                model = made.from_config(own, dtype=dtype, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            reason = str(error).strip().partition(". ")[0]
            notes.append(f"transformers with {attention} is left out: {reason}")
            continue
        for name, matrix in packed.items():
            _pack(model, name.removesuffix(".weight"), matrix, dtype)
        _fill(model, dict(state), packed)
        found.append(Transformers(model.to(device).eval(), attention, form=form, all_logits=all_logits))
    return found, notes


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside the block new parameters take no memory; buffers, which files don't hold, are made as always."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is has been here before: it is tied
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _pack(model: nn.Module, name: str, matrix: Packed, dtype: torch.dtype) -> None:
    """Let bitsandbytes compute the linear layer `name` with a matrix of Taut's, in the same memory."""
    from bitsandbytes import nn as bnb

    parts = matrix.stored(dtype)
    codes = parts.pop("weight")
    old = model.get_submodule(name)
    size = {"input_features": matrix.in_features, "output_features": matrix.out_features}
    size["bias"] = getattr(old, "bias", None) is not None
    with _parameters_on_meta():
        if isinstance(matrix, Int8):
            new = bnb.Linear8bitLt(**size, has_fp16_weights=False, threshold=matrix.threshold)
        else:
            new = bnb.Linear4bit(**size, compute_dtype=matrix.compute or dtype, quant_type=matrix.kind)
    if isinstance(matrix, Int8):
        weight = bnb.Int8Params(codes, requires_grad=False, CB=codes, SCB=parts["SCB"])
    else:
        weight = bnb.Params4bit.from_prequantized(codes, parts, device=codes.device, module=new)
    new.register_parameter("weight", weight)
    model.set_submodule(name, new)


def _scales(model: nn.Module) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside its codes."""
    for param in model.parameters():
        state = getattr(param, "quant_state", None)
        found = [getattr(param, "SCB", None), getattr(state, "absmax", None)]
        found.append(getattr(getattr(state, "state2", None), "absmax", None))
        yield from (tensor for tensor in found if tensor is not None)


def _fill(model: nn.Module, state: dict[str, Tensor], packed: Collection[str] = ()) -> None:
    """Put the tensors of `state` in place of the model's empty parameters, all but the `packed` ones."""
    names = dict(model.named_parameters(remove_duplicate=False))
    names = {name: param for name, param in names.items() if name not in packed}
    prefix = f"{model.base_model_prefix}."
    if not any(name.startswith(prefix) for name in names):  # a model without a head has its modules on top
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name in names.keys() - state.keys():  # a tied head is the embedding, which files hold once
        twin = next((other for other in state if names.get(other) is names[name]), None)
        if twin is not None:
            state[name] = state[twin]
    missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unexpected:
        raise RequestError(
            f"transformers' {type(model).__name__} names its weights otherwise than checkpoints do: it has "
            f"{', '.join(missing[:3]) or 'no others'} where they have {', '.join(unexpected[:3]) or 'none'}; "
            "measure Taut alone with --peers none"
        )
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        setattr(model.get_submodule(path), kind, nn.Parameter(tensor, requires_grad=False))
