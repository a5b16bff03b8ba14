"""What every image encoder must pass, from the table in `images.py`, on the CPU and, marked `gpu`, on a
GPU."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import taut
from taut import weights
from taut.errors import ConfigError, RequestError
from taut.models import families, family, kind
from tests.families import VOCAB, Case, checkpoint, oracle
from tests.images import CASES, SIZE
from tests.processor.media import image_bytes, picture
from tests.test_encoders import distance, fields, luck
from tests.test_families import close, every_device

HEADS = ("AutoModel", "AutoModelForImageClassification")
CLASSIFIER = HEADS[1]
BY_NAME = {case.name: case for case in CASES}
MODELS = [(case, head) for case in CASES for head in HEADS]
ELASTIC = ("Beit", "Dinov2")
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_model = pytest.mark.parametrize(("case", "head"), MODELS, ids=str)
some = pytest.mark.parametrize(
    "case", [BY_NAME[n] for n in ("vit", "beit", "dinov2-gated", "siglip")], ids=str
)


def load(case: Case, head: str = "AutoModel", device: str = "cpu", dtype=torch.float32, **options):
    return getattr(taut, head).from_pretrained(checkpoint(case, head), dtype=dtype, device=device, **options)


def inputs(
    case: Case, head: str, device: str = "cpu", pictures: int = 3, size: tuple[int, int] = (SIZE, SIZE)
) -> dict[str, torch.Tensor]:
    """Pictures and, for a model that compares them with texts, as many of these."""
    generator = torch.Generator().manual_seed(3)
    channels = case.options.get("num_channels", 3)
    given = {"pixel_values": torch.randn(pictures, channels, *size, generator=generator)}
    if "text_config" in case.base and head == "AutoModel":
        ids = torch.randint(8, VOCAB, (pictures, 12), generator=generator)
        for row, end in enumerate((11, 4, 8)[:pictures]):
            ids[row, end:] = 7  # ends, and goes on with the same as padding
        given["input_ids"] = ids
    return {name: value.to(device) for name, value in given.items()}


def flat(output) -> dict[str, torch.Tensor]:
    """The tensors of an output, with those of the outputs inside it."""
    found = {}
    for name, value in output.items():
        inner = flat(value) if isinstance(value, dict) else fields({name: value})
        found |= {f"{name}.{key}": v for key, v in inner.items()} if isinstance(value, dict) else inner
    return found


def test_every_image_encoder_is_in_the_table():
    kinds = ("image encoder", "image-text model")
    assert {load(case).config.model_type for case in CASES} == {
        n for n in families() if kind(family(n)) in kinds
    }


@every_device
@every_model
@torch.no_grad()
def test_every_output_equals_the_oracles_alone_and_together(case, head, device):
    model, reference = load(case, head, device), oracle(case, device=device, auto=head)
    given, asked = inputs(case, head, device), {"output_hidden_states": True, "output_attentions": True}
    want, got, fused = (flat(m(**given, **o)) for m, o in ((reference, asked), (model, asked), (model, {})))
    assert list(got) == list(want)
    for name, expected in want.items():
        close(got[name].cpu(), expected.cpu())
        if name in fused:
            close(fused[name].cpu(), expected.cpu())
    for row in range(3):
        alone = flat(model(**{name: value[row : row + 1] for name, value in given.items()}))
        for name, value in alone.items():
            if not name.startswith("logits_per"):
                close(value[0].cpu(), fused[name][row].cpu())


@every_device
@every_case
@torch.no_grad()
def test_pictures_of_other_sizes_equal_the_oracles(case, device):
    model, reference = load(case, device=device), oracle(case, device=device, auto="AutoModel")
    for size in ((30, 30), (20, 44)):  # the second with pixels left over
        given = inputs(case, "AutoModel", device, size=size)
        options = {} if case.family in ELASTIC else {"interpolate_pos_encoding": True}
        want, got = flat(reference(**given, **options)), flat(model(**given, **options))
        for name, expected in want.items():
            close(got[name].cpu(), expected.cpu())
    if case.family not in ELASTIC:
        with pytest.raises(
            RequestError, match="20 x 44 pixels, and the model takes 24 x 24; resize them, or"
        ):
            model(**given)


@every_device
@every_model
def test_loss_and_gradients_equal_the_oracles(case, head, device, tmp_path):
    model, reference = load(case, head, device), oracle(case, device=device, auto=head)
    given = inputs(case, head, device)
    if "input_ids" in given:
        ours, theirs = (m(**given, return_loss=True).loss for m in (model, reference))
    elif head == "AutoModel" or case.name == "deit-taught":
        ours, theirs = (fields(m(**given)) for m in (model, reference))
        ours, theirs = (sum(v.square().sum() for v in output.values()) for output in (ours, theirs))
    else:
        labels = torch.tensor([1, 0, 1], device=device)
        ours, theirs = (m(**given, labels=labels).loss for m in (model, reference))
    close(ours.detach(), theirs.detach(), 1e-5)
    ours.backward()
    theirs.backward()
    with torch.no_grad():
        for param in (*model.parameters(), *reference.parameters()):
            param.copy_(torch.zeros_like(param) if param.grad is None else param.grad)
    reference.save_pretrained(tmp_path)  # so that saving gives gradients under the files' names
    want = load_file(tmp_path / "model.safetensors")
    got = {tensor.name: tensor.read().cpu() for tensor in weights.store(model, model.rules())}
    floor = 1e-2 * max(grad.abs().max() for grad in want.values())
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() <= 2e-4 * max(gradient.abs().max(), floor), name


@some
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_every_attention_implementation_agrees(case, implementation):
    given = inputs(case, CLASSIFIER)
    want = load(case, CLASSIFIER)(**given).logits
    close(load(case, CLASSIFIER, attn_implementation=implementation)(**given).logits, want)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.bfloat16)]
    + [pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in (torch.bfloat16, torch.float16)],
    ids=str,
)
@every_model
@torch.no_grad()
def test_half_precision_rounds_no_worse_than_twice_the_oracle(case, head, device, dtype):
    given = inputs(case, head, device)
    exact = oracle(case, device=device, auto=head)(**given)
    errors = []
    for model in (load(case, head, device, dtype), oracle(case, dtype, device, auto=head)):
        output = model(**given | {"pixel_values": given["pixel_values"].to(dtype)})
        outputs = ("text_embeds", "image_embeds", "last_hidden_state", "pooler_output", "logits")
        errors.append(distance([(output[n], exact[n]) for n in outputs if n in exact and n in output]))
    assert errors[0] <= 2 * errors[1] + luck(head)


@every_model
def test_save_is_byte_identical_and_transformers_reads_it(case, head, tmp_path):
    model = load(case, head)
    assert model.config.unused == () and not model.load_report.fresh
    model.save_pretrained(tmp_path / "once")
    own = getattr(taut, model.architecture())  # the family's own class loads it as well
    own.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    saved, original = (
        load_file(f / "model.safetensors") for f in (tmp_path / "once", checkpoint(case, head))
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    theirs, info = getattr(transformers, head).from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(theirs).__name__ == model.architecture()


@every_case
def test_a_new_head_for_other_labels_is_initialised_and_nothing_else_is_missing(case, tmp_path):
    whole = checkpoint(case, "AutoModel")
    with pytest.warns(UserWarning, match="classifier"):
        model = taut.AutoModelForImageClassification.from_pretrained(whole, num_labels=5)
    assert model(**inputs(case, CLASSIFIER)).logits.shape == (3, 5)
    assert all("classifier" in name or "pooler" in name for name in model.load_report.fresh)
    # And back: a classifier's checkpoint without its head.
    if "text_config" not in case.base:
        headless = taut.AutoModel.from_pretrained(checkpoint(case, CLASSIFIER), add_pooling_layer=False)
        reference = oracle(case, auto=CLASSIFIER)
        given = inputs(case, CLASSIFIER)
        want = reference(**given, output_hidden_states=True).hidden_states
        for got, expected in zip(
            headless(**given, output_hidden_states=True).hidden_states, want, strict=True
        ):
            close(got, expected)


@some
@torch.no_grad()
@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["int8", "4bit"])
def test_quantized_models_compute_with_the_values_they_hold(case, options, tmp_path):
    pytest.importorskip("bitsandbytes")
    from taut.layers.linear import Linear

    model, dense = load(case, CLASSIFIER, **options), load(case, CLASSIFIER)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.packed is not None}
    assert len(packed) >= 3 * 4 and "classifier" not in packed
    for name, module in packed.items():
        dense.get_submodule(name).weight.copy_(module.packed.dequantize(torch.float32))
    given = inputs(case, CLASSIFIER)
    want = dense(**given).logits
    error = (model(**given).logits - want).norm() / want.norm()
    assert error <= (0.05 if "load_in_8bit" in options else 1e-4)  # int8 rounds its inputs too
    model.save_pretrained(tmp_path)
    assert torch.equal(
        taut.AutoModelForImageClassification.from_pretrained(tmp_path)(**given).logits, model(**given).logits
    )


@pytest.mark.parametrize("name", ["beit", "dinov2-gated", "clip", "siglip"])
@torch.no_grad()
def test_reversed_models_compute_and_save_the_same(name, tmp_path):
    model = load(BY_NAME[name])
    given = inputs(BY_NAME[name], "AutoModel")
    want = flat(model(**given))
    model.save_pretrained(tmp_path / "converted")
    model.reverse_bettertransformer().save_pretrained(tmp_path / "reversed")
    for field, value in flat(model(**given)).items():
        close(value, want[field], 1e-5)
    files = [tmp_path / folder / "model.safetensors" for folder in ("converted", "reversed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for field, value in flat(model.to_bettertransformer()(**given)).items():
        assert torch.equal(value, want[field])


@pytest.mark.parametrize("name", ["dinov2", "beit-shared-first-token"])
@torch.no_grad()
def test_patches_that_are_left_out_equal_the_oracles(name):
    case = BY_NAME[name]
    given = inputs(case, "AutoModel")
    given["bool_masked_pos"] = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    want = oracle(case, auto="AutoModel")(**given).last_hidden_state
    close(load(case)(**given).last_hidden_state, want)
    with pytest.raises(RequestError, match=r"bool_masked_pos has shape \[3, 9\]; expected \[3, 16\]"):
        load(case)(given["pixel_values"], bool_masked_pos=torch.ones(3, 9))
    with pytest.raises(RequestError, match="this model has no token for patches that are left out"):
        load(BY_NAME["vit"])(given["pixel_values"], bool_masked_pos=given["bool_masked_pos"])


@pytest.mark.parametrize("name", ["clip", "clip-highest", "siglip"])
@torch.no_grad()
def test_halves_equal_the_oracles_from_the_whole_and_from_their_own_files(name, tmp_path):
    case = BY_NAME[name]
    given, whole = inputs(case, "AutoModel"), checkpoint(case, "AutoModel")
    for half, key in (("Text", "input_ids"), ("Vision", "pixel_values")):
        for suffix in ("Model", "ModelWithProjection")[: 2 if case.family == "CLIP" else 1]:
            own = f"{case.family}{half}{suffix}"
            options = {"ignore_mismatched_sizes": True} if suffix == "ModelWithProjection" else {}
            theirs = getattr(transformers, own).from_pretrained(whole, **options).eval()
            theirs.save_pretrained(tmp_path / own)
            want = theirs(given[key], output_hidden_states=True)
            found = [getattr(taut, own).from_pretrained(tmp_path / own)]
            if suffix == "Model":
                found.append(getattr(taut, own).from_pretrained(whole))
                found.append(taut.AutoModel.from_pretrained(tmp_path / own))
            for model in found:
                got = model(given[key], output_hidden_states=True)
                assert list(got) == [k for k in want.keys() if want[k] is not None]  # noqa: SIM118
                for field, expected in fields({k: got[k] for k in got}).items():
                    close(expected, fields({k: want[k] for k in got})[field])
            found[0].save_pretrained(tmp_path / "again")
            saved, original = (
                load_file(f / "model.safetensors") for f in (tmp_path / "again", tmp_path / own)
            )
            # transformers keeps the names that the whole's files have.
            prefix = f"{half.lower()}_model."
            assert {n.removeprefix(prefix) for n in saved} == {n.removeprefix(prefix) for n in original}
            assert getattr(transformers, own).from_pretrained(tmp_path / "again") is not None
    with pytest.raises(ConfigError, match=f"is a '{case.family.lower()}' and not a 'vit'"):
        taut.ViTModel.from_pretrained(whole)


@torch.no_grad()
def test_features_and_masks_of_texts_equal_the_oracles():
    for name in ("clip", "siglip"):
        case = BY_NAME[name]
        model, reference, given = load(case), oracle(case, auto="AutoModel"), inputs(case, "AutoModel")
        texts = {"input_ids": given["input_ids"]}
        if name == "clip":
            texts["attention_mask"] = (given["input_ids"] != 7).long()
            texts["attention_mask"][torch.arange(3), (given["input_ids"] == 7).long().argmax(1)] = 1
        images = {"pixel_values": given["pixel_values"]}
        close(
            model.get_text_features(**texts).pooler_output, reference.get_text_features(**texts).pooler_output
        )
        close(
            model.get_image_features(**images).pooler_output,
            reference.get_image_features(**images).pooler_output,
        )
    mask = torch.ones_like(given["input_ids"])
    mask[0, 3:] = 0
    with pytest.raises(RequestError, match="this model was trained to see its padding: leave the mask out"):
        model.get_text_features(given["input_ids"], mask)
    with pytest.raises(RequestError, match="as many texts as images, and there are 2 texts and 3 images"):
        model(given["input_ids"][:2], given["pixel_values"], return_loss=True)
    with pytest.raises(RequestError, match="give input_ids"):
        model(pixel_values=given["pixel_values"])


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_from_files_of_images_to_scores(name, tmp_path):
    """The whole way: a processor reads what the test wrote, and the scores are transformers'."""
    case = BY_NAME[name]
    folder = checkpoint(case, CLASSIFIER)
    transformers.ViTImageProcessorPil(size=SIZE).save_pretrained(tmp_path)
    for index, kind_ in enumerate(("PNG", "JPEG")):
        (tmp_path / f"{index}").write_bytes(image_bytes(picture(40, 50, seed=index), kind_))
    paths = [str(tmp_path / name) for name in "01"]
    pixels = taut.AutoImageProcessor.from_pretrained(tmp_path)(paths, return_tensors="pt")
    theirs = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)(paths, return_tensors="pt")
    got = taut.AutoModelForImageClassification.from_pretrained(folder)(**pixels).logits
    close(got.detach(), oracle(case, auto=CLASSIFIER)(**theirs).logits.detach())


def test_what_is_wrong_is_named():
    model = load(BY_NAME["vit"])
    with pytest.raises(
        RequestError, match=r"pixel_values is torch.float32 \[1, 1, 24, 24\]; expected floats"
    ):
        model(torch.zeros(1, 1, SIZE, SIZE))
    with pytest.raises(RequestError, match="pictures of 5 x 24 pixels are smaller than a patch of 6 x 6"):
        model(torch.zeros(1, 3, 5, SIZE), interpolate_pos_encoding=True)
    with pytest.raises(
        ConfigError, match=r"'vit', a family of image encoders.*which AutoModelForCausalLM does not"
    ):
        taut.AutoModelForCausalLM.from_pretrained(checkpoint(BY_NAME["vit"], "AutoModel"))
    with pytest.raises(ConfigError, match="'patch_size' is"):
        taut.AutoModel.from_config({"model_type": "vit", **BY_NAME["vit"].base, "patch_size": 60})
    assert model(torch.zeros(0, 3, SIZE, SIZE)).last_hidden_state.shape == (0, 17, 48)
