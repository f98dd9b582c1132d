"""Frozen weights that stream from memory or from files: equal results, the bytes of two blocks, the
plan of a card."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowres
from lowres.bridges.streaming import streamed_of, streamed_tensors
from lowres.core.errors import InputError
from lowres.making.build import build
from lowres.memory import device as devices
from lowres.memory.held import held
from lowres.memory.live import LiveBytes
from lowres.planning.plan import plan
from lowres.run.merging import merge
from tests.core.test_disk import MAPS, file_of
from tests.planning.conftest import config_folder, planned_recipe  # noqa: F401

TINY = {"checkpoint": "package:lowres/assets/tiny_lm"}
LORA: dict[str, Any] = {"method": {"name": "lora", "targets": "all-linear"}}
LEVER = "frozen_offload"
DISK: Any = {"name": LEVER, "place": "disk"}
# Kind, levers around it, what else is changed.
RUNS: dict[str, tuple[str, list[str], list[str], dict[str, Any]]] = {
    "encoder": ("encoder", [], [], LORA),
    "4 bits, then recomputed": ("decoder", ["nf4_weights"], ["gradient_checkpointing"], LORA),
    "recomputed, then 4 bits": ("decoder", ["gradient_checkpointing"], ["nf4_weights"], LORA),
    "frozen prefix": ("encoder_decoder", [], [], {"freezing": {"name": "prefix", "frozen": 2}}),
}
CASES = [(case, LEVER) for case in RUNS]
CASES += [("4 bits, then recomputed", DISK), ("frozen prefix", DISK)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test's files lie while they are used; nothing is in it."""
    monkeypatch.setenv("LOWRES_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "frozen_offload"


@pytest.mark.parametrize(("case", "lever"), CASES)
def test_planned_bytes_are_measured_bytes_and_the_run_is_the_same(
    case: str, lever: Any, recipe: Callable[..., Any], in_folder: Path, folder: Path
) -> None:
    """Reference: the run on the CPU, to the byte; its losses, scores and saved tensors without the
    lever, exactly: a copy of a weight is multiplied with as the weight is. No file is left."""
    kind, before, after, changes = RUNS[case]
    record = lowres.run(
        recipe(kind, levers=[*before, lever, *after], **changes), quiet=True, output_folder="out"
    )
    assert record.plan is not None, record.events
    assert (record.plan["disk_bytes"] > 0) == folder.exists() == (lever is DISK)
    assert not folder.exists() or not list(folder.iterdir())
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase
    without = lowres.run(
        recipe(kind, levers=[*before, *after], **changes), quiet=True, output_folder="without"
    )
    assert record.losses == without.losses
    assert [s.value for s in record.scores] == [s.value for s in without.scores]
    (ours,), (theirs,) = (Path(f, "model").glob("*.safetensors") for f in ("out", "without"))
    saved = load_file(theirs)
    assert all(torch.equal(t, saved.pop(name)) for name, t in load_file(ours).items())
    assert not saved


def test_a_run_from_files_resumes_and_merges(
    recipe: Callable[..., Any], in_folder: Path, folder: Path
) -> None:
    """Reference: the losses of the uninterrupted run, and the model merged from one that held its
    weights in memory, bit for bit. The files are written again."""
    loop = {"steps": 4, "save_every": 2}
    whole = lowres.run(recipe(loop=loop, **LORA), quiet=True, plan=False, output_folder="whole")
    one = recipe(loop=loop, levers=[DISK], **LORA)
    lowres.run(one, quiet=True, plan=False, output_folder="out")
    again = lowres.run(one, quiet=True, plan=False, resume=str(Path("out", "checkpoint-2")))
    assert again.losses == whole.losses
    assert [e.kind for e in again.events].count("lever") == 2
    for name in ("whole", "out"):
        merge(one, Path(name, "model"), Path(name, "merged"))
    saved = load_file(Path("whole", "merged", "model.safetensors"))
    ours = load_file(Path("out", "merged", "model.safetensors"))
    assert all(torch.equal(t, saved[name]) for name, t in ours.items()) and len(ours) == len(saved)
    assert not list(folder.iterdir())


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")
@pytest.mark.parametrize("levers", [[DISK], ["nf4_weights", DISK]])
def test_what_waits_on_disk_is_mapped_and_let_go(
    levers: list[Any], recipe: Callable[..., Any], folder: Path
) -> None:
    """Behaviour: as the system tells it, in one file a block; after a pass in each direction no
    page of them is in the process's memory, and they have the values of the plain model."""
    one = recipe(model=TINY, levers=levers, objective="label_words", **LORA)
    built = build(one)
    streamed = streamed_of(built.model)
    assert streamed is not None
    hosts = [slot.host for block in streamed.blocks for slot in block]
    files = {file_of(tensor) for tensor in hosts}
    assert len(files) == 6 and all(str(folder) in file for file in files)
    built.model.train()
    one.objective.loss(built.learner, built.collator(built.train_rows[:2])).backward()
    assert resident_kib(folder) == 0
    plain = build(recipe(model=TINY, levers=levers[:-1], objective="label_words", **LORA))
    values = dict(plain.model.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in built.model.named_parameters())


def resident_kib(folder: Path) -> int:
    """What of the files of a folder is in the process's memory, as the system tells it."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.parametrize("resident", [2, 3])
@pytest.mark.parametrize("before", [[], ["nf4_weights"], ["gradient_checkpointing"]])
def test_only_the_resident_blocks_are_copied(
    before: list[str], resident: int, recipe: Callable[..., Any]
) -> None:
    """Closed form: after a forward pass, and at the end of the backward one, what is alive is what
    is without the lever, less the weights on the host and with the copies of `resident` of the
    six blocks: autograd keeps no other."""
    alive = []
    lever = {"name": LEVER, "resident": resident}
    for levers in (before, [*before, lever]):
        one = recipe(model=TINY, levers=levers, objective="label_words", **LORA)
        built = build(one)
        built.model.train()
        batch = built.collator(built.train_rows[:2])
        masters = sum(t.nbytes for t in streamed_tensors(built.model))
        with LiveBytes("cpu", held(built.model, built.optimizer)) as counted:
            loss = one.objective.loss(built.learner, batch)
            after_forward = counted.now_bytes
            loss.backward()
            alive.append((after_forward, counted.now_bytes))
    copies = sum(t.nbytes for t in streamed_tensors(built.model)) - masters
    assert copies == masters * resident // 6
    (forward, backward), (pulled_forward, pulled_backward) = alive
    assert pulled_forward == forward + copies - masters
    assert pulled_backward == backward + copies - masters


def tensors_of_a_block(packed: bool) -> list[int]:
    """Bytes of each frozen tensor of a block of width 256: 4 heads, 2 of them for keys and values,
    and 640 hidden units, in 16 bits; or matrices in 4 bits with their doubly quantised scales."""
    norms = [2 * 256] * 2
    matrices = [256 * 256, 128 * 256, 128 * 256, 256 * 256] + [256 * 640] * 3
    if not packed:
        return norms + [2 * count for count in matrices]
    return norms + [
        size
        for count in matrices
        for size in (count // 2, count // 64, 4 * 16, 4, 4 * -(-count // 64 // 256), 4 * 256)
    ]


def test_beside_a_cpu_the_plan_of_the_host_is_what_is_asked_for(
    planned_recipe: Callable[..., Any],  # noqa: F811
    folder: Path,
) -> None:
    """Closed form: nothing is pinned there, so nothing is rounded; what is on disk is left out, and
    nothing is written for a plan."""
    config = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2}
    waits = 2 * sum(tensors_of_a_block(packed=False))
    loop = {"max_length": 16, "global_batch_size": 1}
    for lever, on_host, on_disk in ((LEVER, waits, 0), (DISK, 0, waits)):
        one = planned_recipe(config, levers=[lever], loop=loop)
        found = plan(one, devices.of_torch(torch.device("cpu")))
        assert found.phases["steady_steps"].host_bytes == on_host
        assert found.disk_bytes == on_disk
    assert not folder.exists()


def test_the_bus_carries_each_block_but_two_there_and_back_again(
    planned_recipe: Callable[..., Any],  # noqa: F811
) -> None:
    """Closed form: of four blocks two are there when a pass begins, and the other two come; twice a
    micro-batch, however many rows it has."""
    config = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4}
    card = devices.load("rtx-4090")
    assert card.pcie_bytes_per_second is not None
    block = sum(tensors_of_a_block(packed=False))
    for rows, passes in ((4, 1), (2, 2)):
        loop = {"max_length": 16, "micro_batch_size": rows, "global_batch_size": 4}
        found = plan(planned_recipe(config, levers=[LEVER], loop=loop), card)
        assert found.step is not None
        carried = found.step.parts["transfers"] * card.pcie_bytes_per_second
        assert carried == pytest.approx(passes * 2 * 2 * block, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("levers", [[], ["nf4_weights", "gradient_checkpointing"]])
def test_on_a_card_the_plan_falls_by_all_blocks_but_two(
    levers: list[str],
    planned_recipe: Callable[..., Any],  # noqa: F811
) -> None:
    """Closed form: seven of nine alike blocks are never on the card; all nine are on the host, each
    tensor in a power of two; and the whole depth is traced, which is told."""
    config = {"hidden_size": 256, "intermediate_size": 640}
    card = devices.generic(8.0)
    before = plan(planned_recipe(config, levers=levers), card)
    after = plan(planned_recipe(config, levers=[*levers, LEVER]), card)
    phase = "steady_steps"
    sizes = tensors_of_a_block(packed=bool(levers))
    block = sum(sizes)
    host = after.phases[phase].host_bytes
    assert host == 9 * sum(2 ** math.ceil(math.log2(size)) for size in sizes) > 9 * block
    assert before.phases[phase].host_bytes == 0
    assert before.phases[phase].live_bytes - after.phases[phase].live_bytes == 7 * block
    assert before.phases["load"].live_bytes - after.phases["load"].live_bytes >= 9 * block
    assert after.needed_bytes < before.needed_bytes
    assert after.host_needed_bytes > host
    assert any("the whole depth was traced" in note for note in after.notes)
    mapped = plan(planned_recipe(config, levers=[*levers, DISK]), card)
    assert mapped.disk_bytes == 9 * block
    for name, there in mapped.phases.items():
        assert there.live_bytes == after.phases[name].live_bytes
    # One block in pinned memory; in its file each tensor begins at a multiple of 64 bytes.
    file = sum(-(-size // 64) * 64 for size in sizes)
    assert mapped.phases[phase].host_bytes == 2 ** math.ceil(math.log2(file))


def test_a_budget_of_the_disk_below_the_files_is_refused(
    recipe: Callable[..., Any], folder: Path
) -> None:
    """Behaviour: the value and what is needed; nothing is written."""
    one = recipe(model=TINY, levers=[DISK], budget={"disk_gib": 0.001}, **LORA)
    with pytest.raises(InputError, match=r"budget.disk_gib`: 0.001 is less than the 18.4 MiB of"):
        build(one)
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_the_weights_are_read(
    recipe: Callable[..., Any], in_folder: Path
) -> None:
    """Behaviour: one problem that names folder, reason and way out; no output folder."""
    Path("file").write_text("")
    lever = DISK | {"folder": "file/below"}
    with pytest.raises(InputError, match="no file can be made in file/below: Not a dir") as refusal:
        lowres.run(recipe(levers=[lever], **LORA), quiet=True, plan=False, output_folder="out")
    assert len(refusal.value.problems) == 1 and "place: host" in str(refusal.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"method": "full"}, "leaves no frozen weights"),
        ({"levers": ["int8_weights", LEVER], **LORA}, "a second time"),
        ({"levers": [{"name": LEVER, "resident": 1}], **LORA}, "greater than or equal to 2"),
        ({"levers": [{"name": LEVER, "folder": "there"}], **LORA}, "set place: disk"),
    ],
)
def test_what_cannot_stream_is_refused(
    changes: dict[str, Any], reason: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: the reason and what works instead, before anything is loaded."""
    with pytest.raises(InputError) as refusal:
        recipe(**{"levers": [LEVER]} | changes)
    assert any(reason in problem.text for problem in refusal.value.problems)
