"""What a recipe will cost, before anything is loaded. JSON like the record, beside which it stands.

Three figures of memory are never mixed: *live* bytes are asked for by tensors, *allocated* ones are
what the caching allocator hands out for them, *reserved* ones what it took from the driver.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal, get_args

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

PlanPhase = Literal["load", "first_step", "steady_steps", "evaluate", "save", "resume"]
PHASES: tuple[PlanPhase, ...] = get_args(PlanPhase)

Category = Literal[
    "weights", "quantisation state", "adapters", "gradients", "optimizer states", "activations",
    "logits", "temporaries", "workspaces", "batch",
]  # fmt: skip
CATEGORIES: tuple[Category, ...] = get_args(Category)
"""In the order of every table and plot."""


@dataclass
class Card:
    """The device planned for.

    Args:
        name: As in `memory/devices/`, or `<n> GiB card` where only a size was given.
        kind: `cpu` has no caching allocator and no context.
        total_bytes: What the datasheet or the user says.
        context_bytes: What the driver takes before the first tensor.
        available_bytes: What the allocator can have: the total less context and less what the
            system keeps for itself.
    """

    name: str
    kind: Literal["cuda", "mps", "cpu"]
    total_bytes: int
    context_bytes: int
    available_bytes: int

    @property
    def offered_bytes(self) -> int:
        """What `needed_bytes` compares with: the need has the driver's context in it."""
        return self.available_bytes + self.context_bytes


@dataclass
class PhasePlan:
    """The peak of one phase.

    Args:
        live_bytes: Of tensors on the device.
        allocated_bytes: Of the caching allocator's blocks in use; None on CPU.
        reserved_bytes: Of its segments, with unbounded memory; None on CPU.
        host_bytes: Of tensors on the host, where the device is another one.
        categories: What is alive at the live peak; adds up to `live_bytes`.
        instant: When it is, such as `backward of model.layers.17`.
        module: Path of the module whose operation reached it; empty outside of modules.
        operation: That operation.
    """

    live_bytes: int
    allocated_bytes: int | None
    reserved_bytes: int | None
    host_bytes: int
    categories: dict[Category, int]
    instant: str
    module: str
    operation: str


@dataclass
class StepPlan:
    """Seconds of one optimizer update by a roofline over its operations.

    Args:
        low_seconds: The band that a measured median is expected in.
        parts: Seconds by class: `matrix products`, `attention`, `memory traffic`, `launches`,
            `transfers`.
        basis: Where the rates come from: the device's file, or a calibration.
    """

    seconds: float
    low_seconds: float
    high_seconds: float
    tokens_per_second: float
    parts: dict[str, float]
    basis: str


@dataclass
class Change:
    """One change to a recipe and what it would do.

    Args:
        name: In a few words, such as `+ gradient_checkpointing`.
        overrides: `--set` arguments that make it.
        saved_bytes: Of what the device must offer; negative when it costs.
        step_ratio: Planned seconds of a step over those without it.
        needed_bytes: What the device must offer with it.
        fits: Whether that is there; None without a card.
        problem: Why it cannot be had; None where it can.
    """

    name: str
    overrides: list[str]
    saved_bytes: int | None = None
    step_ratio: float | None = None
    needed_bytes: int | None = None
    fits: bool | None = None
    problem: str | None = None


@dataclass
class Curve:
    """Live bytes over one steady update.

    Args:
        categories: For each, the bytes at each point in time.
        instants: What was going on at each point.
    """

    categories: dict[Category, list[int]]
    instants: list[str]


