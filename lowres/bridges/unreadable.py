"""Known reasons for which a checkpoint cannot be loaded, each with its mend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

Part = Literal["config", "tokenizer", "weights"]
_FILES: dict[Part, tuple[str, ...]] = {
    "config": ("config.json",),
    "tokenizer": ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json"),
    "weights": ("*.safetensors",),
}
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_POINTER = b"version https://git-lfs"


def known(location: str, is_hub: bool, part: Part, error: Exception) -> str | None:
    """What is wrong and how to mend it; None where only the error's own words can tell.

    Args:
        location: A folder or, with `is_hub`, a hub id.
        part: What was being read.
    """
    if "custom code" in str(error) and "trust_remote_code" in str(error):
        return (
            "its config names code that comes with it (auto_map), which is run only where that is "
            "asked for; read that code, then add --set model.trust_remote_code=true"
        )
    if not is_hub:
        return _of_folder(Path(location), part)
    if isinstance(error, SafetensorError):
        return (
            f"a file of its weights in the cache is damaged ({error}); fetch it again: "
            f"hf download {location} --force-download"
        )
    return None


def _of_folder(folder: Path, part: Part) -> str | None:
    files = list(_matching(folder, _FILES[part]))
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                return (
                    f"'{file.name}' is a git-lfs pointer and not the file itself; fetch it: "
                    f"git -C {folder} lfs pull"
                )
    if part == "tokenizer" and not files:
        return (
            "the folder holds no vocabulary of a tokenizer (tokenizer.json, tokenizer.model, "
            "vocab.txt or vocab.json); copy the tokenizer's files of the model that it was made "
            "from into it"
        )
    if part == "weights":
        unsafe = [] if files else [file.name for file in _matching(folder, _UNSAFE)]
        return _of_unsafe(folder, unsafe[0]) if unsafe else _of_damaged(files)
    return None


def _of_unsafe(folder: Path, name: str) -> str:
    # Each class of model reads its own names; AutoModel would drop the head.
    try:
        maker = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        maker = "AutoModelForCausalLM"
    return (
        f"No pickle is read, since loading it can run code, and its weights are one ({name}); "
        'where you trust it write model.safetensors beside it: python -c "import transformers; '
        f"transformers.{maker}.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def _of_damaged(files: list[Path]) -> str | None:
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            return f"'{file.name}' is damaged or cut off ({error}); fetch or copy it again"
    return None


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file())
