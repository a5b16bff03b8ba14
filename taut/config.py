"""What a model is, as frozen dataclasses, and the strict `Reader` that a family reads `config.json` with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from taut.errors import ConfigError, nearest
from taut.kernels.act import ACTIVATIONS

T = TypeVar("T")
_REQUIRED: Any = object()

DTYPES = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
)

# Hugging Face names of activations -> the names in `kernels.act`.
_ACTIVATION_ALIASES = MappingProxyType(
    {
        "swish": "silu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "quick_gelu": "gelu_quick",
        "relu_squared": "relu2",
    }
)


@dataclass(frozen=True)
class Norm:
    """Normalisation over the last dimension. `kind` is "rms" or "layer"; the effective weight is
    `weight + offset` (Gemma stores its weights less one); `bias` is LayerNorm's alone."""

    eps: float
    kind: str = "rms"
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class Linear:
    """`linear`: positions divided by `factor` (position interpolation)."""

    factor: float


@dataclass(frozen=True)
class Dynamic:
    """`dynamic`: NTK-aware base that grows with each row's own length beyond `context` tokens."""

    factor: float
    context: int


@dataclass(frozen=True)
class Llama3:
    """`llama3`: wavelengths beyond `context / low` divided by `factor`, smoothly between `low` and `high`."""

    factor: float
    low: float
    high: float
    context: int


@dataclass(frozen=True)
class Yarn:
    """`yarn` (Peng et al. 2023): per-frequency blend of interpolation and extrapolation; cos and sin are
    multiplied by `attention_factor`."""

    factor: float
    context: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float


@dataclass(frozen=True)
class LongRope:
    """`longrope` (Ding et al. 2024): one divisor per frequency, `short` for rows of at most `context`
    tokens, `long` for longer ones; cos and sin are multiplied by `attention_factor`."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    context: int
    attention_factor: float


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `dim` features of each head (Su et al. 2021). Features turn
    in pairs: i with `i + dim / 2`, or, `interleaved`, `2 i` with `2 i + 1`."""

    dim: int
    theta: float
    scaling: Linear | Dynamic | Llama3 | Yarn | LongRope | None = None
    interleaved: bool = False


# The context of a model whose positions are relative: as many as 32 bits count.
UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Positions:
    """A vector for each absolute position: position p is row `p + offset` of a table of `count + offset`
    rows. It is learned, or `sinusoidal` (Vaswani et al. 2017), the sines first and then the cosines."""

    count: int
    offset: int = 0
    sinusoidal: bool = False


@dataclass(frozen=True)
class Relative:
    """A learned bias for each head and bucket of distances from query to key (T5; Raffel et al. 2020): near
    distances have a bucket each, farther ones share them, all from `reach` on the last. `both`: keys behind
    and ahead have buckets of their own; otherwise those ahead are never seen."""

    buckets: int
    reach: int
    both: bool


@dataclass(frozen=True)
class LayerScale:
    """A learned factor for each feature, all `initial` at first (Touvron et al. 2021)."""

    initial: float


