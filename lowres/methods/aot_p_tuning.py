"""Add a trained row to what enters each block, picked by the token at that position.

Paper: Ahead-of-Time P-Tuning, Gavrilov and Balagansky 2023. https://arxiv.org/abs/2305.10835

Departs from the paper: the non-linearity is gelu; rows of one task serve a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class AotPTuning(Adapter):
    """`H + P[x]`, one matrix P (V, D) for each block, made of few parameters: sequences become no
    longer, and after training the rows can be written out and merely looked up (`fuse` of
    `lowres.methods._by_token`), which takes V D numbers for each block.

    Args:
        form: `embeddings`: `P = gelu(E W_1 + b_1) W_2 + b_2` of the frozen embeddings E;
            `kronecker`: `P = (W_L kron W_M) W_R`.
        rank: r, the inner width of the first (128 unless given); of the second, whose W_R has r r
            rows, take 5 to 50 (20).
    """

    taxonomy: ClassVar[Taxonomy] = "additive: soft prompts"
    # Not the paper's, whose grid is not public.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-4, 1e-3)

    form: Literal["embeddings", "kronecker"] = "embeddings"
    rank: PositiveInt | None = None

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites
        from lowres.core.delta import Piece
        from lowres.methods._by_token import EmbeddedRows, KroneckerRows, TokenIds

        embedded = self.form == "embeddings"
        kind = EmbeddedRows if embedded else KroneckerRows
        rank = self.rank or (128 if embedded else 20)
        stacks = sites.token_embeddings(model, blocks)
        return [
            Piece(TokenIds, [one.path for one in stacks], {"embeddings": embedded}),
            *(
                Piece(
                    kind,
                    one.blocks,
                    {
                        "rank": rank, "vocabulary": one.vocabulary, "embedded": one.width,
                        "hidden": one.hidden,
                    },
                )
                for one in stacks
            ),
        ]  # fmt: skip
