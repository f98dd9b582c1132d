"""Train on the rows, update after update.

Paper: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowres.core.parts import Procedure, part

if TYPE_CHECKING:
    from lowres.core.learner import Learner
    from lowres.core.session import Session


@part
class Finetune(Procedure):
    """Plain fine-tuning; a resumed session hands out the updates that are left."""

    def run(self, session: Session) -> Learner:
        for step, rows in session.updates():
            session.update(step, rows)
            session.after(step)
        return session.learner
