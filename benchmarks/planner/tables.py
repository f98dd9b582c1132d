"""Fill the generated parts of docs/planning.md from records.

python -m benchmarks.planner.tables
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import page
from lowres.core.record import from_file
from lowres.core.units import GIB, format_bytes, gib_to_bytes
from lowres.memory import device as devices
from lowres.report.planner import HEADER, distribution, errors

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "planning.md"
RECORDS = ROOT / "benchmarks" / "records" / "planner"
CARDS = (8.0, 12.0, 16.0, 24.0)
TEN = (
    "SmolLM2-360M", "Qwen3-0.6B", "Llama-3.2-1B", "Qwen2.5-1.5B", "gemma-2-2b", "Llama-3.2-3B",
    "Phi-3-mini-4k-instruct", "Mistral-7B-v0.3", "Llama-3.1-8B", "Llama-2-13b",
)  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but the first column to the right."""
    line = "|---|" + "--:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(r) + " |" for r in (header, *rows)][:1] + [line]
                     + ["| " + " | ".join(r) + " |" for r in rows])  # fmt: skip


def truth() -> str:
    """Plans against runs on the CPU, by phase, and by kind of model."""
    files = sorted((RECORDS / "cpu").glob("*.json"))
    found = [(file.stem, from_file(file)) for file in files]
    rows = [row[2:] for row in distribution(errors([record for _, record in found]))]
    kinds = []
    for kind in ("decoder", "encoder", "seq2seq"):
        peaks = [e for name, r in found if name.startswith(kind) for e in errors([r])
                 if e.phase == "peak"]  # fmt: skip
        exact = sum(e.predicted_bytes == e.measured_bytes for e in peaks)
        worst = max(peaks, key=lambda e: abs(e.share)).share
        kinds.append([kind, str(len(peaks)), str(exact), f"{worst:+.3%}"])
    first = found[0][1].environment
    versions = first["versions"]
    return (
        f"{len(found)} recipes, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}.\n\n"
        + table(HEADER[2:], rows)
        + "\n\n"
        + table(("peak of the run", "recipes", "equal to the byte", "worst"), kinds)
    )


def _configs() -> dict[str, Any]:
    return dict(json.loads((RECORDS / "configs.json").read_text(encoding="utf-8")))


def depth() -> str:
    """The extended trace against the trace of every block."""
    rows, shares = [], []
    for key, entry in _configs().items():
        if "exact" not in entry or "refused" in entry["exact"]:
            continue
        short, whole = entry["plan"], entry["exact"]
        share = max(
            abs(short["live_bytes"][p] / whole["live_bytes"][p] - 1) for p in whole["live_bytes"]
        )
        shares.append(share)
        rows.append([
            key.rpartition(" ")[0], format_bytes(max(short["live_bytes"].values())),
            format_bytes(max(whole["live_bytes"].values())), f"{share:.4%}",
            f"{short['seconds']:.1f} s", f"{whole['seconds']:.1f} s", short["depth"],
        ])  # fmt: skip
    told = (
        f"{len(rows)} configurations, LoRA with checkpointing; largest error of any phase: "
        f"{max(shares):.4%}, median {statistics.median(shares):.4%}.\n\n"
    )
    header = ("configuration", "extended", "every block", "error", "took", "took, every block",
              "blocks traced")  # fmt: skip
    return told + table(header, rows)


def every() -> str:
    """What each configuration needs with each method, on an 80 GiB card."""
    found = _configs()
    names = list(dict.fromkeys(key.rpartition(" ")[0] for key in found))
    rows = []
    for name in names:
        row = [name]
        for method in ("full", "lora", "lora-nf4"):
            entry = found[f"{name} {method}"]["plan"]
            row.append("refused" if "refused" in entry else _gib(entry["needed_bytes"]))
        rows.append(row)
    refused = [f"- {key}: {entry['plan']['refused']}" for key, entry in found.items()
               if "refused" in entry["plan"]]  # fmt: skip
    header = ("configuration", "full", "LoRA", "LoRA over 4 bits")
    return table(header, rows) + ("\n\n" + "\n".join(refused) if refused else "")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def cards() -> str:
    """Which method fits which card, for ten models."""
    found = _configs()
    planned_for = devices.load("a100-80gb").context_bytes
    rows = []
    for name in TEN:
        row = [name]
        for size in CARDS:
            device = devices.generic(size)
            fitting = []
            for method, short in (("full", "full"), ("lora", "LoRA"), ("lora-nf4", "4-bit LoRA")):
                entry = found[f"{name} {method}"]["plan"]
                if "refused" in entry:
                    continue
                needed = entry["needed_bytes"] - planned_for + device.context_bytes
                if needed <= gib_to_bytes(size):
                    fitting.append(f"{short} {_gib(needed)}")
            row.append(", ".join(fitting) or "none")
        rows.append(row)
    return table(("model", *(f"{size:g} GiB" for size in CARDS)), rows)


def staircase() -> str:
    """Published and planned."""
    raw = json.loads((RECORDS / "staircase.json").read_text(encoding="utf-8"))
    rows = []
    for r in raw:
        planned = r.get("planned_gib")
        share = "-" if planned is None else f"{planned / r['published_gib'] - 1:+.0%}"
        rows.append([
            f"{r['model']} {r['row']}", f"{r['published_gib']:.1f}",
            "-" if planned is None else f"{planned:.1f}", share,
            "-" if planned is None else f"{r['of_it_logits_gib']:.1f}", r["why"],
        ])  # fmt: skip
    header = ("row", "published", "planned", "difference", "of it logits", "remark")
    return table(header, rows)


def speed() -> str:
    """What planning takes."""
    raw = json.loads((RECORDS / "speed.json").read_text(encoding="utf-8"))
    rows = [
        [r["what"], f"{r['planning_seconds']:.1f} s", f"{r['whole_seconds']:.1f} s",
         format_bytes(r["peak_resident_bytes"]), str(r["n"])]
        for r in raw["rows"]
    ]  # fmt: skip
    told = f"{raw['processor']}, {raw['cores']} cores; the median of n.\n\n"
    header = ("command", "planning", "from the start of the process", "resident memory", "n")
    return told + table(header, rows)


PARTS = {
    "truth": truth, "depth": depth, "every": every, "cards": cards, "staircase": staircase,
    "speed": speed,
}  # fmt: skip


def text() -> str:
    """The page with every generated part made anew."""
    made = PAGE.read_text(encoding="utf-8")
    for name, make in PARTS.items():
        made = page.put(made, name, make())
    return made
