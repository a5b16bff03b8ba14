"""What packed weights take: those of a 7B model by arithmetic, as estimated, and at most during a load."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taut import AutoModelForCausalLM
from taut.checkpoint import Deferred
from taut.modeling import CausalLM
from taut.models import read_config
from taut.quant.stored import Quantize
from tests.quant.test_models import config, every_format

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, those that live and the most that did at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def test_a_7b_model_takes_what_it_may():
    with torch.device("meta"):
        model = CausalLM(read_config(LLAMA_7B))
    packed = {n for n, p in model.named_parameters() if "_proj" in n}
    dense = 2 * sum(p.numel() for n, p in model.named_parameters() if n not in packed)
    for name, limit in (("nf4", 4.2e9), ("nf4-double", 3.9e9), ("int8", 7.1e9)):
        packer = Quantize(config(name))
        total = dense + sum(packer.nbytes(tuple(model.get_parameter(n).shape)) for n in packed)
        assert total <= limit, (name, total)


@every_format
def test_the_estimate_is_what_is_allocated(name):
    packer = Quantize(config(name))
    for shape in ((64, 128), (7, 33), (130, 1030)):
        weight = torch.randn(shape)
        read = lambda w=weight: w  # noqa: E731
        packed = packer(Deferred("w", shape, torch.float32, read), read, weight.device)
        assert packed.nbytes == packer.nbytes(shape)


@every_format
def test_loading_peaks_at_the_result_and_a_layer(name, tmp_path):
    """Packed while loading, or before. What packing computes with is less than another layer; in 16 bit one
    of a 7B model has 0.4 GB, so that its peak is less than 1 GB above the result."""
    small = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4}
    dense = AutoModelForCausalLM.from_config(LLAMA_7B | small, dtype=torch.bfloat16)
    layer = 2 * sum(p.numel() for p in dense.model.layers[0].parameters())
    dense.save_pretrained(tmp_path / "dense")
    del dense
    for folder, options in (("dense", {"quantization_config": config(name)}), ("packed", {})):
        with Peak() as peak:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, **options)
        held = model.get_memory_footprint()
        assert held <= peak.now < held + layer / 2  # tables of codes stay, for all that follow
        assert peak.most < held + 2 * layer
        model.save_pretrained(tmp_path / "packed")
