"""GGUF containers: every block format against the gguf package, and every kind of damage refused."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taut.checkpoint import gguf as module
from taut.checkpoint import open_checkpoint
from taut.checkpoint.gguf import read_gguf
from taut.checkpoint.gguf_quants import FORMATS
from taut.errors import CheckpointError, ConfigError
from tests.checkpoint.gguf_files import assemble, entry, info, string, text_entry

QUANTIZED = [kind for kind, form in FORMATS.items() if form.decode]


def random_blocks(kind: int, count: int, seed: int = 0) -> np.ndarray:
    """`[count, size]` uint8 of random blocks whose float16 scales are ordinary numbers."""
    form = FORMATS[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (count, form.size), dtype=np.uint8)
    halves = {
        2: [0],
        3: [0, 2],
        6: [0],
        7: [0, 2],
        8: [0],
        10: [80, 82],
        11: [108],
        12: [0, 2],
        13: [0, 2],
        14: [208],
    }
    for at in halves[kind]:
        raw[:, at + 1] = (raw[:, at + 1] & 0x83) | 0x30  # exponent between 2^-3 and 2^-2
    return raw


def one_tensor(path: Path, raw: np.ndarray, shape: tuple[int, ...], kind: int) -> Path:
    path.write_bytes(assemble([], [info("t", shape, kind, 0)], raw.tobytes()))
    return path


def test_formats_match_the_gguf_package():
    for kind, form in FORMATS.items():
        assert gguf.GGMLQuantizationType(kind).name == form.name
        assert gguf.GGML_QUANT_SIZES[kind] == (form.block, form.size)
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType if kind.value not in FORMATS}
    assert names.items() <= module.OTHER_TYPES.items()


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: FORMATS[kind].name)
def test_dequantization_is_bit_equal_to_the_gguf_package(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1024)  # several chunks, the last one short
    form, row_blocks = FORMATS[kind], 3
    shape = (7, row_blocks * form.block)
    raw = random_blocks(kind, shape[0] * row_blocks)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))).reshape(shape)
    tensor = read_gguf(one_tensor(tmp_path / "t.gguf", raw, shape, kind))[1]["t"]

    assert (tensor.shape, tensor.dtype) == (shape, torch.float32)
    for start, stop in [(0, 7), (0, 1), (2, 5), (6, 7), (3, 3)]:
        assert torch.equal(tensor.read(start, stop), expected[start:stop])
    assert torch.isfinite(expected).all()
    flat = read_gguf(one_tensor(tmp_path / "f.gguf", raw, (expected.numel(),), kind))[1]["t"]
    assert torch.equal(flat.read(5, 300), expected.flatten()[5:300])


def test_plain_types_keep_their_dtype_and_bits(tmp_path):
    for kind, dtype in [(0, torch.float32), (1, torch.float16), (30, torch.bfloat16)]:
        value = torch.randn(5, 3, 2).to(dtype)
        raw = value.view(torch.uint8).numpy()
        tensor = read_gguf(one_tensor(tmp_path / "t.gguf", raw, (5, 3, 2), kind))[1]["t"]
        assert tensor.dtype == dtype
        assert torch.equal(tensor.read(), value)
        assert torch.equal(tensor.read(1, 4), value[1:4])


def test_a_read_touches_only_its_rows_in_bounded_pieces(tmp_path, monkeypatch):
    reads = []

    def recording(path, offset, count, read=module.read_bytes):
        reads.append((offset, count))
        return read(path, offset, count)

    raw = random_blocks(8, 4096)  # Q8_0, 64 rows of 2048 values, 64 blocks each
    tensor = read_gguf(one_tensor(tmp_path / "t.gguf", raw, (64, 2048), 8))[1]["t"]
    monkeypatch.setattr(module, "read_bytes", recording)
    monkeypatch.setattr(module, "CHUNK", 4096)
    tensor.read(10, 20)
    row = 64 * 34
    assert sum(count for _, count in reads) == 10 * row
    assert min(offset for offset, _ in reads) == tensor.offset + 10 * row
    assert max(count for _, count in reads) == 2 * row


def test_metadata_of_every_type(tmp_path):
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": True,
        "string": "ümlaut",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"k.{kind}", value)
    writer.add_array("k.strings", ["a", "", "日本"])
    writer.add_array("k.ints", [1, -2, 3])
    writer.add_array("k.nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_gguf(path)
    assert tensors == {}
    assert metadata == {
        "general.architecture": "llama",
        **{f"k.{kind}": value for kind, value in values.items()},
        "k.strings": ["a", "", "日本"],
        "k.ints": [1, -2, 3],
        "k.nested": [[1, 2], [3]],
    }


def test_headers_longer_than_the_first_read(tmp_path):
    words = [f"word{i}" * 20 for i in range(20_000)]
    path = tmp_path / "t.gguf"
    array = struct.pack("<IQ", 8, len(words)) + b"".join(map(string, words))
    path.write_bytes(assemble([entry("words", 9, array)], [info("t", (2,), 0, 0)], struct.pack("<2f", 1, 2)))
    metadata, tensors = read_gguf(path)
    assert metadata["words"] == words
    assert tensors["t"].read().tolist() == [1, 2]


def test_version_2_and_other_alignments(tmp_path):
    path = tmp_path / "t.gguf"
    data = struct.pack("<f", 1) + bytes(60) + struct.pack("<f", 2)
    for version, alignment in [(2, 64), (3, 64), (3, 8)]:
        entries = [entry("general.alignment", 4, struct.pack("<I", alignment))]
        infos = [info("b", (1,), 0, 64), info("a", (1,), 0, 0)]
        path.write_bytes(assemble(entries, infos, data, version=version, alignment=alignment))
        tensors = read_gguf(path)[1]
        assert [(name, tensor.read().item()) for name, tensor in tensors.items()] == [("b", 2), ("a", 1)]


FLOAT = struct.pack("<f", 1.0)
T = info("t", (1,), 0, 0)
HUGE = struct.pack("<Q", 2**63)
TEXT = struct.pack("<I", 8)
ONE_TEXT = struct.pack("<IQ", 8, 1)
NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(10)) + struct.pack("<IQ", 4, 0)

DAMAGED = {
    "empty": (b"", "truncated or corrupt"),
    "not gguf": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "only the magic": (b"GGUF", "truncated or corrupt"),
    "version 1": (assemble([], [], b"", version=1), "version 1 is not supported"),
    "version 4": (assemble([], [], b"", version=4), "version 4 is not supported"),
    "big endian": (assemble([], [], b"", version=3 << 24), "big-endian"),
    "tensor count": (assemble([], [T], FLOAT, tensor_count=2**60), "promises 1152921504606846976 tensors"),
    "one tensor too many": (assemble([], [T], FLOAT, tensor_count=2), None),
    "key count": (assemble([], [T], FLOAT, entry_count=2**40), "key-values"),
    "key length": (assemble([HUGE], [], bytes(64)), "a key of 9223372036854775808 bytes"),
    "string length": (assemble([string("k") + TEXT + HUGE], [], b""), "of 9223372036854775808 bytes"),
    "string past the end": (
        assemble([string("k") + struct.pack("<IQ", 8, 10_000) + bytes(64)], [], b""), "truncated or corrupt"
    ),
    "key not utf-8": (assemble([entry(b"\xff", 4, bytes(4))], [], b""), "not valid UTF-8"),
    "value not utf-8": (assemble([entry("k", 8, string(b"a\xc3"))], [], b""), "not valid UTF-8"),
    "element not utf-8": (
        assemble([entry("k", 9, ONE_TEXT + string(b"\xff"))], [], b""), "element 0 of 'k'"
    ),
    "value type": (assemble([entry("k", 13, bytes(8))], [], b""), "unknown value type 13"),
    "element type": (assemble([entry("k", 9, struct.pack("<IQ", 99, 1) + bytes(8))], [], b""), "type 99"),
    "array count": (assemble([entry("k", 9, struct.pack("<IQ", 0, 2**40))], [], b""), "elements of 'k'"),
    "string array count": (assemble([entry("k", 9, struct.pack("<IQ", 8, 2**40))], [], b""), "of 'k'"),
    "element length": (assemble([entry("k", 9, ONE_TEXT + HUGE)], [], bytes(64)), "truncated"),
    "nested arrays": (assemble([entry("k", 9, NESTED)], [], bytes(200)), "nests arrays"),
    "key twice": (assemble([text_entry("k", "a"), text_entry("k", "b")], [], b""), "'k' occurs twice"),
    "alignment zero": (assemble([entry("general.alignment", 4, bytes(4))], [T], FLOAT), "general.alignment"),
    "alignment odd": (
        assemble([entry("general.alignment", 4, struct.pack("<I", 12))], [T], FLOAT), "general.alignment"
    ),
    "alignment text": (assemble([text_entry("general.alignment", "x")], [T], FLOAT), "general.alignment"),
    "rank": (assemble([], [string("t") + struct.pack("<I", 2**31)], FLOAT), "2147483648 dimensions"),
    "tensor twice": (assemble([], [T, info("t", (1,), 0, 32)], bytes(64)), "'t' occurs twice"),
    "unaligned": (assemble([], [info("t", (1,), 0, 4)], bytes(64)), "not a multiple of 32"),
    "overlap": (assemble([], [info("a", (9,), 0, 0), info("b", (1,), 0, 32)], bytes(64)), "'b' overlaps 'a'"),
    "outside": (assemble([], [info("t", (1,), 0, 2**62)], bytes(64)), "truncated: 't' ends at"),
    "truncated": (assemble([], [info("t", (64, 4), 0, 0)], bytes(1023)), "truncated: 't' ends at byte"),
    "shape overflow": (assemble([], [info("t", (2**62, 2**62), 0, 0)], bytes(64)), "impossible shape"),
    "shape overflow to 0": (assemble([], [info("t", (2**32, 2**32), 0, 0)], bytes(64)), "impossible"),
    "block": (assemble([], [info("t", (4, 33), 8, 0)], bytes(4096)), "not a multiple of the block of 32"),
    "unknown type": (assemble([], [info("t", (1,), 77, 0)], bytes(64)), "'t' has the type 77"),
    "unread type": (assemble([], [info("t", (1, 256), 23, 0)], bytes(256)), "IQ4_XS.*known: F32, .*Q6_K"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_an_error_that_names_the_file(damage, tmp_path):
    raw, message = DAMAGED[damage]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 4 * 2**20


def test_every_truncation_is_an_error(tmp_path):
    whole = sound_file()
    path = tmp_path / "t.gguf"
    path.write_bytes(whole)
    expected = read_gguf(path)
    assert expected[1]["token_embd.weight"].shape == (4, 32)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def sound_file() -> bytes:
    entries = [
        text_entry("general.architecture", "llama"),
        *(
            entry(f"llama.{key}", 4, struct.pack("<I", value))
            for key, value in {
                "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
                "attention.head_count": 2, "attention.head_count_kv": 1,
            }.items()
        ),
        entry("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 4) + b"".join(string(t) for t in "abcd")),
    ]  # fmt: skip
    infos = [info("token_embd.weight", (4, 32), 8, 0), info("blk.0.attn_q.weight", (32, 32), 0, 160)]
    return assemble(entries, infos, bytes(160 + 4096))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_never_crashes(tmp_path, data):
    raw = bytearray(sound_file())
    header = len(raw) - 4096 - 160
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "t.gguf"
    path.write_bytes(bytes(raw))
    try:
        checkpoint = open_checkpoint(path)
    except (CheckpointError, ConfigError):
        return
    for tensor in checkpoint.tensors.values():
        assert tensor.read().shape == tensor.shape
