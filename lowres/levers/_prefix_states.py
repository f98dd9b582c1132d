"""The states that a frozen prefix hands on, of every training token: made once, then looked up.

Shapes: B rows, T tokens of a batch, N tokens of all training rows, D hidden.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch._subclasses.fake_tensor import is_fake

from lowres.bridges.prefix_cache import refuse
from lowres.core.errors import InputError, LowresError, Problem
from lowres.core.example import Batch, Row, collate
from lowres.core.units import format_bytes, format_seconds, gib_to_bytes
from lowres.levers import _prefix_file as files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lowres.bridges.prefix_cache import Prefix
    from lowres.core.learner import Learner

_DISTANCE = 0.02
"""Of two passes over a row, relative: far above rounding in bfloat16, far below dropout or other
positions."""


class PrefixStates:
    """Called with tokens' places in the training rows, it gives their states.

    Args:
        rows: All training rows, in the data set's order.
        side: On which a batch is padded in training.
        disk_gib: The file's largest size; None for what is free.
        folder: Where files lie.
    """

    def __init__(
        self,
        prefix: Prefix,
        learner: Learner,
        rows: Sequence[Row],
        side: Literal["left", "right"],
        disk_gib: float | None,
        folder: Path,
    ) -> None:
        self._prefix, self._learner, self._rows, self._side = prefix, learner, rows, side
        self._disk_gib, self._folder = disk_gib, folder
        self._ids_N = np.concatenate([np.asarray(row.inputs["input_ids"]) for row in rows])
        self._pad_id = int(learner.tokenizer.pad_token_id)
        self._width, self._ready = 0, False
        self._dtype: torch.dtype | None = None
        self._table: NDArray[Any] | None = None

    def __call__(self, where: torch.Tensor, batch: Batch) -> torch.Tensor:
        """States (B, T, D) of the tokens at these places (B, T); arbitrary ones where there is
        padding, which nothing looks at."""
        self._prefix.stop_if_trained()
        if not self._ready:
            self._begin(where.device, where.numel())
            # Not before: running out of memory meanwhile begins again.
            self._ready = True
        shape = (*where.shape, self._width)
        host = torch.empty(shape, dtype=self._dtype)
        if self._table is not None:
            places = where.cpu().numpy()
            self._stop_at_other_tokens(places, batch)
            # `clip` writes into `out` directly; no place is outside.
            np.take(self._table, places, axis=0, out=_integers(host), mode="clip")
            files.let_go(self._table)
        return host.to(where.device)

    def _stop_at_other_tokens(self, places: NDArray[Any], batch: Batch) -> None:
        differ = self._ids_N[places] != batch["input_ids"].cpu().numpy()
        mask = batch.get("attention_mask")
        if mask is not None:
            differ &= mask.cpu().numpy() != 0
        if differ.any():
            raise LowresError(
                "a batch holds other tokens than the training rows whose states are kept on disk; "
                "drop the lever 'frozen_prefix_cache'"
            )

    def _begin(self, device: torch.device, elements: int) -> None:
        """Read the file, or make it.

        Args:
            elements: Padded tokens of a batch that the device has room for.
        """
        probe = self._probe(device)
        self._width, self._dtype = probe.shape[-1], probe.dtype
        kind = str(probe.dtype).removeprefix("torch.")
        tokens = len(self._ids_N)
        size = files.size_bytes(tokens, self._width, kind)
        if self._disk_gib is not None and size > gib_to_bytes(self._disk_gib):
            text = (
                f"{self._disk_gib} is less than the {format_bytes(size)} that the states of "
                f"{tokens} tokens take ({self._width} numbers each); raise it, or drop the lever "
                "'frozen_prefix_cache'"
            )
            raise InputError("the recipe", [Problem("budget.disk_gib", text)])
        if is_fake(probe):
            # What is planned is the run that makes the file; its largest batch comes first.
            next(self._made(device, elements))
            return
        described = self._described(device, kind)
        path = self._folder / files.name_of(described)
        try:
            self._table = files.open_table(path, tokens, self._width, kind)
            self._say(f"read from {path}")
            return
        except FileNotFoundError:
            again = ""
        except files.Broken as broken:
            again = f"; the file that was there was made anew: {broken}"
        began = time.monotonic()
        made = (portion for batch in self._made(device, elements) for portion in batch)
        files.write_table(path, tokens, self._width, kind, described, made)
        self._table = files.open_table(path, tokens, self._width, kind)
        took = format_seconds(time.monotonic() - began)
        self._say(f"{format_bytes(size)} written to {path} in {took}{again}")

    def _say(self, what: str) -> None:
        count, rows = len(self._prefix.names), len(self._rows)
        told = f"outputs of the {count} frozen blocks for {rows} rows: {what}"
        self._learner.remarks.append(told)

    def _probe(self, device: torch.device) -> torch.Tensor:
        """The states (1, T, D) of the shortest row.

        Raises:
            InputError: When something below is trained, or the states are not the row's alone.
        """
        row = min(self._rows, key=lambda row: row.length)
        with torch.enable_grad():
            alone = self._prefix.states(self._batch([row], device))
        if _trains(alone):
            refuse("something is trained below the frozen blocks; drop the lever")
        if is_fake(alone):
            return alone.detach()
        with torch.no_grad():
            wider = self._prefix.states(self._batch([row], device, padding=3))
        again, first = self._own(row, wider[0]).float(), alone.detach()[0].float()
        apart = float((again - first).norm() / first.norm())
        if not apart < _DISTANCE:
            refuse(
                f"the outputs of the frozen blocks for a row depend on its padding or on chance "
                f"(two passes are {apart:.0%} apart); drop the lever"
            )
        return alone.detach()

    def _batch(self, rows: Sequence[Row], device: torch.device, padding: int = 0) -> Batch:
        """Model arguments of rows, padded to the longest and so many tokens more."""
        batch = collate(rows, self._pad_id, self._side)
        del batch["labels"]
        if padding:
            sides = (padding, 0) if self._side == "left" else (0, padding)
            pads = {key: self._pad_id if key == "input_ids" else 0 for key in batch}
            batch = {key: torch.nn.functional.pad(t, sides, value=pads[key])
                     for key, t in batch.items()}  # fmt: skip
        return {key: tensor.to(device) for key, tensor in batch.items()}

    def _made(
        self, device: torch.device, elements: int
    ) -> Iterator[list[tuple[int, NDArray[Any]]]]:
        """Batch after batch, longest rows first: the states (T, D) of each row, and its start."""
        order = sorted(self._rows, key=lambda row: -row.length)
        while order:
            count = max(1, elements // order[0].length)
            rows, order = order[:count], order[count:]
            with torch.no_grad():
                states = self._prefix.states(self._batch(rows, device))
            # Copied, for the next batch must not find this one's states in memory.
            yield (
                []
                if is_fake(states)
                else [
                    (row.start or 0, _integers(self._own(row, one.cpu())).copy())
                    for row, one in zip(rows, states, strict=True)
                ]
            )
            del states

    def _own(self, row: Row, states: torch.Tensor) -> torch.Tensor:
        """A row's own part of states (T, D) with padding."""
        return states[-row.length :] if self._side == "left" else states[: row.length]

    def _described(self, device: torch.device, kind: str) -> dict[str, str]:
        from lowres.bridges.prefix_cache import digest_of

        rows = hashlib.blake2b(digest_size=16)
        for row in self._rows:
            for key in sorted(row.inputs):
                rows.update(f"{key} {row.length} ".encode())
                rows.update(np.asarray(row.inputs[key], dtype=np.int64).data)
        found = digest_of(self._prefix, self._learner.tokenizer, device)
        return {**found, "rows": rows.hexdigest(), "padding": self._side, "kind": kind}


def _integers(states: torch.Tensor) -> NDArray[Any]:
    """The same bytes as integers of that width, which numpy has."""
    found: NDArray[Any] = states.view(
        {8: torch.int64, 4: torch.int32, 2: torch.int16}[states.element_size()]
    ).numpy()
    return found


def _trains(made: torch.Tensor) -> bool:
    """Whether a parameter had a part in it that would get a gradient."""
    # Not `requires_grad`: recomputing with PEFT makes the embeddings' output want one.
    nodes: list[Any] = [made.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if isinstance(getattr(node, "variable", None), torch.nn.Parameter):
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False
