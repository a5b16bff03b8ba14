"""`to_bettertransformer` and `reverse_bettertransformer`: of Taut's models, and of transformers' ones."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import taut
from taut.errors import RequestError
from taut.layers.linear import Linear
from tests import audio, encoders, families, images, seq2seq, speech_seq2seq
from tests.engine.letters import ASCII, letters
from tests.families import Case, checkpoint, oracle
from tests.test_encoders import distance
from tests.test_families import close, every_device

IDS = torch.tensor([[7, 30, 4, 9, 88], [12, 5, 0, 0, 0], [3, 0, 41, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
GIVEN = {"input_ids": IDS, "attention_mask": MASK}
# The first case of each family, with the head it was trained with.
MODELS = [
    (case, head)
    for head, cases in (
        ("AutoModelForSeq2SeqLM", seq2seq.CASES),
        ("AutoModelForSpeechSeq2Seq", speech_seq2seq.CASES),
        ("AutoModelForCausalLM", families.CASES),
        ("AutoModelForMaskedLM", encoders.CASES),
        ("AutoModelForImageClassification", images.CASES),
        ("AutoModelForCTC", [c for c in audio.CASES if c.base is audio.SPEECH]),
        ("AutoModelForAudioClassification", [c for c in audio.CASES if c.base is audio.SPECTROGRAM]),
    )
    for case in {c.family: c for c in reversed(cases)}.values()
]
LLAMA, BERT = (families.CASES[0], "AutoModelForCausalLM"), (encoders.CASES[0], "AutoModelForMaskedLM")
every_model = pytest.mark.parametrize(("case", "head"), MODELS, ids=str)
ENCODERS = ("MaskedLM", "ImageClassification", "CTC", "AudioClassification")


def load(case: Case, head: str, **options):
    return getattr(taut, head).from_pretrained(checkpoint(case, head), **options)


def given(head: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    match head:
        case "AutoModelForImageClassification":
            return {"pixel_values": torch.randn(3, 3, images.SIZE, images.SIZE, generator=generator)}
        case "AutoModelForCTC":
            return {"input_values": torch.randn(3, 200, generator=generator)}
        case "AutoModelForAudioClassification":
            return {"input_values": torch.randn(3, audio.FRAMES, audio.BANDS, generator=generator)}
    if "Speech" in head:
        return {"input_features": speech_seq2seq.features(len(IDS)), "decoder_input_ids": IDS}
    return GIVEN | ({"decoder_input_ids": IDS} if "Seq2Seq" in head else {})


def labels_of(head: str) -> torch.Tensor:
    if head.endswith("Classification"):
        return torch.tensor([1, 0, 1])
    return IDS.clamp(max=audio.VOCAB - 1) if head.endswith("CTC") else IDS.masked_fill(MASK == 0, -100)


def real_of(head: str) -> torch.Tensor:
    """Which rows of logits are not those of padding."""
    if "input_ids" not in given(head):
        return torch.ones(3, dtype=torch.bool)
    return MASK.bool() | ("Seq2Seq" in head)  # a decoder's rows are all whole


def parts(model) -> list[str]:
    """The fused projections of a model."""
    return [name for name, m in model.named_modules() if isinstance(m, Linear) and m.parts]


@pytest.mark.parametrize(("case", "head"), [m for m in MODELS if m[1].endswith(ENCODERS)], ids=str)
def test_gradients_equal_the_oracles_and_in_bfloat16_are_off_by_no_more_than_twice_theirs(
    case, head, tmp_path
):
    def gradients(model) -> dict[str, torch.Tensor]:
        inputs = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in given(head).items()}
        model(**inputs, labels=labels_of(head)).loss.backward()
        with torch.no_grad():  # so that saving gives gradients under the files' names
            for param in model.parameters():
                param.copy_(torch.zeros_like(param) if param.grad is None else param.grad)
        model.save_pretrained(tmp_path)
        return load_file(tmp_path / "model.safetensors")

    kind = torch.bfloat16
    exact = gradients(oracle(case, auto=head))
    ours, theirs = (gradients(m) for m in (load(case, head, dtype=kind), oracle(case, kind, auto=head)))
    single = gradients(load(case, head))
    assert single.keys() == ours.keys() == exact.keys()
    errors = [distance([(got[name], exact[name]) for name in exact]) for got in (single, ours, theirs)]
    assert errors[0] < 1e-4 and errors[1] <= 2 * errors[2]


@every_model
def test_reversed_models_have_every_matrix_apart_compute_the_same_and_save_the_same(case, head, tmp_path):
    model = load(case, head)
    fused, before = parts(model), {name: p.clone() for name, p in model.named_parameters()}
    labels = labels_of(head)
    want = model(**given(head), labels=labels)
    model.save_pretrained(tmp_path / "converted")

    assert model.is_bettertransformer and fused and model.reverse_bettertransformer() is model
    assert not model.is_bettertransformer and not parts(model)
    matrices = {f"self_attn.{part}_proj" for part in "qkvo"}
    assert matrices <= {name.split("layers.0.")[-1] for name, _ in model.named_modules()}
    assert {layer.self_attn.only for layer in model.blocks()} == {("eager",)}
    copied = copy.deepcopy(model)
    for other in (model, copied):
        got = other(**given(head), labels=labels)
        close(got.logits, want.logits, 1e-5)
        close(got.loss, want.loss, 1e-5)
    got.loss.backward()
    assert all(p.grad is not None for n, p in copied.named_parameters() if "self_attn.q_proj" in n)
    model.reverse_bettertransformer().save_pretrained(tmp_path / "reversed")

    assert model.to_bettertransformer().to_bettertransformer() is model and parts(model) == fused
    assert {layer.self_attn.only for layer in model.blocks()} == {None}
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    model.save_pretrained(tmp_path / "again")
    files = [sorted((tmp_path / f).iterdir()) for f in ("converted", "reversed", "again")]
    for written in zip(*files, strict=True):
        assert len({file.read_bytes() for file in written}) == 1, written[0].name


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_conversion_takes_no_memory_and_packed_matrices_come_apart_too(options):
    case, head = LLAMA
    model = load(case, head, attn_implementation="sdpa", **options)
    want, bytes_before = model(**GIVEN).logits, model.get_memory_footprint()
    at = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    model.reverse_bettertransformer()
    close(model(**GIVEN).logits, want, 1e-5)
    assert model.get_memory_footprint() == bytes_before
    model.to_bettertransformer()
    assert torch.equal(model(**GIVEN).logits, want) and model.get_memory_footprint() == bytes_before
    assert {layer.self_attn.only for layer in model.blocks()} == {("sdpa",)}
    if not options:
        assert {p.data_ptr() for p in (*model.parameters(), *model.buffers())} == at
    model.reverse_bettertransformer().to(torch.float64).to_bettertransformer()  # no longer side by side
    close(model(**GIVEN).logits, want.double(), 1e-4)


def test_training_goes_on_across_conversions():
    case, head = LLAMA
    models = [load(case, head), load(case, head).reverse_bettertransformer()]
    for model in models:
        model(**GIVEN, labels=IDS).loss.backward()
    models[1].to_bettertransformer()
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        close(theirs.grad, ours.grad, 1e-4), name
    models[0].requires_grad_(False).reverse_bettertransformer()
    assert not any(p.requires_grad for p in models[0].parameters())
    assert models[1].reverse_bettertransformer().generate(IDS[:1], max_new_tokens=4).shape == (1, 9)


@every_model
def test_a_model_of_transformers_lends_its_weights_and_gets_them_back(case, head, tmp_path):
    theirs = oracle(case, auto=head)
    real = real_of(head)
    want = theirs(**given(head)).logits
    objects, size = dict(theirs.named_parameters()), sum(p.nbytes for p in theirs.parameters())
    ours = taut.to_bettertransformer(theirs)
    close(ours(**given(head)).logits[real], want[real])
    assert torch.equal(theirs(**given(head)).logits, want) or case.family == "GptOss"
    assert ours.architecture() == type(theirs).__name__ and not ours.training

    # Shared, but for what Taut holds otherwise: q, k and v head by head, gate and up in turns, q apart.
    blocks = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in (*ours.parameters(), *theirs.parameters())
    }
    shared = case.family not in ("Bloom", "CodeGen", "GPTNeoX", "GptOss", "Siglip")
    assert (sum(blocks.values()) <= size * 1.01) == shared
    with torch.no_grad():
        for param in ours.parameters():
            param.mul_(1.1 if param.requires_grad else 1)  # sinusoids stay what they are
    if shared:
        close(theirs(**given(head)).logits[real], ours(**given(head)).logits[real])
    assert taut.reverse_bettertransformer(ours.reverse_bettertransformer()) is theirs
    close(theirs(**given(head)).logits[real], ours(**given(head)).logits[real])
    assert all(p is objects[name] for name, p in theirs.named_parameters())
    theirs.save_pretrained(tmp_path)
    again = getattr(taut, head).from_pretrained(tmp_path)
    close(again(**given(head)).logits, ours(**given(head)).logits)


@pytest.mark.parametrize(
    ("case", "head"), [LLAMA, (encoders.CASES[0], "AutoModelForTokenClassification")], ids=str
)
def test_a_model_of_taut_alone_becomes_one_of_transformers(case, head):
    ours = load(case, head, dtype=torch.float64)
    theirs = taut.reverse_bettertransformer(ours)
    assert type(theirs).__name__ == ours.architecture() and theirs.dtype is torch.float64
    close(theirs(**GIVEN).logits[MASK.bool()], ours(**GIVEN).logits[MASK.bool()])
    assert taut.reverse_bettertransformer(theirs) is theirs and taut.to_bettertransformer(ours) is ours


def test_heads_poolers_and_what_was_trained_since_come_back():
    case = encoders.CASES[0]
    theirs = transformers.BertModel.from_pretrained(
        checkpoint(case, "AutoModelForMaskedLM"), add_pooling_layer=False
    )
    ours = taut.to_bettertransformer(theirs.train())
    assert ours.training and ours(**GIVEN).pooler_output is None and theirs(**GIVEN).pooler_output is None
    theirs.eval()
    ours.eval().double()  # the memory is no longer one
    with torch.no_grad():
        for param in ours.parameters():
            param.mul_(1.1)
    taut.reverse_bettertransformer(ours)
    got, want = theirs(**GIVEN).last_hidden_state, ours(**GIVEN).last_hidden_state
    assert got.dtype is torch.float32
    close(got[MASK.bool()], want[MASK.bool()].float())


def test_what_the_bridge_can_not_take_is_named():
    case = encoders.CASES[0]
    with pytest.raises(RequestError, match="a Linear is given; expected a model of Taut or of transformers"):
        taut.to_bettertransformer(torch.nn.Linear(2, 2))
    config = transformers.BertConfig(**case.base)
    with pytest.raises(
        RequestError, match="no BertForNextSentencePrediction; of its family it has: BertForMaskedLM, "
    ):
        taut.to_bettertransformer(transformers.BertForNextSentencePrediction(config))
    with torch.device("meta"):
        empty = transformers.BertModel(config)
    with pytest.raises(RequestError, match="this BertModel lies on meta; move it to one device"):
        taut.to_bettertransformer(empty)
    packed = load(case, "AutoModelForMaskedLM", load_in_8bit=True)
    with pytest.raises(RequestError, match="this BertForMaskedLM is quantized; save it"):
        taut.reverse_bettertransformer(packed)


def test_taut_imports_transformers_only_to_make_one_of_its_models():
    program = "import sys, taut; taut.to_bettertransformer; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> str:
    """A small OPT in float16, as those on the Hub are, with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("opt")
    case = next(case for case in families.CASES if case.name == "opt")
    model = taut.AutoModelForCausalLM.from_pretrained(checkpoint(case), dtype=torch.float16)
    model.save_pretrained(folder)
    letters(ASCII).save_pretrained(folder)
    return str(folder)


