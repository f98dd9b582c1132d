"""Add a slice of one low-rank tensor, shared by all blocks, heads and matrices, to attention.

Paper: LoRTA: Low Rank Tensor Adaptation of Large Language Models, Hounie et al. 2024.
https://arxiv.org/abs/2410.04060

Departs from the paper: heads of the output projection lie on its input side, where the model has
them (the authors' code slices its output); keys and values with fewer heads than queries take the
vectors of the first heads; an attention to an encoder's output counts as an attention of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, PositiveFloat, PositiveInt, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Lorta(Adapter):
    """Head h of matrix m in attention l changes by `(alpha / rank) A diag(c_h c_m c_l) B`; each
    input is kept once, and nothing of a matrix's size is made.

    Args:
        rank: Columns of A; few parameters come with each, so it may be larger than LoRA's.
        alpha: The product is scaled by alpha / rank.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The paper: 4e-3 to 5e-2 for RoBERTa, 4e-4 for LLaMA-2.
    learning_rate_hint: ClassVar[tuple[float, float]] = (4e-4, 2e-2)
    mergeable: ClassVar[bool] = True
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "rotating": "all that it trains is one tensor of all blocks, and nothing would take turns; "
        "use 'lora', or freezing 'prefix'"
    }

    rank: PositiveInt = 64
    alpha: PositiveFloat = 16

    def uneven(self) -> str | None:
        return "all blocks use one tensor, which lies in the first"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites
        from lowres.core.delta import Piece, features
        from lowres.methods._lorta import MATRICES, AttentionTensor

        found = sites.attentions(model, blocks)
        fused = next((a for a in found if a.fused), None)
        if fused is not None:
            raise _refused(
                f"{fused.query} makes queries, keys and values at once, and the tensor has a slice "
                "for each; use 'lora', or 'loretta_rep' with targets on that layer"
            )
        paths = {m: [str(getattr(one, m)) for one in found] for m in MATRICES}
        sizes = {m: [features(model.get_submodule(p)) for p in paths[m]] for m in MATRICES}
        heads = int(model.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
        head_size = sizes["query"][0][1] // heads
        outer = {i for m in MATRICES[:3] for i, _ in sizes[m]} | {o for _, o in sizes["out"]}
        inner = {o for m in MATRICES[:3] for _, o in sizes[m]} | {i for i, _ in sizes["out"]}
        if len(outer) > 1 or any(n % head_size or n > heads * head_size for n in inner):
            raise _refused(
                f"attentions of sizes {sorted(outer)} and {sorted(inner)} do not fit one tensor "
                f"with {heads} heads of {head_size}; use 'lora'"
            )
        settings = {
            "rank": self.rank, "alpha": self.alpha, "width": outer.pop(), "head_size": head_size,
            "heads": heads, "attentions": len(found),
        }  # fmt: skip
        return [
            Piece(AttentionTensor, paths[matrix], {"matrix": matrix} | settings)
            for matrix in MATRICES
        ]


def _refused(text: str) -> InputError:
    return InputError("the recipe", [Problem("method", f"'lorta': {text}")])