@dataclass(frozen=True)
class Patches:
    """How a picture of `image` pixels (height, width) and so many `channels` becomes tokens: one for each of
    its patches of `size` pixels, a `stride` apart (None: side by side), projected with a `bias` or without;
    `prefix` learned ones stand ahead of them. All have learned `positions`, which for pictures of other sizes
    are interpolated, on request or, `elastic`, by themselves.

    `hidden`: there is a learned token for patches that are left out, which files keep under so many leading
    dimensions; `flat`: those of prefix and positions have none.
    """

    image: tuple[int, int]
    size: tuple[int, int]
    channels: int
    prefix: int = 1
    bias: bool = True
    positions: bool = True
    elastic: bool = False
    hidden: int | None = None
    flat: bool = False
    stride: tuple[int, int] | None = None

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches of a picture of so many pixels, in rows and columns."""
        (down, across), (high, wide) = self.stride or self.size, self.size
        return (height - high) // down + 1, (width - wide) // across + 1

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a picture, in rows and columns."""
        return self.grid_of(*self.image)

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Waves:
    """How a waveform becomes tokens: by convolutions of so many `channels` each, with these `kernels` and
    `strides`, a `bias` or none, and an activation `act`; `normed` by channel and clip behind the first
    ("group") or by frame behind each ("layer"). Frames get a `norm` and are projected; what a convolution of
    `positions` (kernel, groups) makes of their neighbours is added.

    `hidden`: there is a learned token for frames that are left out; `features_given`: outputs have the
    frames.
    """

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    bias: bool
    act: str
    normed: str
    norm: Norm | None
    positions: tuple[int, int]
    hidden: bool
    features_given: bool = True

    @property
    def step(self) -> int:
        """Samples from the beginning of one frame to that of the next."""
        return math.prod(self.strides)


@dataclass(frozen=True)
class Ctc:
    """How the losses of clips become one: "sum" or "mean"; `zero_infinity`: a clip with more characters than
    frames counts nothing."""

    reduction: str
    zero_infinity: bool


@dataclass(frozen=True)
class Grid:
    """A learned bias for each head and distance between two patches of a picture, down and across, of `size`
    rows and columns, and for the token ahead of them (BEiT; Bao et al. 2021). `shared`: by all layers."""

    size: tuple[int, int]
    shared: bool


@dataclass(frozen=True)
class Features:
    """Integers that come with each token under the argument `given` (its type, its task, the edges of its
    box), one for each of `tables`: the name and rows of the table of learned vectors that it is looked up in.
    Tables of one name are one."""

    given: str
    tables: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Transform:
    """`norm(act(dense(x)))`; a missing norm is the identity."""

    act: str
    norm: Norm | None = None
    bias: bool = True


@dataclass(frozen=True)
class Probe:
    """A learned query that attends to all tokens, and an MLP behind it, which reads what `norm` gives."""

    attn: Attn
    mlp: Mlp
    norm: Norm


@dataclass(frozen=True)
class Pooler:
    """One vector of a row's tokens, then what `after` makes of it, of `size` features (None: as many). Of a
    picture it is that `of` the "first" token, the mean of the "prefix" or of the "patches", or what a `Probe`
    finds; of a text that of its first "eos" token, the first with the "highest" id or the "last".
    """

    of: str | Probe
    after: Transform | Norm | None = None
    size: int | None = None


@dataclass(frozen=True)
class Heads:
    """What stands between a model's hidden states and the last product of each of its heads; None: nothing.

    `pooler`: of a row's first token, gives `pooler_output`; the classes `pooled` have one. `masked`: before
    the logits of a masked token, which are those of the embedding. `sequence`: of the vector that `pooling`
    ("first", "mean" or "last") makes of a row, where the class has no pooler. `token`, `span`: of each token.
    `bias`: whether the product that classifies a row has one.

    A picture's `pooler` is a `Pooler`; it is classified by what that gives, or, as `pooling` says, by its
    "first" token, the mean of its "patches", or both at once ("first, patches"). `projection`: the features
    to which vectors are projected that are compared with those of the other kind, or frames before a clip is
    classified; `all_layers`: by a learned mean of all hidden states. `ctc`: the loss of frames' characters.
    """

    pooler: Transform | Pooler | None = None
    pooled: tuple[str, ...] = ("Model", "ForSequenceClassification")
    masked: Transform | None = None
    sequence: Transform | None = None
    pooling: str = "first"
    token: Transform | None = None
    span: Transform | None = None
    bias: bool = True
    projection: int | None = None
    all_layers: bool = False
    ctc: Ctc | None = None


