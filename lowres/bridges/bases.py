"""Which base an adapter was trained beside: a digest that is kept with it, else the base's name."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowres.core.errors import InputError, Problem

FILE = "base.json"
READ_FROM = "lowres_read_from"
"""Attribute of a loaded model: the folder of its files. A hub id does not tell the revision."""
_LOOKED_AT = 64


def folder_of(location: str, revision: str | None) -> str | None:
    """Where a checkpoint's files lie: the folder itself, or that of a hub id in the cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(location).is_dir():
        return location
    found = try_to_load_from_cache(location, "config.json", revision=revision)
    return str(Path(found).parent) if isinstance(found, str) else None


def keep(adapted: Any, folder: Path) -> None:
    """Write the digest of an adapter's base beside it, where the base's files are at hand."""
    found = digest_of(adapted.get_base_model())
    if found is not None:
        (folder / FILE).write_text(json.dumps({"digest": found}) + "\n", encoding="utf-8")


def stop_at_other(model: Any, revision: str | None, adapter: Path) -> None:
    """Raise InputError when an adapter was trained beside another base than a model that was loaded
    from the recipe's checkpoint.

    By digests, wherever the folders lie; where an adapter has none, by the names of the two and
    what revision its configuration names. Of a base without a name nothing is known.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    name, wanted = config.get("base_model_name_or_path"), config.get("revision")
    ours, kept = digest_of(model), _kept(adapter)
    if ours is not None and kept is not None:
        if ours == kept:
            return
        why = (
            f"another base than '{model.name_or_path}', whose weights have the digest {ours}, not "
            f"{kept} (it was '{name}' then)"
        )
    elif name and model.name_or_path and not _same_place(name, model.name_or_path):
        why = f"'{name}', and the recipe's base is '{model.name_or_path}'"
    elif wanted and wanted != (revision or "main"):
        why = f"revision '{wanted}' of '{name}', and the recipe's is '{revision or 'main'}'"
    else:
        return
    text = (
        f"it was trained beside {why}; set model.checkpoint and model.revision to the base of that "
        "run, or, where you know the weights to be the same (moved, or in another format), say so: "
        "--same-base, or merge(..., same_base=True)"
    )
    raise InputError("merging", [Problem(str(adapter), text)])


def _kept(adapter: Path) -> str | None:
    try:
        return str(json.loads((adapter / FILE).read_text(encoding="utf-8"))["digest"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        text = "it holds no digest of the adapter's base; copy it again from the run, or delete it"
        raise InputError("merging", [Problem(str(adapter / FILE), text)]) from error


def _same_place(one: str, other: str) -> bool:
    if one == other:
        return True
    places = Path(one).expanduser(), Path(other).expanduser()
    return all(p.is_dir() for p in places) and places[0].resolve() == places[1].resolve()


def digest_of(model: Any) -> str | None:
    """Of all tensors' names, types and shapes and some bytes of each, however they are sharded.

    A large model is not read whole: 64 bytes from the middle of each tensor tell a model that was
    trained from what it was before, but not changes that are all elsewhere.
    """
    digest = hashlib.blake2b(digest_size=16)
    seen = sorted(entry for file in _files(model) for entry in _samples(file))
    for name, described, content in seen:
        digest.update(f"{name} {described} ".encode() + content)
    return digest.hexdigest() if seen else None


def _files(model: Any) -> list[Path]:
    """The safetensors that transformers reads for a model; none where they are not at hand."""
    place = getattr(model, READ_FROM, None) or model.name_or_path
    if not place:
        return []
    folder = Path(place)
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file() and index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [folder / name for name in names]
    return files if all(file.is_file() for file in files) else []


def _samples(file: Path) -> Iterator[tuple[str, str, bytes]]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            middle = start + max(0, (end - start) // 2 - _LOOKED_AT // 2)
            opened.seek(8 + length + middle)
            content = opened.read(min(_LOOKED_AT, end - middle))
            yield name, f"{entry['dtype']} {entry['shape']}", content
