"""The cards that have a file in `memory/devices/`, found by whatever people call them.

The figures of a file are a datasheet's or assumptions, each with its source beside it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Optional

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from lowres.core.errors import InputError
from lowres.core.registry import did_you_mean

Dtype = Literal["float32", "tf32", "float16", "bfloat16"]
Bytes = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_FILES = Path(__file__).parent / "devices"


@dataclass(config=ConfigDict(extra="forbid", strict=True), frozen=True, kw_only=True)
class Device:
    """What a card offers. None where it is not known, or where there is no such thing.

    Args:
        total_bytes: As `torch.cuda.get_device_properties().total_memory` says.
        reserved_by_system_bytes: For displays and other programs, out of the total.
        context_bytes: Of the CUDA context after a training step, with lazy loading.
        context_band_bytes: How far off that may be, either way.
        rates: Dense FLOP/s of matrix products by dtype, accumulated in float32; a dtype that the
            card has no units for is absent. None means that no step time can be planned.
        pcie_bytes_per_second: In one direction, pinned.
        launch_seconds: Of the host, to dispatch one eager operation.
        sources: Field to where its figure comes from.
        uuid: Of the card at hand; None for one known by name.
        matmul_workspace_bytes: Measured for one cuBLAS handle; None: ask `device.workspace_bytes`.
        calibrated: Rates were reached here by large products and copies. Otherwise they are peaks
            that no program reaches.
        ignored: Why a calibration that is there is not used; empty where there is none.
    """

    name: str
    kind: Literal["cuda", "mps", "cpu"]
    total_bytes: Bytes
    reserved_by_system_bytes: Bytes
    context_bytes: Bytes
    context_band_bytes: Bytes
    sources: Mapping[str, str]
    compute_capability: Optional[tuple[int, int]] = None
    sms: Optional[int] = None
    bandwidth_bytes_per_second: Optional[Rate] = None
    rates: Optional[Mapping[Dtype, Rate]] = None
    pcie_bytes_per_second: Optional[Rate] = None
    launch_seconds: Optional[Rate] = None
    uuid: Optional[str] = None
    matmul_workspace_bytes: Optional[Bytes] = None
    calibrated: bool = False
    ignored: str = ""


def names() -> list[str]:
    """Of the cards that have a file, sorted."""
    return sorted(path.stem for path in _FILES.glob("*.yaml"))


@functools.cache
def load(name: str) -> Device:
    """The card of a file. Case, spaces, dashes, the maker's name, brand and size do not matter.

    Raises InputError where no card answers to the name, or more than one.
    """
    asked = _words(name)
    found = [n for n in names() if asked and asked <= _words(n) and _only_trimmings(n, asked)]
    if len(found) > 1:
        text = f"'{name}' may be {' or '.join(found)}; give one of them"
        raise InputError("--gpu", [text])
    if not found:
        near = did_you_mean(name.lower().replace(" ", "-"), names())
        text = (
            f"no card is named '{name}'{near or '; there are ' + ', '.join(names())}; "
            "`--device-gib N` plans for a size alone"
        )
        raise InputError("--gpu", [text])
    raw = yaml.safe_load((_FILES / f"{found[0]}.yaml").read_text(encoding="utf-8"))
    if "compute_capability" in raw:  # YAML has no tuples
        raw["compute_capability"] = tuple(raw["compute_capability"])
    return Device(**raw)


def _words(name: str) -> set[str]:
    """`NVIDIA GeForce RTX 4060 Ti 16 GB` to {rtx, 4060, ti, 16gb}."""
    text = re.sub(r"nvidia|geforce|tesla|\bgpu\b|sxm\d*|hbm\d*e?", " ", name.lower())
    text = re.sub(r"(\d+)[ -]*gi?b\b", r" \1gb ", text.replace("mobile", "laptop"))
    return set(re.findall(r"\d+gb|[a-z]+|\d+", text))


def _only_trimmings(file: str, asked: set[str]) -> bool:
    """Whether only brand and size are missing: `4070` is not the 4070 Ti, `4090` no laptop's."""
    return all(w in ("rtx", "gtx", "apple") or w.endswith("gb") for w in _words(file) - asked)