@dataclass(frozen=True)
class Attn:
    """Grouped-query attention.

    `window`: a query sees itself and the `window - 1` tokens before it. `qk_norm` normalises queries and
    keys, each `qk_norm_of` a "head" with one weight for all, "own head" with a weight each, or "all" heads as
    one vector. `slopes`: ALiBi (Press et al. 2022), one a head. `clip` bounds the fused projection's output.
    `sinks`: a learned score a head, as of one more key without a value (Xiao et al. 2023). `relative`: the
    bias of distances, whose weights all layers with it share, `gated` by each query (WavLM; Chen et al.
    2021); `grid`: that of a picture's patches. `k_bias`: where the projection has biases, so have keys.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_of: str = "head"
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    clip: float | None = None
    causal: bool = True
    sinks: bool = False
    relative: Relative | None = None
    gated: bool = False
    grid: Grid | None = None
    k_bias: bool = True


@dataclass(frozen=True)
class Mlp:
    """Feed-forward: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where it isn't `gated`."""

    hidden: int
    act: str
    bias: bool = False
    gated: bool = True


@dataclass(frozen=True)
class Moe:
    """Mixture of experts: gated MLPs of `hidden`, of which each token is given to the `chosen` best of
    `experts`, weighted by the router's softmax (`normalised`: over the chosen alone); and a gated MLP of
    `shared`, under a gate of its own, that all tokens pass. `bias`: the router and the experts have them.
    `limit`: the gate is at most that and up within it on both sides, and up gets 1 added (GPT-OSS)."""

    experts: int
    chosen: int
    hidden: int
    act: str
    normalised: bool = False
    shared: int | None = None
    bias: bool = False
    limit: float | None = None


@dataclass(frozen=True)
class Layer:
    """One block: `x = after(x + scale * post(attn(pre(x))))`, then the same with the MLP; a missing norm is
    the identity, and a `post` may be a learned factor. `parallel`: attention and MLP both read the x that
    enters, and add to it; without a `pre_mlp` the MLP reads what `pre_attn` gives. `cross`: between the two,
    attention to what an encoder gave, with norms of its own."""

    attn: Attn
    mlp: Mlp | Moe
    pre_attn: Norm | None
    pre_mlp: Norm | None
    post_attn: Norm | LayerScale | None = None
    post_mlp: Norm | LayerScale | None = None
    after_attn: Norm | None = None
    after_mlp: Norm | None = None
    scale: float | None = None
    parallel: bool = False
    cross: Attn | None = None
    pre_cross: Norm | None = None
    after_cross: Norm | None = None


@dataclass(frozen=True)
class Pairing:
    """How a decoder goes with its `encoder`. `shared`: both look tokens up in one table. What comes before a
    row's first token is the start token or, `start_is_last`, the last one of the row (mBART's language).
    `repeats`: without inputs the decoder reads those of the encoder, shifted right. Embeddings given to the
    decoder in place of tokens are multiplied by `embeds_scale`."""

    encoder: ModelConfig
    shared: bool = True
    start_is_last: bool = False
    repeats: bool = False
    embeds_scale: float | None = None


@dataclass(frozen=True)
class Contrast:
    """How texts and pictures, of an encoder each, are compared: by the cosine of what their poolers give,
    projected to `dim` features (None: as they are), times a learned scale; for a `sigmoid` plus a learned
    bias."""

    text: ModelConfig
    vision: ModelConfig
    dim: int | None
    sigmoid: bool


