"""Fine-tune a language model on the card you have.

recipe = lowres.load_recipe("recipes/quickstart.yaml", ["method.rank=4"])
record = lowres.run(recipe)   # everything, with a record
built = lowres.build(recipe)  # prepared model, tokenizer, collator, optimizer: your own loop
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowres import run
    from lowres.core.errors import LowresError
    from lowres.core.reading import load_recipe
    from lowres.run.build import build

__version__ = "0.1.0"
__all__ = ["LowresError", "__version__", "build", "load_recipe", "run"]

_HOMES = {
    "LowresError": ("lowres.core.errors", "LowresError"),
    "load_recipe": ("lowres.core.reading", "load_recipe"),
    "build": ("lowres.run.build", "build"),
}


def __getattr__(name: str) -> Any:
    # `import lowres` must stay cheap: the command line lists parts without torch.
    if name == "run":
        return importlib.import_module("lowres.run")
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'lowres' has no attribute '{name}'")
