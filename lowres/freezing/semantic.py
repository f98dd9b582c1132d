"""Freeze the blocks up to the one that brings hidden states nearest to the words to be said.

Paper: Semantic-Aware Layer-Freezing (SEFT), Gu et al. 2024. https://arxiv.org/abs/2406.11753

Departs from the paper: its gain formula is not public. Here, for a target word y and the hidden
state h_l after block l of L, that word's place is s_l = (1 - l/L) e + (l/L) o of unit vectors: e
along its row of the embeddings, o along its column of the pseudo-inverse of the output layer (the
paper's semantic bases). With the deviation D_l = 1 - cos(h_l, s_l) the gain of block l is
log D_(l-1) - log D_l, the mean over targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lowres.core.errors import InputError
from lowres.core.example import IGNORED
from lowres.core.parts import PositiveInt, part
from lowres.core.scored import Scored

if TYPE_CHECKING:
    import torch

    from lowres.core.example import Batch
    from lowres.core.learner import Learner
    from lowres.core.recipe import Recipe
    from lowres.core.sample import Sample

_CHUNK = 8192
_LEAST = 1e-6


@part
class Semantic(Scored):
    """The block of largest gain and all below it are frozen; at least the highest one trains.

    Args:
        rows: Training rows to look at.
    """

    rows: PositiveInt = 32

    def check(self, recipe: Recipe) -> Iterator[str]:
        if set(recipe.objective.heads.values()) == {"classification"}:
            yield (
                f"objective '{recipe.objective.name}' has no layer over the words, by which it "
                "chooses; use the objective label_words, or freezing 'gradient_norm'"
            )

    def scores(self, learner: Learner, sample: Sample) -> torch.Tensor:
        import torch

        if learner.kind == "encoder_decoder":
            text = "compares states with the words at their places, and an encoder has none"
            raise InputError(
                "the recipe", [f"freezing '{self.name}' {text}; use freezing 'gradient_norm'"]
            )
        with torch.no_grad():
            bases = _Bases(learner)
            depth = len(learner.blocks.names)
            total, targets = torch.zeros(depth + 1, device=bases.device), 0
            for batch in sample.batches(self.rows):
                total += bases.deviations(learner, batch).log_().sum(dim=1)
                targets += bases.targets
            mean = total / targets
            return mean[:-1] - mean[1:]

    def choice(self, names: Sequence[str], scores: Sequence[float]) -> Sequence[str]:
        below = range(len(names) - 1)
        best = max(below, key=lambda place: scores[place], default=-1)
        return names[best + 1 :]

    def costliest(self, names: Sequence[str]) -> Sequence[str]:
        return names[min(1, len(names) - 1) :]


class _Bases:
    """Where words lie before the first block and after the last one.

    Raises:
        InputError: When states are not as wide as embeddings.
    """

    def __init__(self, learner: Learner) -> None:
        import torch

        from lowres.bridges import heads

        model: Any = learner.base
        self.words = model.get_input_embeddings().weight
        parent, name = heads.head_of(model)
        self.head = getattr(parent, name)
        self.out = self.head.weight
        self.device, self.targets = self.out.device, 0
        wide = self.out.shape[1]
        gram = torch.zeros(wide, wide, dtype=torch.float64, device=self.device)
        for start in range(0, len(self.out), _CHUNK):
            rows = self.out[start : start + _CHUNK].float()
            gram += rows.t() @ rows
        # W+ = (W^T W)+ W^T, of which only the columns of the targets are needed.
        self.inverse = torch.linalg.pinv(gram, hermitian=True).float()

    def deviations(self, learner: Learner, batch: Batch) -> torch.Tensor:
        """1 - cos(h_l, s_l) for each depth and target, (L + 1, N)."""
        import torch
        from torch.nn import functional as F

        labels = batch["labels"]
        if learner.head == "causal":
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        row_N, column_N = (labels != IGNORED).nonzero(as_tuple=True)
        words_N = labels[row_N, column_N].to(self.device)
        columns_U = torch.unique(column_N)
        place_N = torch.searchsorted(columns_U, column_N)
        self.targets = len(words_N)
        start_ND = F.normalize(self.words[words_N].float(), dim=1)
        end_ND = F.normalize(self.out[words_N].float() @ self.inverse, dim=1)
        depth = len(learner.blocks.names)
        found = torch.zeros(depth + 1, len(words_N), device=self.device)

        def look(level: int, hidden: Any) -> None:
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            cut = level == depth and hidden.shape[1] == len(columns_U)
            state_ND = hidden[row_N, place_N if cut else column_N].float()
            if state_ND.shape[1] != start_ND.shape[1]:
                text = (
                    f"freezing 'semantic' compares embeddings, {start_ND.shape[1]} wide, with "
                    f"hidden states, {state_ND.shape[1]} wide; use freezing 'gradient_norm'"
                )
                raise InputError("the recipe", [text])
            share = level / depth
            where_ND = (1 - share) * start_ND + share * end_ND
            found[level] = 1 - F.cosine_similarity(state_ND, where_ND, dim=1)

        with _looking(learner, self.head, look):
            learner.logits({k: v.to(self.device) for k, v in batch.items()}, columns_U)
        return found.clamp_(min=_LEAST)


@contextlib.contextmanager
def _looking(learner: Learner, head: Any, look: Any) -> Iterator[None]:
    """Call `look(level, states)` with what enters the first block, leaves each of the blocks but
    the last one, and enters the output layer."""
    blocks = [learner.base.get_submodule(name) for name in learner.blocks.names]

    def entering(level: int) -> Any:
        return lambda _, args, kwargs: look(level, args[0] if args else kwargs["hidden_states"])

    def leaving(level: int) -> Any:
        return lambda _, args, output: look(level, output)

    handles = [
        blocks[0].register_forward_pre_hook(entering(0), with_kwargs=True),
        *(b.register_forward_hook(leaving(n)) for n, b in enumerate(blocks[:-1], start=1)),
        head.register_forward_pre_hook(entering(len(blocks)), with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