@dataclass(frozen=True)
class ModelConfig:
    """A whole model, a "decoder", an "encoder" or an "encoder-decoder" by its `kind`. `context` is in tokens;
    `source` is the `config.json` it was read from, `names` what it calls keys that others call by the usual
    name, and `unused` lists the keys of it that nothing read or ignored by name.

    Of an encoder-decoder this is the decoder, and `pairing` says what its layers' `cross` attends to.
    `decoder_start_token_id` comes before the first token that it generates.

    The embedding table has rows of `embed_dim`, times `embed_scale`; another `embed_dim` than `dim` is
    projected to `dim` on the way in and back on the way out. Whatever enters is multiplied by `input_scale`,
    then come `positions` and `embed_norm`. Logits are those of the head times `logit_scale`.

    An encoder adds `positions` and `features` to the embedding, in `embed_dim`; then come `embed_norm` and,
    where there is an `embed_dim`, the projection to `dim`. `weights_of` names for each layer the first one
    with the same weights.

    `patches`: how a picture becomes the tokens of an image encoder; `waves`: a waveform those of a speech
    encoder; `mel_bins`: the bands of the spectrograms that an encoder hears. `contrast`: the encoders of a
    model of texts and pictures, of which this is the texts'.

    Looking up the token `padding` teaches its vector nothing (`padding_row`): in most families that is the
    padding token, in others there is none. `wide`: between blocks a float16 model is
    float32, since what they add up to is too large.
    """

    model_type: str
    architecture: str
    vocab_size: int
    dim: int
    layers: tuple[Layer, ...]
    norm: Norm | None
    context: int
    tied: bool
    embed_dim: int | None = None
    embed_scale: float | None = None
    input_scale: float | None = None
    positions: Positions | None = None
    embed_norm: Norm | None = None
    padding: int | None = None
    wide: bool = False
    head_bias: bool = False
    logit_scale: float | None = None
    logit_softcap: float | None = None
    kind: str = "decoder"
    features: tuple[Features, ...] = ()
    weights_of: tuple[int, ...] | None = None
    heads: Heads = Heads(pooling="last", bias=False)
    pairing: Pairing | None = None
    decoder_start_token_id: int | None = None
    patches: Patches | None = None
    mel_bins: int | None = None
    waves: Waves | None = None
    contrast: Contrast | None = None
    dtype: torch.dtype | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    names: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    unused: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        # Programs read `model.config.hidden_size` and the like: what config.json says, under its names.
        source, names = self.__dict__.get("source", {}), self.__dict__.get("names", {})
        key = name if name in source else names.get(name)
        if name.startswith("__") or key not in source:
            raise AttributeError(f"the config has no {name!r}{nearest(name, [*source, *names])}")
        return source[key]

    @property
    def encoder(self) -> ModelConfig | None:
        """What a decoder's cross-attention attends to."""
        return None if self.pairing is None else self.pairing.encoder

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples that a frame of a speech encoder is behind the one before it."""
        if self.waves is None:
            raise AttributeError  # `__getattr__` says the rest
        return self.waves.step

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it is a decoder that attends to an encoder."""
        return self.pairing is not None

    @property
    def use_cache(self) -> bool:
        """What `config.json` says; in Taut a forward keeps what it is asked to keep, whatever this is."""
        return self.source.get("use_cache", True)

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each label of a classifier."""
        named = self.source.get("id2label")
        if named is not None:
            return {int(index): name for index, name in named.items()}
        return {index: f"LABEL_{index}" for index in range(self.source.get("num_labels", 2))}

    @property
    def label2id(self) -> dict[str, int]:
        """The reverse of `id2label`."""
        return {name: index for index, name in self.id2label.items()}

    @property
    def num_labels(self) -> int:
        """How many labels a classifier has."""
        return len(self.id2label)

    @property
    def problem_type(self) -> str | None:
        """What a classifier's labels mean to its loss: "regression", "single_label_classification",
        "multi_label_classification", or None for what labels and their count say."""
        return self.source.get("problem_type")

    @property
    def rope_boundary(self) -> int | None:
        """Length in tokens past which a row's cached keys must be computed again, since all of them turn
        by other angles from there on (longrope); None for every other model."""
        ropes = {layer.attn.rope for layer in self.layers if layer.attn.rope is not None}
        bounds = [rope.scaling.context for rope in ropes if isinstance(rope.scaling, LongRope)]
        return min(bounds) if bounds else None


# What programs set in the config of a model that there is. `use_cache` changes nothing.
SETTABLE = (
    *("bos_token_id", "decoder_start_token_id", "eos_token_id", "id2label", "label2id", "name_or_path"),
    *("pad_token_id", "problem_type", "use_cache"),
)


def _set(config: ModelConfig, name: str, value: Any) -> None:
    """`config.name = value`, under the name in `config.json`."""
    if name not in SETTABLE:
        raise ConfigError(
            f"config.{name} can't be changed: models are made for it; give from_pretrained {name}={value!r}. "
            f"What can be: {', '.join(SETTABLE)}"
        )
    if name == "label2id":
        name, value = "id2label", {index: label for label, index in value.items()}
    if name == "id2label":
        value = {str(index): label for index, label in value.items()}
        if len(value) != config.num_labels:
            raise ConfigError(
                f"id2label has {len(value)} labels, and the model scores {config.num_labels}; give "
                "from_pretrained num_labels or id2label for a head of another size"
            )
        config.source["label2id"] = {label: int(index) for index, label in value.items()}
    config.source[name] = value
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if name == "eos_token_id":
        object.__setattr__(config, "eos_token_ids", ids)
    elif name.endswith("_token_id"):
        object.__setattr__(config, name, ids[0] if ids else None)


ModelConfig.__setattr__ = _set  # which a frozen dataclass can't define


class Reader:
    """Reads a `config.json` so that every key is used, ignored by name or reported.

    A key set to null counts as absent. Each getter raises `ConfigError` naming file, key, value and what
    would be right; `unused()` lists what nothing asked for.
    """

    def __init__(self, data: Mapping[str, Any], source: str = "config.json"):
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source}: expected a JSON object, got {type(data).__name__}")
        self.data = data
        self.source = source
        self.names: dict[str, str] = {}
        self._seen: set[str] = set()
        self._sections: list[Reader] = []

    def rename(self, **names: str) -> None:
        """Read a key that most families have (`hidden_size`) under the name that this file gives it
        (`n_embd`), where it does."""
        self.names.update({key: own for key, own in names.items() if own in self.data})

    def _own(self, key: str) -> str:
        return self.names.get(key, key)

    def has(self, key: str) -> bool:
        """Whether `key` is present and not null (does not count as using it)."""
        return self.data.get(self._own(key)) is not None

    def _get(self, key: str, default: T, accept: tuple[type, ...], kind: str) -> Any | T:
        key = self._own(key)
        self._seen.add(key)
        value = self.data.get(key)
        if value is None:
            if default is _REQUIRED:
                hint = nearest(key, self.data)
                raise ConfigError(f"{self.source}: {self._own(key)!r} is missing ({kind} expected){hint}")
            return default
        if not isinstance(value, accept) or (isinstance(value, bool) and not {bool, object} & {*accept}):
            raise ConfigError(f"{self.source}: {self._own(key)!r} is {value!r}; expected {kind}")
        return value

    def value(self, key: str, default: T = None) -> Any | T:
        """What stands there, unchecked."""
        return self._get(key, default, (object,), "any value")

    def int(self, key: str, default: T = _REQUIRED, *, minimum: int = 1) -> int | T:
        value = self._get(key, default, (int, float), "an integer")
        if value is default:
            return default
        if value != int(value) or value < minimum:
            raise ConfigError(
                f"{self.source}: {self._own(key)!r} is {value!r}; expected an integer >= {minimum}"
            )
        return int(value)

    def divisor(self, key: str, of: int) -> int:
        """An integer that divides `of`, which is also the default."""
        value = self.int(key, of)
        if of % value:
            raise ConfigError(f"{self.source}: {self._own(key)!r} is {value}, which does not divide {of}")
        return value

    def float(self, key: str, default: T = _REQUIRED, *, positive: bool = True) -> float | T:
        value = self._get(key, default, (int, float), "a number")
        if value is default:
            return default
        if positive and not 0 < value < float("inf"):
            raise ConfigError(f"{self.source}: {self._own(key)!r} is {value!r}; expected a number > 0")
        return float(value)

    def bool(self, key: str, default: T = _REQUIRED) -> bool | T:
        return self._get(key, default, (bool,), "true or false")

    def str(self, key: str, default: T = _REQUIRED) -> str | T:
        return self._get(key, default, (str,), "a string")

    def list(self, key: str, default: T = _REQUIRED, *, length: int | None = None) -> list | T:
        value = self._get(key, default, (list, tuple), "a list")
        if value is not default and length is not None and len(value) != length:
            raise ConfigError(
                f"{self.source}: {self._own(key)!r} has {len(value)} entries; expected {length}"
            )
        return value

    def choice(self, key: str, known: Mapping[str, T] | Sequence[str], default: Any = _REQUIRED) -> Any:
        """The value of `known` (or the name itself, for a sequence) that the string at `key` names."""
        value = self.str(key, default)
        if value not in known:
            raise ConfigError(
                f"{self.source}: {self._own(key)!r} is {value!r}; known: {', '.join(sorted(known))}"
                f"{nearest(value, known)}"
            )
        return known[value] if isinstance(known, Mapping) else value

    def section(self, key: str, defaults: Mapping[str, Any] | None = None) -> Reader | None:
        """A Reader of the object at `key`, with `defaults` for what it leaves out, which may be all of it;
        what it leaves unused is reported as `key.inner`."""
        value = self._get(key, None, (dict, Mapping), "an object")
        if value is None and defaults is None:
            return None
        given = {name: one for name, one in (value or {}).items() if one is not None}
        inner = Reader({**(defaults or {}), **given}, f"{self.source}: {key}")
        inner._prefix = f"{key}."
        self._sections.append(inner)
        return inner

    _prefix = ""

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id, or a list of them, as a tuple; absent gives ()."""
        value = self._get(key, None, (int, list, tuple), "a token id or a list of them")
        if value is None:
            return ()
        ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ConfigError(
                f"{self.source}: {self._own(key)!r} is {value!r}; expected a token id or a list of them"
            )
        return tuple(i for i in ids if i >= 0)  # -1 marks "none" in older files

    def ignore(self, *keys: str) -> None:
        """Keys that don't change what the model computes, or only how it was trained."""
        self._seen.update(keys)

    def only(self, key: str, *allowed: Any) -> None:
        """Accept `key` only where it is absent, null or one of `allowed`: other values are not supported."""
        value = self._get(key, None, (object,), "any value")
        if value is not None and value not in allowed:
            choices = ", ".join(repr(a) for a in allowed) or "absent"
            raise ConfigError(
                f"{self.source}: {self._own(key)!r} is {value!r}, which is not supported; known: {choices}"
            )

    def unused(self) -> tuple[str, ...]:
        inner = [f"{s._prefix}{key}" for s in self._sections for key in s.unused()]
        return (*(key for key in self.data if key not in self._seen), *inner)