def test_the_program_of_an_encoder(tmp_path):
    """Fast path on, off, saved in canonical form."""
    source = checkpoint(encoders.CASES[0], "AutoModel")
    model = taut.AutoModel.from_pretrained(source).to_bettertransformer()
    model = model.reverse_bettertransformer()
    model.save_pretrained(tmp_path / "saved_model")
    saved, original = (load_file(f / "model.safetensors") for f in (tmp_path / "saved_model", source))
    assert saved.keys() == original.keys() and all(torch.equal(saved[n], original[n]) for n in original)


@every_device
@pytest.mark.filterwarnings("ignore:`torch.backends.cuda.sdp_kernel")
@pytest.mark.parametrize("older", [True, False])
def test_the_program_of_a_decoder_restricted_to_one_kind_of_attention(opt, device, older):
    model = taut.AutoModelForCausalLM.from_pretrained(opt, torch_dtype=torch.float16).to(device)
    model.to_bettertransformer()
    inputs = taut.AutoTokenizer.from_pretrained(opt)("Hello my dog is cute and", return_tensors="pt").to(
        device
    )
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    flash = {"enable_flash": True, "enable_math": False, "enable_mem_efficient": False}
    with torch.backends.cuda.sdp_kernel(**flash) if older else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        outputs = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        if device == "cpu":
            with (
                taut.attention_kernel("eager"),
                pytest.raises(RequestError, match="leaves math attention out"),
            ):
                model(**inputs)
    assert torch.equal(outputs, want) and outputs.shape == (1, inputs["input_ids"].shape[1] + 8)


@every_device
def test_the_program_of_everything_at_once(opt, device):
    """FP4, computed in float16, the fast path and flash attention alone."""
    config = taut.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
    model = taut.AutoModelForCausalLM.from_pretrained(opt, quantization_config=config, device=device)
    model.to_bettertransformer()
    inputs = taut.AutoTokenizer.from_pretrained(opt)("Hello my dog is cute and", return_tensors="pt").to(
        device
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        outputs = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert outputs.shape[1] > inputs["input_ids"].shape[1] and model.is_loaded_in_4bit