@dataclass(config=ConfigDict(ser_json_inf_nan="strings"))
class MemoryPlan:
    """One recipe on one card.

    Args:
        needed_bytes: The least that the device must offer: the smallest capacity with which the
            replayed allocator runs through every phase, with the context.
        fits: Whether the card offers that; None without a card.
        host_needed_bytes: Resident memory of the process at its peak.
        disk_bytes: Of weights and states that wait in files.
        host_fits: Against `budget.host_gib` or, where the plan is for this machine, its memory.
        shapes: What the rows were taken from: the data, or assumed.
        blocks: Lengths of the runs of blocks that are built alike.
        depth: How the depth was covered: every block traced, or extended from fewer.
        unknown: Operations that the planner has no rule for; they widen the band.
        band_bytes: How far the real peak may lie above `needed_bytes`.
        processes: That share each update; the plan is of the main one's share.
        updates: Numbers of those that were looked at, which are the largest of the run.
        changes: The ladder: each lever or smaller setting by itself.
    """

    recipe: dict[str, Any]
    digest: str
    card: Card | None
    phases: dict[PlanPhase, PhasePlan]
    peak_phase: PlanPhase
    needed_bytes: int
    fits: bool | None
    host_needed_bytes: int
    host_fits: bool | None
    trainable: int
    total: int
    step: StepPlan | None
    curve: Curve | None
    shapes: str
    depth: str
    band_bytes: int
    planning_seconds: float
    blocks: list[int]
    schema: int = 1
    disk_bytes: int = 0
    processes: int = 1
    updates: list[int] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def steady(self) -> str:
        """Of what the curve is, in words."""
        return "one update" if len(self.updates) <= 2 else "the updates looked at"

    @property
    def peak(self) -> PhasePlan:
        return self.phases[self.peak_phase]


@dataclass
class Candidate:
    """One recipe of a search.

    Args:
        settings: What distinguishes it, by recipe key, such as `method: lora` or
            `loop.max_length: 512`.
        needed_bytes: What the device must offer.
        seconds: Of one update; None where the card's rates are not known.
        tokens_per_second: Trained tokens.
        quality: The task's metric in records of such recipes; None where there is none.
        quality_basis: Which records, or that there are none.
        lossy: Levers and choices that change what is computed, such as 4-bit weights.
        front: Nothing else in the search is better in one of memory, time and approximations and no
            worse in the others.
    """

    settings: dict[str, Any]
    needed_bytes: int
    fits: bool
    seconds: float | None
    tokens_per_second: float | None
    quality: float | None = None
    quality_basis: str = ""
    lossy: list[str] = field(default_factory=list)
    front: bool = False


@dataclass
class Fit:
    """The answer to "what is the best that I can run on this?".

    Args:
        goal: `quality`, `speed` or `context`.
        considered: How many recipes were weighed.
        candidates: The front and the chosen one, cheapest in memory first.
        chosen: Index among `candidates`; None where nothing fits.
        plan: Of the chosen recipe.
        recipe: The chosen recipe as the text of a file.
        instead: Where nothing fits: what would, with its numbers.
    """

    model: str
    task: str
    card: Card
    goal: Literal["quality", "speed", "context"]
    considered: int
    candidates: list[Candidate]
    chosen: int | None
    plan: MemoryPlan | None
    recipe: str | None
    seconds: float
    schema: int = 1
    instead: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Cell:
    """One model on one card with one method."""

    model: str
    card: str
    method: str
    needed_bytes: int | None
    fits: bool | None
    tokens_per_second: float | None = None
    problem: str | None = None


@dataclass
class Matrix:
    """Models by cards by methods.

    Args:
        setting: What all cells share, in a few words.
    """

    setting: str
    cells: list[Cell]
    schema: int = 1


_ADAPTER = TypeAdapter(MemoryPlan)


def to_json(plan: MemoryPlan) -> str:
    return _ADAPTER.dump_json(plan, indent=1).decode() + "\n"


def to_dict(plan: MemoryPlan) -> dict[str, Any]:
    """JSON-ready, for the record."""
    dumped: dict[str, Any] = _ADAPTER.dump_python(plan, mode="json")
    return dumped


_FIT = TypeAdapter(Fit)


def fit_to_json(fit: Fit) -> str:
    return _FIT.dump_json(fit, indent=1).decode() + "\n"


_MATRIX = TypeAdapter(Matrix)


def matrix_to_json(matrix: Matrix) -> str:
    return _MATRIX.dump_json(matrix, indent=1).decode() + "\n"