# Keys transformers writes into every config.json; none changes what a model computes at inference.
HOUSEKEEPING = (
    *("_name_or_path", "_attn_implementation", "attn_implementation", "_commit_hash", "architectures"),
    *("auto_map", "chunk_size_feed_forward", "id2label", "label2id", "initializer_range", "is_decoder"),
    *("is_encoder_decoder", "model_type", "output_attentions", "output_hidden_states", "pretraining_tp"),
    *("problem_type", "num_labels", "return_dict", "task_specific_params", "tokenizer_class"),
    *("transformers_version",),
    *("use_cache", "use_return_dict", "attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"),
    *("attn_pdrop", "emb_pdrop", "classifier_dropout", "activation_dropout", "gradient_checkpointing"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("summary_first_dropout", "dropout"),
)

# Options of generation, which older files have beside the rest; `generation_config.json` comes first.
GENERATION = (
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "exponential_decay_length_penalty", "remove_invalid_values"),
    *("output_scores", "return_dict_in_generate"),
)


def activation(reader: Reader, *keys: str, default: str) -> str:
    """The activation named by the first of `keys` that is present (the others are ignored by name)."""
    key = next((k for k in keys if reader.has(k)), keys[0])
    reader.ignore(*keys)
    known = {name: name for name in ACTIVATIONS} | dict(_ACTIVATION_ALIASES)
    return reader.choice(key, known, default)


