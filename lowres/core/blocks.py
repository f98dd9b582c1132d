"""Where the parameters of a model live: stem, blocks, top, and the head that was made anew."""

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
        head: Module paths that were made anew for this task and hold no pretrained weight. Every
            method trains them: a frozen random head cannot be fine-tuned around.
        train_stem: Whether the embeddings may be trained.
    """

    names: tuple[str, ...]
    trained: frozenset[str]
    stem: tuple[str, ...]
    head: tuple[str, ...] = ()
    train_stem: bool = True

    @property
    def frozen(self) -> tuple[str, ...]:
        return tuple(n for n in self.names if n not in self.trained)

    def only(self, trained: Iterable[str], *, train_stem: bool) -> Blocks:
        """The same map with another choice of trained blocks."""
        return replace(self, trained=frozenset(trained), train_stem=train_stem)

    def trains(self, parameter: str) -> bool:
        """Whether a parameter, named by its path, lies where training is allowed."""

        def below(modules: Iterable[str]) -> bool:
            return any(parameter == m or parameter.startswith(m + ".") for m in modules)

        if below(self.head):
            return True
        if below(self.frozen):
            return False
        return self.train_stem or not below(self.stem)
