"""Schedules, units, blocks, collating, ordering: the small exact things."""

from __future__ import annotations

import pytest
import torch

from lowres.core import registry, schedule, units
from lowres.core.blocks import Blocks
from lowres.core.errors import InputError
from lowres.core.example import IGNORED, Row, collate
from lowres.making.data import Order


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_equal_those_of_transformers(name: str) -> None:
    """Reference: transformers.get_scheduler, every update of a run of 37 with 5 of warm-up."""
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    known = "constant_with_warmup" if name == "constant" else name
    theirs = get_scheduler(known, optimizer, num_warmup_steps=5, num_training_steps=37)
    for step in range(37):
        expected = optimizer.param_groups[0]["lr"]
        assert schedule.factor(name, step, 37, 5) == pytest.approx(expected), step  # type: ignore[arg-type]
        optimizer.step()
        theirs.step()


def test_warmup_stable_decay_holds_and_falls() -> None:
    """Closed form: 1 until the last fifth, then linear to 1/20 at the last of 100 updates."""
    values = [schedule.factor("warmup_stable_decay", s, 100, 10) for s in range(100)]
    assert values[5] == 0.5 and set(values[10:80]) == {1.0}
    assert values[90] == pytest.approx(0.5) and values[99] == pytest.approx(0.05)


def test_sizes_are_powers_of_two() -> None:
    """Closed form."""
    assert units.format_bytes(1 << 30) == "1.00 GiB"
    assert units.format_bytes(1536) == "2 KiB" and units.format_bytes(None) == "-"
    assert units.gib_to_bytes(0.5) == 1 << 29
    assert units.format_seconds(3725) == "1:02:05" and units.format_seconds(0.0123) == "12.3 ms"


def test_blocks_say_where_training_is_allowed() -> None:
    """Behaviour: the head always, frozen blocks never,
    names as wholes (block 1 is not block 10).
    """
    names = tuple(f"layers.{i}" for i in range(11))
    blocks = Blocks(names, frozenset(names), ("embed",), ("head",))
    chosen = blocks.only(names[2:], train_stem=False)
    assert not chosen.trains("layers.1.weight") and chosen.trains("layers.10.weight")
    assert not chosen.trains("embed.weight") and chosen.trains("norm.weight")
    assert chosen.trains("head.weight") and chosen.frozen == ("layers.0", "layers.1")


def test_collating_pads_on_the_side_asked_for() -> None:
    """Closed form: two rows by hand."""
    rows = [Row("a", {"input_ids": [5, 6, 7]}, [1, 2, 3]), Row("b", {"input_ids": [8]}, [4])]
    right, left = collate(rows, 9), collate(rows, 9, "left")
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_stream_takes_every_row_once_in_each_pass() -> None:
    """Behaviour: over three passes each row comes three times, whatever the global batch."""
    order = Order([1] * 10, global_batch=4, updates=7, seed=3)
    stream = [i for step in range(7) for i in order.rows(step)]
    assert len(stream) == 28
    assert all(2 <= stream.count(i) <= 3 for i in range(10))
    assert stream == [i for s in range(7) for i in Order([1] * 10, 4, 7, 3).rows(s)]
    assert stream != [i for s in range(7) for i in Order([1] * 10, 4, 7, 4).rows(s)]


def test_the_two_longest_updates_come_first() -> None:
    """Behaviour: and the set of updates stays the same."""
    lengths = [3, 9, 1, 4, 8, 2, 7, 5]
    order = Order(lengths, global_batch=2, updates=4, seed=0)
    longest = [max(lengths[i] for i in order.rows(step)) for step in range(4)]
    assert longest[0] == 9 and longest[1] == max(longest[1:])
    assert sorted(i for s in range(4) for i in order.rows(s)) == list(range(8))


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    """Behaviour."""
    with pytest.raises(InputError, match="did you mean 'lora'"):
        registry.load("method", "lorra")
    with pytest.raises(InputError, match="'recipes'; there are tasks, methods, freezing, obj"):
        registry.family("recipes")
    with pytest.raises(InputError, match="no family is named 'metods'; did you mean 'method'"):
        registry.family("metods")
