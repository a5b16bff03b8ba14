"""Rules map both ways, loading is all or nothing, and one error names everything that does not fit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from taut import weights
from taut.errors import WeightsError
from taut.layers.experts import ExpertLinear
from taut.layers.linear import Linear
from taut.weights import Fused, Rename, Stacked, Transposed


@dataclass
class InMemory:
    """A checkpoint tensor that records how it was read."""

    tensor: Tensor
    largest: int = 0

    @property
    def shape(self):
        return tuple(self.tensor.shape)

    @property
    def dtype(self):
        return self.tensor.dtype

    def read(self, start=0, stop=None):
        rows = self.tensor[start:stop] if self.tensor.dim() else self.tensor
        self.largest = max(self.largest, rows.numel() * rows.element_size())
        return rows.clone()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = ExpertLinear(3, 2, 4, {"gate": 5, "up": 2}, bias=True)
        self.down = ExpertLinear(3, 2, 5, 4)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = Linear(4, {"q_proj": 6, "k_proj": 2, "v_proj": 2}, bias=True)
        self.o_proj = Linear(6, 4)
        self.experts = Experts()
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.scale = nn.Parameter(torch.empty(()))


RULES = (
    Rename("h.{}.ln", "layers.{}.norm"),
    Fused("layers.{}.attn_qkv", ("q_proj", "k_proj", "v_proj")),
    Transposed("layers.{}.o_proj.weight"),
    Rename("layers.{}.experts.{}.w1", "layers.{}.experts.{}.gate"),
)


EXPERT = {
    "w1.weight": (5, 4),
    "w1.bias": (5,),
    "up.weight": (2, 4),
    "up.bias": (2,),
    "down.weight": (4, 5),
}


def build() -> Model:
    with torch.device("meta"):
        return Model()


def files(rules=RULES) -> dict[str, InMemory]:
    """A checkpoint as `rules` say it looks, with values that tell every element apart."""
    shapes = {
        "scale": (),
        **{f"layers.{i}.o_proj.weight": (6, 4) for i in range(2)},
        **{f"layers.{i}.attn_qkv.weight": (10, 4) for i in range(2)},
        **{f"layers.{i}.attn_qkv.bias": (10,) for i in range(2)},
        **{f"layers.{i}.experts.{e}.{n}": s for i in range(2) for e in range(3) for n, s in EXPERT.items()},
        **{f"h.{i}.ln.{kind}": (4,) for i in range(2) for kind in ("weight", "bias")},
    }
    generator = torch.Generator().manual_seed(0)
    return {name: InMemory(torch.rand(shape, generator=generator)) for name, shape in shapes.items()}


# "layers.{}.qkv_proj" of the model is "layers.{}.attn_qkv" on disk; the parts' own names never show.
def test_every_rule_loads_and_stores_the_same_tensors():
    model, disk = build(), files()
    weights.load(model, disk, RULES, dtype=torch.float32)
    assert torch.equal(model.layers[1].o_proj.weight, disk["layers.1.o_proj.weight"].tensor.T)
    last = [disk[f"layers.0.experts.2.{part}.weight"].tensor for part in ("w1", "up")]
    assert torch.equal(model.layers[0].experts.gate_up.weight[2], torch.cat(last))
    assert torch.equal(model.layers[0].qkv_proj.weight, disk["layers.0.attn_qkv.weight"].tensor)
    stored = {tensor.name: tensor.read() for tensor in weights.store(model, RULES)}
    assert stored.keys() == disk.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, disk[name].tensor), name


def test_parts_in_groups_are_interleaved_and_come_back():
    rules = (Fused("layers.{}.mixed", ("q_proj", "v_proj", "k_proj"), groups=2),)
    model = build()
    params = dict(model.named_parameters())
    others = [piece for piece in weights.layout(model) if "qkv" not in piece.param]
    disk = {p.disk: InMemory(torch.rand(p.view(params[p.param]).shape)) for p in others}
    for index in range(2):
        disk[f"layers.{index}.mixed.weight"] = InMemory(torch.rand(10, 4))
        disk[f"layers.{index}.mixed.bias"] = InMemory(torch.rand(10))
    weights.load(model, disk, rules, dtype=torch.float32)
    for kind in ("weight", "bias"):
        first, second = disk[f"layers.1.mixed.{kind}"].tensor.split(5)  # each: 3 rows of q, 1 of v, 1 of k
        q = torch.cat((first[:3], second[:3]))
        v, k = (torch.stack((first[at], second[at])) for at in (3, 4))
        assert torch.equal(getattr(model.layers[1].qkv_proj, kind), torch.cat((q, k, v)))
    stored = {tensor.name: tensor.read() for tensor in weights.store(model, rules)}
    assert stored.keys() == disk.keys()
    assert all(torch.equal(stored[name], disk[name].tensor) for name in disk)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_that_lie_in_one_tensor_load_and_come_back(turns, transposed):
    rules = (
        Stacked("m.{}.inner", "m.{}.{}.{}.weight", ("gate", "up"), turns, transposed),
        Stacked("m.{}.inner_bias", "m.{}.{}.{}.bias", ("gate", "up"), turns),
        Stacked("m.{}.outer", "m.{}.{}.down.weight", transposed=transposed),
    )
    gate_up = ExpertLinear(3, 2, 4, {"gate": 5, "up": 5}, bias=True)
    experts = {"gate_up": gate_up, "down": ExpertLinear(3, 2, 5, 4)}
    model = nn.ModuleDict({"m": nn.ModuleList([nn.ModuleDict(experts)])}).to("meta")
    inner, bias, outer = torch.rand(3, 10, 4), torch.rand(3, 10), torch.rand(3, 4, 5)
    flip = (lambda t: t.mT.contiguous()) if transposed else (lambda t: t)
    disk = {"m.0.inner": InMemory(flip(inner)), "m.0.inner_bias": InMemory(bias)}
    disk["m.0.outer"] = InMemory(flip(outer))
    weights.load(model, disk, rules, dtype=torch.float32)
    order = [*range(0, 10, 2), *range(1, 10, 2)] if turns else [*range(10)]
    layer = model["m"][0]
    assert torch.equal(layer["gate_up"].weight, inner[:, order])
    assert torch.equal(layer["gate_up"].bias, bias[:, order])
    assert torch.equal(layer["down"].weight, outer)
    stored = {tensor.name: tensor.read() for tensor in weights.store(model, rules)}
    assert stored.keys() == disk.keys()
    assert all(torch.equal(stored[name], disk[name].tensor) for name in disk)
    # One by one, where a small format needs it; and what fits a file is found.
    names = {piece.disk for piece in weights.layout(model, weights.apart(rules))}
    assert "m.0.2.up.weight" in names and "m.0.1.down.weight" in names and len(names) == 3 * 5
    both = (rules, weights.apart(rules))
    assert weights.fitting(model, both, names) == both[1]
    assert weights.fitting(model, both, disk) == both[0]


def test_names_without_their_first_word_are_completed():
    expected = ["body.h.0.ln.weight", "body.wte.weight", "lm_head.weight"]
    named = weights.with_prefix(dict.fromkeys(["h.0.ln.weight", "lm_head.weight"]), "body", expected)
    assert list(named) == ["body.h.0.ln.weight", "lm_head.weight"]
    for names in (["body.h.0.ln.weight", "wte.weight"], ["nothing.alike"]):  # as they are, and said so
        assert list(weights.with_prefix(dict.fromkeys(names), "body", expected)) == names


def test_parts_have_their_own_names_without_rules():
    names = [piece.disk for piece in weights.layout(build())]
    assert "layers.0.q_proj.weight" in names and "layers.1.v_proj.bias" in names
    assert not any("qkv" in name for name in names)


def test_one_error_names_everything_and_nothing_is_loaded():
    model, disk = build(), files()
    del disk["h.1.ln.bias"]
    disk["h.1.ln.bais"] = InMemory(torch.zeros(4))
    disk["layers.0.experts.1.w1.weight"] = InMemory(torch.zeros(4, 5))
    with pytest.raises(WeightsError) as caught:
        weights.load(model, disk, RULES, dtype=torch.float32)
    message = str(caught.value)
    assert "1 missing, 1 unexpected, 1 of another shape" in message
    assert "missing: h.1.ln.bias [4]; nearest: h.1.ln.bais" in message
    assert "unexpected: h.1.ln.bais [4]" in message
    assert "layers.0.experts.1.w1.weight: the file has [4, 5], the config asks for [5, 4]" in message
    assert all(param.is_meta for param in model.parameters())


def test_a_read_that_fails_leaves_nothing_half_loaded():
    class Broken(InMemory):
        def read(self, start=0, stop=None):
            raise OSError("the disk went away")

    model, disk = build(), files()
    disk["h.1.ln.bias"] = Broken(torch.zeros(4))
    with pytest.raises(OSError, match="the disk went away"):
        weights.load(model, disk, RULES, dtype=torch.float32)
    assert all(param.is_meta for param in model.parameters())


def test_names_that_files_may_hold_are_ignored_only_by_pattern():
    disk = files() | {"layers.0.rotary.inv_freq": InMemory(torch.zeros(2))}
    weights.load(build(), disk, RULES, dtype=torch.float32, ignored=("*.inv_freq",))
    with pytest.raises(WeightsError, match=r"unexpected: layers.0.rotary.inv_freq \[2\]"):
        weights.load(build(), disk, RULES, dtype=torch.float32)


def test_loading_casts_reads_in_slices_and_reports_bytes(monkeypatch):
    monkeypatch.setattr(weights, "_SLICE_BYTES", 64)
    model, disk, seen = build(), files(), []
    weights.load(model, disk, RULES, dtype=torch.bfloat16, progress=lambda *at: seen.append(at))
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    sliced = [t for name, t in disk.items() if "o_proj" not in name]  # a transposed matrix is read whole
    assert max(t.largest for t in sliced) <= 64
    done, total = seen[-1]
    assert done == total == sum(p.numel() for p in model.parameters()) * 2
    assert [at for at, _ in seen] == sorted(at for at, _ in seen)
