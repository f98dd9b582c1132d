"""Fine-tune a language model on the card you have.

recipe = lowres.load_recipe("recipes/quickstart.yaml", ["method.rank=4"])
record = lowres.run(recipe)   # everything, with a record
built = lowres.build(recipe)  # prepared model, tokenizer, collator, optimizer: your own loop
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowres import run
    from lowres.core.errors import LowresError
    from lowres.core.reading import load_recipe
    from lowres.making.build import build

__version__ = "0.1.0"
__all__ = ["LowresError", "__version__", "build", "load_recipe", "run"]

_HOMES = {
    "LowresError": ("lowres.core.errors", "LowresError"),
    "load_recipe": ("lowres.core.reading", "load_recipe"),
    "build": ("lowres.making.build", "build"),
}


class _WithPeft(importlib.abc.MetaPathFinder):
    """Makes lowres's adapters known to PEFT the moment that is imported: plain PEFT calls then read
    and make them. Until then nothing heavy is imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then(module: Any) -> None:
                execute(module)
                importlib.import_module("lowres.bridges.peft_tuner")

            spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("lowres.bridges.peft_tuner")
else:
    sys.meta_path.insert(0, _WithPeft())


def __getattr__(name: str) -> Any:
    # `import lowres` must stay cheap: the command line lists parts without torch.
    if name == "run":
        return importlib.import_module("lowres.run")
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'lowres' has no attribute '{name}'")