def rope(
    reader: Reader,
    head_dim: int,
    context: int,
    theta: float = 10000.0,
    partial: float = 1.0,
    section: Reader | None = None,
) -> Rope:
    """The rotary embedding a config describes, in the `rope_parameters` form of transformers 5 or in
    the older `rope_theta` + `rope_scaling` + `partial_rotary_factor` form; `theta` and `partial` are the
    family's defaults. `section` is given where a config has one for each kind of layer."""
    if section is None:
        key = "rope_parameters" if reader.has("rope_parameters") else "rope_scaling"
        section = reader.section(key) or Reader({}, reader.source)
        reader.ignore("rope_parameters", "rope_scaling")
    outer_theta = reader.float("rope_theta", theta)
    outer_partial = reader.float("partial_rotary_factor", partial)
    top_context = reader.int("original_max_position_embeddings", None)
    base = section.float("rope_theta", outer_theta)
    dim = int(head_dim * section.float("partial_rotary_factor", outer_partial))
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ConfigError(
            f"{reader.source}: rotary embedding would turn {dim} of {head_dim} features a head; "
            "it needs an even number of at least 2 (see 'partial_rotary_factor')"
        )
    section.ignore("type", "rope_type")
    name = "rope_type" if section.has("rope_type") else "type"
    kind = section.choice(name, _ROPE_KINDS, "default")
    inner_context = section.int("original_max_position_embeddings", None)
    original = top_context or inner_context or context
    return Rope(dim, base, kind(section, dim, context, original) if kind else None)


