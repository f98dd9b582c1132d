"""The record that every run writes, in every outcome. JSON, one file, `record.json`.

Where PEFT's method comparison has a field of the same meaning, the name is close to its; all sizes
are bytes and say so.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lowres.core.errors import InputError

Outcome = Literal["ok", "oom", "does_not_fit", "diverged", "out_of_time", "interrupted", "failed"]
Phase = Literal["load", "first_step", "steady_steps", "evaluate", "save"]
HELD_OUT = "held_out"
"""The split of training rows that are kept apart to choose by (`task.hold_out`)."""


# A diverged run may hold figures that are not numbers; JSON's null would not read back as one.
# Each class that holds figures needs it: it does not reach those inside.
_NUMBERS = ConfigDict(ser_json_inf_nan="strings")


@dataclass
class PhaseMemory:
    """Peaks within one phase. None where this device has no such figure,
    or the phase was not measured.

    Args:
        live_bytes: Peak of bytes held by live tensors on the compute device, counted by storage. On
            CPU from a dispatch mode on probe steps, on CUDA the allocator's requested bytes.
        allocated_bytes: CUDA: peak of the caching allocator's blocks in use.
        reserved_bytes: CUDA: peak of what the allocator took from the driver.
        process_bytes: CUDA: what the driver charges the process (NVML), at the end of the phase.
        resident_bytes: Peak resident memory of the process over its value before load.
        seconds: Wall clock of the phase.
    """

    live_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    resident_bytes: int | None = None
    seconds: float | None = None


@dataclass(config=_NUMBERS)
class StepTime:
    """Seconds of whole optimizer updates between synchronisations,
    warm-up and probe steps left out.
    """

    n: int
    p20_seconds: float
    p50_seconds: float
    p80_seconds: float
    tokens_per_second: float
    """Real tokens (padding not counted) over all processes, over the same updates."""


@dataclass
class Parameters:
    trainable: int
    total: int


@dataclass
class Measurement:
    """What the run really took."""

    phases: dict[Phase, PhaseMemory] = field(default_factory=dict)
    step_time: StepTime | None = None
    parameters: Parameters | None = None
    checkpoint_bytes: int | None = None
    """A checkpoint to resume from: trained parameters and optimizer states."""
    saved_bytes: int | None = None
    """The adapter or model folder."""
    allocator_retries: int | None = None
    train_seconds: float | None = None

    @property
    def peak_live_bytes(self) -> int | None:
        found = [m.live_bytes for m in self.phases.values() if m.live_bytes is not None]
        return max(found, default=None)

    @property
    def peak_resident_bytes(self) -> int | None:
        found = [m.resident_bytes for m in self.phases.values() if m.resident_bytes is not None]
        return max(found, default=None)


@dataclass(config=_NUMBERS)
class Score:
    """One metric on one split."""

    split: str
    metric: str
    value: float
    stderr: float
    n: int
    majority: float | None
    """The same metric when the training split's majority label is always predicted."""
    step: int
    file: str | None = None
    """Per-example predictions, beside the record."""


@dataclass
class Event:
    """Something that a reader of the record should know: recovery, truncation,
    checkpoint, warning.
    """

    step: int
    kind: str
    text: str


@dataclass
class DataReport:
    """What encoding did to one split."""

    split: str
    rows: int
    dropped: int
    """Rows whose every label was masked or cut off; not trained on."""
    truncated: int
    tokens: int
    targets: int
    longest: int


@dataclass(config=_NUMBERS)
class RunRecord:
    """One run: what was asked, what was measured, how it ended.

    Of a run that was resumed, losses, scores, events and `train_seconds` cover all its parts;
    `seconds`, phases and step time the last one.
    """

    id: str
    outcome: Outcome
    started: str
    seconds: float
    recipe: dict[str, Any]
    digest: str
    overrides: list[str]
    task_version: int
    environment: dict[str, Any]
    schema: int = 1
    plan: dict[str, Any] | None = None
    measured: Measurement = field(default_factory=Measurement)
    data: list[DataReport] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Mean loss over the targets of each update's global batch."""
    learning_rates: list[float] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    error: str | None = None
    folder: Annotated[str | None, Field(exclude=True)] = None
    """Where it was written; not part of the file, which may be moved and published."""

    def final_scores(self) -> list[Score]:
        """The scores of the last evaluation, in order."""
        last = max((s.step for s in self.scores), default=0)
        return [s for s in self.scores if s.step == last]

    @property
    def trained_on_all(self) -> bool:
        """Whether it made a pass over its rows at least: less tells nothing of quality."""
        rows = next((d.rows for d in self.data if d.split == "train"), 0)
        return 0 < rows <= len(self.losses) * int(self.recipe["loop"]["global_batch_size"])

    def quality(self, metric: str) -> list[Score]:
        """Of these, the scores by a metric, but for rows that were held out to choose by: the best
        of several choices looks better on them than it is."""
        return [s for s in self.final_scores() if s.metric == metric and s.split != HELD_OUT]


_ADAPTER = TypeAdapter(RunRecord)


def to_json(record: RunRecord) -> str:
    return _ADAPTER.dump_json(record, indent=1).decode() + "\n"


def from_file(path: Path) -> RunRecord:
    """Read a record. Raises InputError naming the file and what is wrong."""
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"'{path}'", [f"cannot be read: {error.strerror}"]) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise InputError(f"'{path}'", [f"is not a run record: {where}: {first['msg']}"]) from None
