"""Training a few parameters: what is frozen changes neither the loss nor the gradients of the others."""

from __future__ import annotations

import pytest
import torch

from tests import families
from tests.test_bettertransformer import MODELS, given, labels_of, load

# One of each head, and decoders with an activation behind a biased product, before which a norm stands.
FIRST = list({head: (case, head) for case, head in reversed(MODELS)}.values())
NAMES = ("gpt-neox", "starcoder2", "falcon-40b")
FIRST += [(case, "AutoModelForCausalLM") for case in families.CASES if case.name in NAMES]
TRAINED = {
    "biases": lambda name: name.endswith("bias"),
    "biases of products": lambda name: name.endswith("proj.bias"),
    "norms": lambda name: "norm" in name,
    "norms before the MLP": lambda name: "pre_feedforward_layernorm" in name,
    "the norm of the embeddings": lambda name: "embed_layernorm.bias" in name,
}
# In half precision a GPU takes other kernels for what has no gradient.
PLACES = [
    ("cpu", torch.float32, 1e-4),
    pytest.param("cuda", torch.float32, 1e-3, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, 5e-2, marks=pytest.mark.gpu),
]


def trained(model, head: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradient of each parameter that has one."""
    model.zero_grad()
    found = model(
        **{k: v.to(model.device) for k, v in given(head).items()}, labels=labels_of(head).to(model.device)
    )
    found.loss.backward()
    return found.loss.item(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("device", "dtype", "bound"), PLACES, ids=str)
@pytest.mark.parametrize(("case", "head"), FIRST, ids=str)
@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_what_is_frozen_changes_nothing(case, head, device, dtype, bound):
    model = load(case, head, device=device, dtype=dtype)
    loss, among_all = trained(model, head)
    floor = 10 * bound * max(grad.norm() for grad in among_all.values())  # some are zero but for rounding
    for chosen in TRAINED.values():
        names = {name for name in among_all if chosen(name)}
        if not names:
            continue
        for name, param in model.named_parameters():
            param.requires_grad_(name in names)
        alone, found = trained(model, head)
        assert alone == pytest.approx(loss, rel=bound) and found.keys() == names
        for name, grad in found.items():
            want = among_all[name]
            assert (grad - want).norm() <= bound * max(want.norm(), floor), name