def _read_linear(r: Reader, dim: int, context: int, original: int) -> Linear:
    return Linear(r.float("factor"))


def _read_dynamic(r: Reader, dim: int, context: int, original: int) -> Dynamic:
    return Dynamic(r.float("factor"), context)


def _read_llama3(r: Reader, dim: int, context: int, original: int) -> Llama3:
    return Llama3(r.float("factor"), r.float("low_freq_factor"), r.float("high_freq_factor"), original)


def _read_yarn(r: Reader, dim: int, context: int, original: int) -> Yarn:
    def magnitude(mscale: float) -> float:  # Peng et al. 2023, eq. 22
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    factor = r.float("factor", context / original)
    mscale, mscale_all = r.float("mscale", None), r.float("mscale_all_dim", None)
    attention = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return Yarn(
        factor=factor,
        context=original,
        beta_fast=r.float("beta_fast", 32.0),
        beta_slow=r.float("beta_slow", 1.0),
        truncate=r.bool("truncate", True),
        attention_factor=r.float("attention_factor", attention),
    )


def _read_longrope(r: Reader, dim: int, context: int, original: int) -> LongRope:
    factor = r.float("factor", context / original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(
        short=tuple(float(f) for f in r.list("short_factor", length=dim // 2)),
        long=tuple(float(f) for f in r.list("long_factor", length=dim // 2)),
        context=original,
        attention_factor=r.float("attention_factor", attention),
    )


_ROPE_KINDS: Mapping[str, Any] = MappingProxyType(
    {
        "default": None,
        "linear": _read_linear,
        "dynamic": _read_dynamic,
        "llama3": _read_llama3,
        "yarn": _read_yarn,
        "longrope": _read_longrope,
        "su": _read_longrope,
    }
)


def windows(reader: Reader, count: int, default_types: Sequence[str]) -> list[int | None]:
    """The sliding window of each of `count` layers, from `layer_types` (or what the family defaults to)
    and `sliding_window`."""
    types = reader.list("layer_types", list(default_types), length=count)
    window = reader.int("sliding_window", None)
    out = []
    for index, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"{reader.source}: 'layer_types'[{index}] is {kind!r}; "
                "known: full_attention, sliding_attention"
            )
        if kind == "sliding_attention" and window is None:
            raise ConfigError(
                f"{reader.source}: 'layer_types'[{index}] is 'sliding_attention', "
                "but 'sliding_window' is missing"
            )
        out.append(window if kind == "sliding_attention" else None)
    return out


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's slope of each head (Press et al. 2022): powers of `2 ** (-8 / n)` for the power of two n below
    the number of heads, then every other power of the next such series."""
    whole = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    return tuple(slopes + [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)])


def pair(config: ModelConfig, layers: Sequence[Layer], **fields: Any) -> ModelConfig:
    """The decoder `config` with an encoder like it, of other `layers`; `fields` are those of `Pairing`."""
    bare = replace(config, kind="encoder", layers=tuple(layers), heads=Heads(), unused=())
    return replace(config, pairing=Pairing(encoder=bare, **fields))


def padding_row(reader: Reader, default: int | None = None) -> int | None:
    """The row of a table of tokens that looking it up teaches nothing, that of `pad_token_id`; None where it
    is null, or behind the table's end (transformers can't load such a model). One below 0 counts from there,
    as in the `nn.Embedding` of transformers, though it stands for no token."""
    rows, default = reader.int("vocab_size"), None if "pad_token_id" in reader.data else default
    row = reader.int("pad_token_id", default, minimum=-rows)
    if row is None or row >= rows:
        return None
    return row if row >= 0 else rows + row


def finish(reader: Reader, *, layers: Sequence[Layer], norm: Norm | None, **fields: Any) -> ModelConfig:
    """The `ModelConfig` of a model, with what every `config.json` says in the same words."""
    named = reader.list("architectures", None)
    reader.ignore(*HOUSEKEEPING, *GENERATION)
    reader.only("add_cross_attention", False)
    reader.ignore("quantization_config")  # about the files: `quant.choose` reads it, strictly
    name = reader.str("dtype", None) or reader.str("torch_dtype", None)
    reader.ignore("torch_dtype", "dtype")
    if name is not None and name.removeprefix("torch.") not in DTYPES:
        raise ConfigError(f"{reader.source}: 'dtype' is {name!r}; known: {', '.join(DTYPES)}")
    bos, pad = reader.ids("bos_token_id"), reader.ids("pad_token_id")
    config = {
        "model_type": reader.str("model_type"),
        "architecture": named[0] if named else "",
        "vocab_size": fields["vocab_size"] if "vocab_size" in fields else reader.int("vocab_size"),
        "dim": fields["dim"] if "dim" in fields else reader.int("hidden_size"),
        "layers": tuple(layers),
        "norm": norm,
        "context": fields.pop("context", None) or reader.int("max_position_embeddings"),
        "dtype": DTYPES[name.removeprefix("torch.")] if name else None,
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": reader.ids("eos_token_id"),
        "decoder_start_token_id": reader.int("decoder_start_token_id", None, minimum=0),
        "pad_token_id": pad[0] if pad else None,
        "padding": fields["padding"] if "padding" in fields else padding_row(reader),
        "source": dict(reader.data),
        "names": dict(reader.names),
    }
    # Dynamic scaling turns no further than trained until `factor` times the trained context.
    grown = [s.factor for a in layers if a.attn.rope and isinstance(s := a.attn.rope.scaling, Dynamic)]
    config["context"] = int(config["context"] * max(grown, default=1.0))
    config.update(fields)
    return ModelConfig(**config, unused=reader.unused())
