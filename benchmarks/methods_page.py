"""The tables of docs/methods.md, from the methods' own words and `benchmarks.methods`' records."""

from __future__ import annotations

import re
from typing import Any

from benchmarks import page
from benchmarks.levers import ROOT
from benchmarks.methods import FULL, SHAPE, records
from lowres.core import registry
from lowres.core.units import format_bytes

PAGE = ROOT / "docs" / "methods.md"
NOTABLE = 0.9
"""A method is said to save what it needs at most this share of, beside full fine-tuning."""


def taxonomy_table(records: dict[str, dict[str, Any]]) -> str:
    """A line for every method of the registry."""
    rows = [
        "| method | class | paper | trained | of the model | merges | over 4 and 8 bits "
        "| learning rates |",
        "|---|---|---|--:|--:|---|---|--:|",
    ]
    methods: dict[str, Any] = {n: registry.load("method", n) for n in registry.names("method")}
    for name, cls in sorted(methods.items(), key=lambda item: (item[1].taxonomy, item[0])):
        record = records.get(name, {})
        trained, share = "-", "-"
        if "trainable" in record:
            trained = f"{record['trainable']:,}"
            share = f"{record['trainable'] / record['parameters']:.2%}"
        low, high = cls.learning_rate_hint
        rows.append(
            f"| `{name}` | {cls.taxonomy} | {_paper(name)} | {trained} | {share} "
            f"| {'yes' if cls.mergeable else 'no'} | {_over_few_bits(cls)} | {low:g} to {high:g} |"
        )
    return "\n".join(rows)


def _over_few_bits(cls: Any) -> str:
    """Whether the method works beside weights in 4 and 8 bits, or in which of them."""
    taken = [{"nf4": "4 bits", "int8": "8 bits"}[kind] for kind in cls.few_bits()]
    return {0: "no", 1: f"{''.join(taken)} only", 2: "yes"}[len(taken)]


def _paper(name: str) -> str:
    """Authors and year, linked; `none` where the method has no paper."""
    text = re.search(
        r"^Paper: (.*?)(?:\n\n|\Z)", registry.docstring("method", name), re.DOTALL | re.MULTILINE
    )
    if text is None:
        return "none"
    words = " ".join(text[1].split())
    link = re.search(r"https?://\S+", words)
    told = words.partition(" http")[0].rstrip(".").replace("|", "/")
    if link is None:
        return told.partition(";")[0]
    # What a paper calls the method may follow the year.
    who = re.search(r", ([^,]+ \d{4})(?: \(|$)", told)
    return f"[{who[1] if who else told}]({link[0].rstrip('.')})"


def memory_table(records: dict[str, dict[str, Any]]) -> str:
    """Measured bytes, the planner's beside them, and what is saved beside full fine-tuning."""
    measured = {n: r["measured"] for n, r in records.items() if "measured" in r}
    if FULL not in measured:
        return "Nothing was measured yet."
    full, told = measured[FULL], records[FULL]["environment"]
    rows = [
        "| method | activations | gradients | optimizer states | added weights | peak | planned "
        "| saves | does not save |",
        "|---|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for name, figures in sorted(measured.items(), key=lambda item: item[1]["peak_bytes"]):
        saves, not_ = saved(figures, full)
        rows.append(
            f"| `{name}` | {format_bytes(figures['saved_bytes'])} "
            f"| {format_bytes(figures['gradient_bytes'])} "
            f"| {format_bytes(figures['state_bytes'])} | {format_bytes(figures['added_bytes'])} "
            f"| {format_bytes(figures['peak_bytes'])} "
            f"| {format_bytes(records[name]['planned']['peak_bytes'])} | {saves} | {not_} |"
        )
    head = (
        f"OPT of {SHAPE['blocks']} blocks, width {SHAPE['hidden']}, {SHAPE['rows']} rows of "
        f"{SHAPE['tokens']} tokens, float32, AdamW; on {told['device']}, torch "
        f"{told['versions']['torch']}. Live bytes; the peak is that of the updates, the weights "
        "among it."
    )
    out = [head, "", *rows]
    refused = {n: r["refused"] for n, r in records.items() if "refused" in r}
    out += ["", *(f"`{n}` is not in the table: {why}" for n, why in sorted(refused.items()))]
    return "\n".join(out).rstrip()


def saved(figures: dict[str, int], full: dict[str, int]) -> tuple[str, str]:
    """In words, what is at most `NOTABLE` of full fine-tuning's, and what is not."""
    parts = {
        "gradients and states": ("gradient_bytes", "state_bytes"),
        "activations": ("saved_bytes",),
    }
    saves, not_ = [], []
    for word, keys in parts.items():
        share = sum(figures[k] for k in keys) / sum(full[k] for k in keys)
        (saves if share <= NOTABLE else not_).append(f"{word} ({share:.0%})")
    return ", ".join(saves) or "nothing", ", ".join(not_) or "-"


def text() -> str:
    """The page with the tables of the records."""
    made, found = PAGE.read_text(encoding="utf-8"), records()
    for name, table in (("methods", taxonomy_table), ("methods' memory", memory_table)):
        made = page.put(made, name, table(found))
    return made
