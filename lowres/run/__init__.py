"""A run from recipe to record. The package can be called:
`lowres.run(recipe)` is `execute(recipe)`.

The folder and the function share the name that users expect of each; a module's class may be
replaced (Python's data model, "Customizing module attribute access") so that one name serves both.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowres.core.record import RunRecord


class _Run(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> RunRecord:
        from lowres.run.execute import execute

        return execute(*args, **kwargs)


sys.modules[__name__].__class__ = _Run
