"""Safetensors in and out: against the safetensors library and transformers, and every kind of damage."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taut.checkpoint import Deferred, open_checkpoint, parse_size, write_safetensors
from taut.checkpoint import safetensors as module
from taut.checkpoint.safetensors import DTYPES, INDEX, SINGLE, open_safetensors, read_header
from taut.errors import CheckpointError

LIBRARY = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "U16",
    "U32",
    "U64",
    "F8_E4M3",
    "F8_E5M2",
]


def values() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, odd shapes, an empty one and a scalar."""
    torch.manual_seed(0)
    tensors = {
        name: (torch.rand(3, 5, 2) * 50).to(DTYPES[name]) if name != "BOOL" else torch.rand(3, 5, 2) > 0.5
        for name in LIBRARY
    }
    return tensors | {
        'a.weird "name" ü/日本': torch.randn(7),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "empty row": torch.empty(2, 0),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------------------------------------- reading


def test_reads_what_the_library_wrote(tmp_path):
    tensors = values()
    safetensors.torch.save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    lazy = open_safetensors(tmp_path)
    assert lazy.keys() == tensors.keys()
    for name, value in tensors.items():
        assert lazy[name].name == name
        assert lazy[name].shape == tuple(value.shape)
        assert lazy[name].dtype == value.dtype
        assert same(lazy[name].read(), value), name
        if value.dim():
            for start, stop in [(0, 0), (0, 1), (1, 2), (1, None)]:
                if start <= value.shape[0]:
                    count = value.shape[0] if stop is None else min(stop, value.shape[0])
                    assert same(lazy[name].read(start, count), value[start:count]), (name, start, stop)


def test_reads_are_fresh_memory_of_the_rows_asked_for(tmp_path, monkeypatch):
    value = torch.randn(1000, 16)
    write_safetensors(tmp_path, {"w": value})
    lazy = open_safetensors(tmp_path)["w"]
    reads = []

    def recording(path, offset, count, read=module.read_bytes):
        reads.append(count)
        return read(path, offset, count)

    monkeypatch.setattr(module, "read_bytes", recording)
    rows = lazy.read(10, 13)
    assert reads == [3 * 16 * 4]
    assert rows.untyped_storage().nbytes() == 3 * 16 * 4
    rows.zero_()
    assert same(lazy.read(), value)
    for start, stop in [(-1, 3), (4, 2), (0, 1001)]:
        with pytest.raises(CheckpointError, match=r"w: rows .* 1000 rows"):
            lazy.read(start, stop)


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = bytes(8)
DAMAGED = {
    "empty": (b"", "0 bytes is too short"),
    "seven bytes": (bytes(7), "7 bytes is too short"),
    "huge header": (header({}, length=2**63), "header of 9223372036854775808 bytes"),
    "just over the cap": (header({}, length=100_000_001), "more than the 100000000"),
    "header past the end": (header({}, length=5000), "needs 5008 bytes, the file has 10"),
    "not json": (header(b"{nope}"), "not valid JSON"),
    "not utf-8": (header(b'{"\xff": 1}'), "not valid JSON"),
    "not an object": (header([1]), "not a JSON object"),
    "leading space": (header(b" {}"), "not a JSON object"),
    "deep": (header(b'{"a":' * 100_000), "nested too deeply|not valid JSON"),
    "long number": (header(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "key twice": (
        header(b'{"t": %b, "t": %b}' % ((json.dumps(tensor()).encode(),) * 2), EIGHT),
        "'t' occurs twice",
    ),
    "metadata": (header({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry not an object": (header({"t": 3}), "'t' must have exactly"),
    "missing key": (header({"t": {"dtype": "F32", "shape": [2]}}), "'t' must have exactly"),
    "extra key": (header({"t": tensor() | {"x": 1}}, EIGHT), "'t' must have exactly"),
    "dtype unknown": (header({"t": tensor("F33")}, EIGHT), "dtype 'F33'; known: BF16, BOOL"),
    "dtype sub-byte": (header({"t": tensor("F4", (16,))}, EIGHT), "dtype 'F4'; known"),
    "dtype a list": (header({"t": tensor(["F32"])}, EIGHT), "dtype"),
    "shape a number": (header({"t": tensor(shape=2)}, EIGHT), "shape 2; expected a list"),
    "shape negative": (header({"t": tensor(shape=(-1, -2))}, EIGHT), "shape"),
    "shape float": (header({"t": tensor(shape=(2.0,))}, EIGHT), "shape"),
    "shape bool": (header({"t": tensor("U8", (True,), (0, 1))}, b"x"), "shape"),
    "shape infinite": (
        header(b'{"t":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', EIGHT),
        "shape",
    ),
    "shape rank": (header({"t": tensor("U8", (1,) * 17, (0, 1))}, b"x"), "at most 16"),
    "shape overflow": (header({"t": tensor("U8", (2**62, 4), (0, 0))}), "18446744073709551616 bytes"),
    "shape beyond 64 bits": (header({"t": tensor("U8", (2**64,), (0, 0))}), "shape"),
    "offsets short": (header({"t": tensor(offsets=(0,))}, EIGHT), "data_offsets"),
    "offsets backwards": (header({"t": tensor(offsets=(8, 0))}, EIGHT), "data_offsets"),
    "offsets negative": (header({"t": tensor(offsets=(-8, 0))}, EIGHT), "data_offsets"),
    "too few bytes": (
        header({"t": tensor(offsets=(0, 4))}, bytes(4)),
        "8 bytes, but its data_offsets span 4",
    ),
    "too many bytes": (header({"t": tensor(offsets=(0, 12))}, bytes(12)), "span 12"),
    "outside": (header({"t": tensor(offsets=(2**40, 2**40 + 8))}, EIGHT), "leaves a hole"),
    "overlap": (header({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)), "'b' .*overlaps"),
    "the same twice": (header({"a": tensor(), "b": tensor()}, EIGHT), "'b' .*overlaps"),
    "hole": (header({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20)), "'b' .*leaves a hole"),
    "hole in front": (header({"a": tensor(offsets=(4, 12))}, bytes(12)), "leaves a hole"),
    "truncated": (header({"t": tensor()}, bytes(7)), r"truncated: \d+ bytes expected, the file has \d+"),
    "bytes behind": (header({"t": tensor()}, bytes(9)), "more than its tensors"),
    "bytes behind nothing": (header({}, b"x"), "more than its tensors"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_an_error_that_names_the_file(damage, tmp_path):
    raw, message = DAMAGED[damage]
    path = tmp_path / SINGLE
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        open_safetensors(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 8 * 2**20


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    write_safetensors(tmp_path, {"w": torch.zeros(100)})
    lazy = open_safetensors(tmp_path)["w"]
    os.truncate(tmp_path / SINGLE, lazy.offset + 150)
    with pytest.raises(CheckpointError, match="250 bytes short"):
        lazy.read()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_never_crashes(tmp_path, data):
    path = tmp_path / "t.safetensors"
    good = {
        "a": tensor("BF16", (2, 3), (0, 12)),
        "b": tensor("F32", (), (12, 16)),
        "c": tensor("I8", (4,), (16, 20)),
    }
    raw = bytearray(header(good, bytes(20)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 21))
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    for lazy in tensors.values():
        assert lazy.read().shape == lazy.shape


# --------------------------------------------------------------------------------------------- sharding


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {f"w{i}": torch.randn(100) for i in range(5)}
    write_safetensors(folder, tensors, max_shard_size=900)
    return tensors


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


SHARD_1, SHARD_2 = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
BAD_INDEXES = {
    "parent": (
        lambda m: m.update(w0="../secret.safetensors"),
        "'../secret.safetensors'; it must be the plain name",
    ),
    "absolute": (lambda m: m.update(w0="/etc/passwd"), "plain name"),
    "windows": (lambda m: m.update(w0="..\\x.safetensors"), "plain name"),
    "drive": (lambda m: m.update(w0="c:x.safetensors"), "plain name"),
    "below": (lambda m: m.update(w0="sub/x.safetensors"), "plain name"),
    "dots": (lambda m: m.update(w0=".."), "plain name"),
    "nul": (lambda m: m.update(w0="a\0.safetensors"), "plain name"),
    "no name": (lambda m: m.update(w0=""), "plain name"),
    "number": (lambda m: m.update(w0=7), "plain name"),
    "pickle": (lambda m: m.update(w0="pytorch_model.bin"), "only .safetensors"),
    "missing shard": (lambda m: m.update(w0="model-00009-of-00009.safetensors"), "1 of 4 shards are missing"),
    "not in its shard": (lambda m: m.update(w9=SHARD_1), "says that w9 is in"),
    "in another shard": (lambda m: m.update(w0=SHARD_2), f"holds w0, which .* places in {SHARD_2}"),
    "not listed": (lambda m: m.pop("w0"), "holds w0, which .* does not list"),
    "empty": (lambda m: m.clear(), "weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index_is_refused(case, tmp_path):
    change, message = BAD_INDEXES[case]
    sharded(tmp_path)
    edit_index(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(tmp_path)


def test_a_truncated_shard_says_expected_and_actual(tmp_path):
    sharded(tmp_path)
    size = (tmp_path / SHARD_2).stat().st_size
    os.truncate(tmp_path / SHARD_2, size - 1)
    with pytest.raises(
        CheckpointError, match=f"{SHARD_2}: truncated: {size} bytes expected, the file has {size - 1}"
    ):
        open_safetensors(tmp_path)


# ---------------------------------------------------------------------------------------------- writing


def test_the_library_reads_what_was_written(tmp_path):
    tensors = values()
    assert write_safetensors(tmp_path, tensors) == [tmp_path / SINGLE]
    back = safetensors.torch.load_file(tmp_path / SINGLE)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert same(back[name], value), name
    with safetensors.safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for lazy in read_header(tmp_path / SINGLE).values():
        assert lazy.offset % lazy.dtype.itemsize == 0


def test_shards_are_named_indexed_and_deterministic(tmp_path):
    tensors = sharded(tmp_path / "a")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)] + [INDEX]
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"]["w2"] == SHARD_2
    merged = {}
    for name in names[:3]:
        merged |= safetensors.torch.load_file(tmp_path / "a" / name)
    assert all(same(merged[name], value) for name, value in tensors.items())
    lazy = open_safetensors(tmp_path / "a")
    assert list(lazy) == list(tensors)

    written = write_safetensors(tmp_path / "b", lazy.values(), max_shard_size=900)
    assert [path.name for path in written] == names[:3]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_one_tensor_at_a_time_and_none_before_its_turn(tmp_path):
    alive = []

    class Counted(torch.Tensor):
        pass

    def make(i):
        def build():
            import weakref

            value = torch.full((1000,), float(i))
            assert all(reference() is None for reference in alive)
            alive.append(weakref.ref(value))
            return value

        return build

    sources = [Deferred(f"w{i}", (1000,), torch.float32, make(i)) for i in range(6)]
    write_safetensors(tmp_path, sources, max_shard_size=9000)
    assert len(alive) == 6
    lazy = open_safetensors(tmp_path)
    assert [lazy[f"w{i}"].read(5, 6).item() for i in range(6)] == [0, 1, 2, 3, 4, 5]


def test_shared_strided_and_large_tensors(tmp_path):
    base = torch.randn(8, 6)
    tensors = {
        "base": torch.nn.Parameter(base), "same": base, "transposed": base.t(), "part": base[2:4, ::2],
        "wide": base[:1].expand(5, 6),
    }  # fmt: skip
    files = write_safetensors(tmp_path, tensors, max_shard_size=100)
    assert len(files) == 5  # most are larger than a shard: each has its own
    back = {name: lazy.read() for name, lazy in open_safetensors(tmp_path).items()}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_an_earlier_save_is_replaced_whole(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first, second = (
        {"a": torch.zeros(100), "b": torch.zeros(100)},
        {"a": torch.ones(100), "c": torch.ones(100)},
    )
    for size, tensors in [(400, first), ("1MB", second), (400, first), (800, second), (400, second)]:
        write_safetensors(tmp_path, tensors, max_shard_size=size)
        back = open_safetensors(tmp_path)
        assert {name: lazy.read(0, 1).item() for name, lazy in back.items()} == {
            name: value[0].item() for name, value in tensors.items()
        }
        weights = {path.name for path in tmp_path.iterdir()} - {"config.json"}
        assert weights == (
            {SINGLE} if size != 400 else {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)} | {INDEX}
        )


def fails() -> torch.Tensor:
    raise RuntimeError("out of memory")


UNWRITABLE = {
    "shape": (
        lambda: [Deferred("w", (3,), torch.float32, lambda: torch.zeros(4))],
        CheckpointError,
        "announced as",
    ),
    "dtype": (
        lambda: [Deferred("w", (3,), torch.float16, lambda: torch.zeros(3))],
        CheckpointError,
        "announced as",
    ),
    "meta": (lambda: {"w": torch.zeros(3, device="meta")}, CheckpointError, "meta device"),
    "twice": (
        lambda: [("w", torch.zeros(1)), ("w", torch.zeros(1))],
        CheckpointError,
        "two tensors named 'w'",
    ),
    "reserved": (lambda: {"__metadata__": torch.zeros(1)}, CheckpointError, "__metadata__"),
    "no such dtype": (lambda: {"w": torch.zeros(1, dtype=torch.complex128)}, CheckpointError, "complex128"),
    "failing": (lambda: [Deferred("w", (3,), torch.float32, fails)], RuntimeError, "out of memory"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_failed_save_leaves_what_was_there(case, tmp_path):
    make, kind, message = UNWRITABLE[case]
    write_safetensors(tmp_path, {"old": torch.ones(2)})
    with pytest.raises(kind, match=message):
        write_safetensors(tmp_path, make())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert open_safetensors(tmp_path)["old"].read().tolist() == [1, 1]


def test_sizes():
    known = {
        "5GB": 5 * 10**9,
        "500MB": 5 * 10**8,
        "2GiB": 2 * 2**30,
        "1.5kb": 1500,
        "10": 10,
        7: 7,
        "3 MB": 3 * 10**6,
    }
    assert {size: parse_size(size) for size in known} == known
    for size in ["", "GB", "-5GB", "5 XB", "5iB", 0, -1, "0"]:
        with pytest.raises(CheckpointError):
            parse_size(size)


# --------------------------------------------------------------------------------------------- folders


def test_a_folder_that_transformers_saved(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model = transformers.LlamaForCausalLM(config)
    for size in ("5GB", "10KB"):
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        checkpoint = open_checkpoint(str(folder))
        assert checkpoint.path == folder
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.generation.keys() >= {"eos_token_id"}
        assert checkpoint.metadata == {}
        expected = model.state_dict()
        assert checkpoint.tensors.keys() == expected.keys()
        assert all(same(lazy.read(), expected[name]) for name, lazy in checkpoint.tensors.items())

        write_safetensors(folder, checkpoint.tensors.values(), max_shard_size="20KB")  # over itself
        again = transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
        assert all(same(again[name], value) for name, value in expected.items())


FOLDERS = {
    "missing": (None, "no such file or folder"),
    "empty": ({}, "no config.json; the folder holds: nothing"),
    "no config": (
        {SINGLE: "", "readme.txt": ""},
        "no config.json; the folder holds: model.safetensors, readme.txt",
    ),
    "no weights": ({"config.json": "{}"}, "neither model.safetensors nor model.safetensors.index.json"),
    "pickle": ({"config.json": "{}", "pytorch_model.bin": ""}, "pickles.*never opened: convert"),
    "gguf": ({"m.Q4_0.gguf": ""}, "To load a GGUF file, name it: .*m.Q4_0.gguf"),
    "bad config": ({"config.json": "{,}", SINGLE: ""}, "config.json: not valid JSON"),
    "config a list": (
        {"config.json": "[]", SINGLE: ""},
        "config.json: a JSON object was expected, found list",
    ),
    "bad index": ({"config.json": "{}", INDEX: "{}"}, "'weight_map' must be"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_model_says_what_is_there(case, tmp_path):
    files, message = FOLDERS[case]
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(CheckpointError, match=r"a folder or a \.gguf file"):
        open_checkpoint(tmp_path / "model.bin")
