"""Where the parameters of a model live: stem, blocks, top, and a classification head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Blocks:
    """The map by which freezing chooses and methods act.

    Args:
        names: Module path of every block, from the input to the output (`model.layers.0`, ...; an
            encoder-decoder lists its encoder blocks first).
        trained: Those of `names` in which a method may train.
        stem: Module paths below the first block (embeddings).
        head: Module paths of a classification head. Every method trains them: a frozen random head
            cannot be fine-tuned around, and PEFT trains any.
        train_stem: Whether the embeddings may be trained.
        train_top: Whether what lies neither in a block nor below may be: final norm, output layer.
        scores: Of every block, where they were what the choice was made by.
    """

    names: tuple[str, ...]
    trained: frozenset[str]
    stem: tuple[str, ...]
    head: tuple[str, ...] = ()
    train_stem: bool = True
    train_top: bool = True
    scores: tuple[float, ...] = ()

    @property
    def frozen(self) -> tuple[str, ...]:
        return tuple(n for n in self.names if n not in self.trained)

    def only(self, trained: Iterable[str], *, train_stem: bool, train_top: bool = True) -> Blocks:
        """The same map with another choice of trained blocks."""
        return replace(self, trained=frozenset(trained), train_stem=train_stem, train_top=train_top)

    def in_head(self, path: str) -> bool:
        return _below(path, self.head)

    def trains(self, parameter: str) -> bool:
        """Whether a parameter, named by its path, lies where training is allowed."""
        if self.in_head(parameter):
            return True
        if _below(parameter, self.names):
            return not _below(parameter, self.frozen)
        return self.train_stem if _below(parameter, self.stem) else self.train_top


def _below(path: str, modules: Iterable[str]) -> bool:
    return any(path == m or path.startswith(m + ".") for m in modules)
