"""What can go wrong, each with the exit code that `lowres` ends with.

LowresError            1   the run failed
|-- InputError         2   the recipe, a file or an argument is wrong; carries every problem found
|   `-- PartsRefuse    2   each part of the recipe reads well, and one refuses another
|-- DoesNotFit         3   the plan exceeds the budget
|-- OutOfMemory        1   memory ran out and no smaller micro-batch was left
|-- Diverged           1   the loss or a gradient is no longer finite
|-- GuardFailed        1   training is other than the recipe says
|-- OutOfTime          1   `budget.minutes` is used up; a checkpoint was written
`-- Interrupted      130   Ctrl-C; a checkpoint was written
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LowresError(Exception):
    """A failure that the user can understand: what is wrong, why, and what to do."""

    exit_code = 1
    outcome = "failed"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input.

    Args:
        where: Dotted key such as `loop.max_length`, or a file; empty when it concerns the whole.
        text: What is wrong with the value, why, and what to do.
        line: Line in the recipe file, from 1; None when the value came from elsewhere.
    """

    where: str
    text: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"`{self.where}`" if self.where else ""
        line = f" (line {self.line})" if self.line else ""
        return f"{where}{line}{': ' if where or line else ''}{self.text}"


class InputError(LowresError):
    """Wrong input. All problems that were found come in one message."""

    exit_code = 2

    def __init__(self, subject: str, problems: Sequence[Problem | str]) -> None:
        self.subject = subject
        self.problems = [p if isinstance(p, Problem) else Problem("", p) for p in problems]
        lines = "".join(f"\n  - {p}" for p in self.problems)
        super().__init__(f"{subject} has {len(self.problems)} problem(s):{lines}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, Sequence[Problem | str]]]:
        # Errors travel between processes; the default would call the constructor with the message.
        return type(self), (self.subject, self.problems)


class PartsRefuse(InputError):
    """Parts that read well one by one do not go together; another part may be the mend."""


class DoesNotFit(LowresError):
    """The plan exceeds the budget; nothing was loaded."""

    exit_code = 3
    outcome = "does_not_fit"


class NotPlanned(LowresError):
    """There is no plan for it; a run may go on without one."""


class OutOfMemory(LowresError):
    """Memory ran out even at micro-batch 1, or outside the part of a step that can be repeated."""

    outcome = "oom"


class Diverged(LowresError):
    """The loss or the gradient norm is not finite."""

    outcome = "diverged"


class GuardFailed(LowresError):
    """A check found training to be other than what the recipe says: `run/guards.py`."""


class OutOfTime(LowresError):
    """The time budget is used up."""

    outcome = "out_of_time"


class Interrupted(LowresError):
    """The user stopped the run."""

    exit_code = 130


_SHOWN = 5


def some(names: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
