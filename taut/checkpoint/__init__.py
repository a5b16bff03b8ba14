"""Checkpoints: lazy tensors in (safetensors folders, GGUF files), tensors out (safetensors)."""

from __future__ import annotations

from pathlib import Path

from taut.checkpoint.base import Checkpoint, Deferred, LazyTensor, listing, read_json
from taut.checkpoint.gguf_model import open_gguf
from taut.checkpoint.safetensors import INDEX, SINGLE, open_safetensors, parse_size, write_safetensors
from taut.errors import CheckpointError

__all__ = ["Checkpoint", "Deferred", "LazyTensor", "open_checkpoint", "parse_size", "write_safetensors"]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a folder with `config.json` and safetensors, or a `.gguf` file; reads headers only.

    Raises `CheckpointError` for what is missing, truncated, corrupt or unsafe to read (pickles are never
    opened), and `ConfigError` for GGUF metadata that Taut does not understand.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path}: a model is a folder or a .gguf file")
        return open_gguf(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; the folder holds: {listing(path)}{_ggufs(path)}")
    config = read_json(path / "config.json")
    if not (path / SINGLE).is_file() and not (path / INDEX).is_file():
        raise CheckpointError(_no_weights(path))
    generation = path / "generation_config.json"
    return Checkpoint(
        path=path,
        config=config,
        generation=read_json(generation) if generation.is_file() else {},
        tensors=open_safetensors(path),
    )


def _no_weights(folder: Path) -> str:
    message = f"{folder}: neither {SINGLE} nor {INDEX}; the folder holds: {listing(folder)}{_ggufs(folder)}"
    pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    if pickles:
        message += (
            ". Files like pytorch_model.bin are pickles, which can run code and are never opened: convert "
            "them once, in a place you trust, to safetensors (transformers: model.save_pretrained(folder))"
        )
    return message


def _ggufs(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.gguf"))
    return f". To load a GGUF file, name it: {folder / names[0]}" if names else ""
