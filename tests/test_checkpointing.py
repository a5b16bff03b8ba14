"""Gradient checkpointing: the same gradients of each kind of model, with every block computed twice; and
gradients that reach the inputs of models which are not trained themselves."""

from __future__ import annotations

import threading

import pytest
import torch

from taut import attention_kernel
from taut.errors import RequestError
from taut.kernels.attention import restrictions
from tests import families
from tests.test_bettertransformer import MODELS, given, labels_of, load
from tests.test_families import close, every_device

FIRST = list({head: (case, head) for case, head in reversed(MODELS)}.values())
FIRST += [(case, "AutoModelForCausalLM") for case in families.CASES if case.name in ("mixtral", "gemma2")]
LLAMA = families.CASES[0], "AutoModelForCausalLM"


def trained(model, head: str, **options) -> tuple[dict[str, torch.Tensor], int, int]:
    """The gradient of each parameter, and how often blocks ran in the forward and in the backward pass."""
    ran: list[object] = []
    hooks = [block.register_forward_pre_hook(lambda *_: ran.append(1)) for block in model.blocks()]
    inputs = {name: value.to(model.device) for name, value in given(head).items()}
    model.zero_grad()
    loss = model(**inputs, labels=labels_of(head).to(model.device), **options).loss
    forward = len(ran)
    loss.backward()
    for hook in hooks:
        hook.remove()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, forward, len(ran) - forward


@every_device
@pytest.mark.parametrize(("case", "head"), FIRST, ids=str)
def test_gradients_are_the_same(case, head, device):
    model = load(case, head, device=device)
    want, blocks, none = trained(model, head)
    assert blocks > 0 == none and not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got, forward, backward = trained(model, head)
    assert model.is_gradient_checkpointing and forward == backward == blocks
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
    model.gradient_checkpointing_disable()
    assert trained(model, head)[2] == 0 and not model.is_gradient_checkpointing


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"attn_implementation": "eager"}], ids=str)
def test_packed_weights_and_attention_weights_go_with_it(options):
    model = load(*LLAMA, **options)
    want = trained(model, LLAMA[1], output_attentions=True, output_hidden_states=True)[0]
    model.gradient_checkpointing_enable()
    got = trained(model, LLAMA[1], output_attentions=True, output_hidden_states=True)[0]
    assert want.keys() == got.keys() and all(torch.equal(got[name], want[name]) for name in want)


def entering(model, blocks) -> list[torch.Tensor]:
    """What the first of `blocks` takes in the next forward, and keeps the gradient of."""
    found: list[torch.Tensor] = []

    def keep(_module, given, options):
        found.append(given[0] if given else options["hidden_states"])
        if found[0].requires_grad:
            found[0].retain_grad()

    blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    return found


def test_gradients_of_inputs_are_those_of_transformers():
    case, head = LLAMA
    model, theirs = load(case, head), families.oracle(case)
    model.requires_grad_(False), theirs.requires_grad_(False)
    model.enable_input_require_grads(), theirs.enable_input_require_grads()
    ours, want = entering(model, list(model.blocks())), entering(theirs, theirs.model.layers)
    ids = torch.tensor([[5, 9, 17, 3], [7, 1, 8, 2]])
    for one in (model, theirs):
        one(ids, labels=ids).loss.backward()
    close(ours[0].grad.view(2, 4, -1), want[0].grad)


@pytest.mark.parametrize(("case", "head"), FIRST, ids=str)
def test_a_frozen_model_of_each_kind_passes_gradients_to_its_inputs(case, head):
    model = load(case, head)
    model.requires_grad_(False)
    inputs = given(head) | {"labels": labels_of(head)}
    assert not model(**inputs).loss.requires_grad
    model.enable_input_require_grads()
    taken = entering(model, list(model.blocks()))
    model(**inputs).loss.backward()
    assert taken[0].grad.abs().sum() > 0
    with torch.no_grad():
        assert not model(**inputs).loss.requires_grad
    model.disable_input_require_grads()
    assert not model(**inputs).loss.requires_grad


def test_embeddings_that_a_caller_gives_stay_as_they_are():
    model = load(*LLAMA)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    embeds = torch.randn(1, 4, 48)
    assert model(inputs_embeds=embeds).logits.requires_grad and not embeds.requires_grad


def test_attention_that_a_forward_is_restricted_to_runs_in_its_backward_pass_too():
    """Which is outside of the restriction, and on a GPU in a thread of its own."""
    (case, head), allowed = LLAMA, []
    model = load(case, head)
    model.gradient_checkpointing_enable()
    with attention_kernel("eager"):
        loss = model(**given(head), labels=labels_of(head)).loss
    for block in model.blocks():
        block.register_forward_pre_hook(lambda *_: allowed.append(restrictions()[0]))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert allowed == [("eager",)] * 3


def test_generation_is_as_before_and_options_that_there_are_not_are_named():
    model, ids = load(*LLAMA), torch.tensor([[5, 9, 17, 3]])
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), want)
    cached = model(ids[:, :2], use_cache=True).past_key_values
    close(model(ids[:, 2:], past_key_values=cached).logits, model(ids).logits.detach()[:, 2:])
    for options in ({"use_reentrant": True}, {"preserve": 1}):
        with pytest.raises(
            RequestError, match=r"gradient_checkpointing_kwargs is .*; known: use_reentrant=False"
        ):
            model.gradient_checkpointing_enable(options)
