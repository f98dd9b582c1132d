"""Rungs of a ladder. Legend: B rows, T tokens, D features of the model, W of the side network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowres.bridges import side_blocks
from lowres.core.delta import Delta, cast, place
from lowres.core.errors import LowresError

ENCODED = "encoder_hidden_states"
BIASES = ("position_bias", "encoder_decoder_position_bias")


@dataclass
class Climb:
    """What one forward pass hands from rung to rung.

    Args:
        hidden: h of the rung below (B, T, W).
        encoded: h of the encoder's last rung (B, S, W).
        source: What the encoder itself gave in that pass (B, S, D), where a hook could see it.
        same: What the decoder was given and was found to be `source`, or rows of it repeated.
        across: What the decoder's side blocks look at (B, S, W).
        biases: T5's biases by distance, which the first rung of a stack makes.
        like: Masks and positions in the side network's type, by identity of the tensor, which is
            kept beside so that it stays the only one.
    """

    hidden: torch.Tensor | None = None
    encoded: torch.Tensor | None = None
    source: torch.Tensor | None = None
    same: torch.Tensor | None = None
    across: torch.Tensor | None = None
    biases: dict[str, Any] = field(default_factory=dict)
    like: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def end(self) -> torch.Tensor:
        """The last h of a stack; the rest but the encoder's is let go of."""
        hidden, self.hidden = self.hidden, None
        self.across, self.biases, self.like = None, {}, {}
        assert hidden is not None
        return hidden

    def let_go(self) -> None:
        """Of the encoder's side."""
        self.encoded = self.source = self.same = None

    def is_of(self, encoded_BSD: torch.Tensor) -> bool:
        """Whether it is what the encoder gave in the pass of this side. While generating the same
        tensor comes again with every token, so that its values are compared once."""
        if self.source is None or encoded_BSD is self.source or encoded_BSD is self.same:
            return True
        times = len(encoded_BSD) // len(self.source)
        if not torch.equal(encoded_BSD, self.source.repeat_interleave(times, dim=0)):
            return False
        self.same = encoded_BSD
        return True

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A block's argument in the side network's type, made once for all rungs."""
        if isinstance(value, tuple):
            return tuple(self.cast(one, dtype) for one in value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if value.dtype == dtype:
            return value
        if id(value) not in self.like:
            self.like[id(value)] = (value, value.to(dtype))
        return self.like[id(value)][1]


class Rung(Delta):
    """`h_l = B_l(g h_{l-1} + (1 - g) D_l H_l)` beside a block with output H_l, g = sigmoid(a / t).

    Settings: `reduction` (D / W), `gate_temperature` (t), `opens`: the first of its stack, with
    `h_0 = D_0 e`; `closes`: the last of an encoder; `joins`: the last of all, whose block gives
    `H_l + U h_l`; `reads`: whether the block looks at an encoder's output.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        reduction = int(settings["reduction"])
        self._temperature = float(settings["gate_temperature"])
        self._opens, self._closes = bool(settings["opens"]), bool(settings["closes"])
        self._reads = bool(settings["reads"])
        wide, narrow = side_blocks.widths(base, reduction)

        def linear(given: int, made: int) -> nn.Linear:
            return nn.Linear(given, made, bias=False, device=place(base))

        self.block = side_blocks.make(base, reduction, self._opens)
        self.gate = nn.Parameter(torch.zeros(1, device=place(base)))
        self.down = linear(wide, narrow)
        self.first = linear(wide, narrow) if self._opens else None
        others = [delta for delta in before if isinstance(delta, Rung)]
        # Where the freezing leaves the encoder without rungs, its output is taken down instead.
        alone = self._opens and self._reads and not others
        self.encoded = linear(wide, narrow) if alone else None
        self.up = linear(narrow, wide) if settings["joins"] else None
        if self.up is not None:
            nn.init.zeros_(self.up.weight)
        self._climb: Climb = others[0]._climb if others else Climb()
        self._names = side_blocks.arguments_of(base)
        self._room = side_blocks.Room.beside_block(base)

    @staticmethod
    def check_model(model: Any) -> None:
        encoder = model.get_encoder() if model.config.is_encoder_decoder else None
        if encoder is not None and _remember not in encoder._forward_hooks.values():
            encoder.register_forward_hook(_remember)

    def around(
        self, call: Callable[..., Any], *inputs: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        # Nothing of the model is to be kept for backward, whatever it is given.
        with torch.no_grad():
            output: Any = call(*inputs, **others)
        made = output[0] if isinstance(output, tuple) else output
        given = dict(zip(self._names, inputs, strict=False)) | others
        below = given.pop(next(iter(self._names)))
        climb = self._climb
        if self.first is not None:
            climb.hidden, climb.biases, climb.like = times(below, self.first), {}, {}
            if self._reads:
                climb.across = self._read(given[ENCODED])
            else:
                climb.let_go()
        self._step(made, given)
        if self._closes:
            climb.encoded = climb.end()
        if self.up is not None:
            made = made + cast(times(cast(climb.end(), made), self.up), made)
            if torch.is_grad_enabled():  # while generating, the encoder is run once only
                climb.let_go()
        changed: Any = (made, *output[1:]) if isinstance(output, tuple) else made
        return changed  # type: ignore[no-any-return]

    def _read(self, encoded_BSD: torch.Tensor) -> torch.Tensor:
        """The encoder's side, as many rows of it as the decoder is given."""
        if self.encoded is not None:
            return times(encoded_BSD, self.encoded)
        mine = self._climb.encoded
        rows, tokens = encoded_BSD.shape[:2]
        fits = mine is not None and mine.shape[1] == tokens and not rows % mine.shape[0]
        if mine is None or not fits or not self._climb.is_of(encoded_BSD):
            raise LowresError(
                "method 'ladder': the decoder was given an encoder's output that is not the last "
                "one that was made, and the side network's is gone; call the model as a whole"
            )
        return mine.repeat_interleave(rows // mine.shape[0], dim=0) if rows > len(mine) else mine

    def _step(self, state_BTD: torch.Tensor, given: dict[str, Any]) -> None:
        climb = self._climb
        # Parameters are held in 32 bits. Beside a model in bfloat16 all else is of that type: half
        # of what is kept for backward.
        narrow = state_BTD.dtype == torch.bfloat16
        dtype = state_BTD.dtype if narrow else self.gate.dtype
        seen_BTW = times(state_BTD, self.down).to(dtype)
        # A block that was left out in this pass (layer drop) has left its rung out, too.
        below_BTW = seen_BTW if climb.hidden is None else climb.hidden.to(dtype)
        gate = torch.sigmoid(self.gate / self._temperature).to(dtype)
        mixed_BTW = gate * below_BTW + (1 - gate) * seen_BTW
        shares = [name for name in BIASES if name in self._names]
        reads = given.pop(ENCODED, None) is not None
        given = {n: climb.cast(v, dtype) for n, v in given.items() if n not in shares}
        given |= {name: climb.biases.get(name) for name in shares}
        if reads and climb.across is not None:
            given[ENCODED] = climb.across.to(dtype)
        self._room.take(self.block, given)
        with side_blocks.working(mixed_BTW.device.type, dtype):
            after: Any = self.block(mixed_BTW, *self._asking(given), **given)
        if isinstance(after, tuple):
            after, *biases = after
            climb.biases = dict(zip(shares, biases, strict=False))
        climb.hidden = after

    def _asking(self, given: dict[str, Any]) -> list[Any]:
        """Taken out of a block's arguments: all up to the last that asks for a gradient. Blocks
        that are recomputed the re-entrant way hand gradients to what comes by position alone."""
        names = list(self._names)[1:]
        last = max((i for i, n in enumerate(names, 1) if _asks(given.get(n))), default=0)
        return [given.pop(name, self._names[name]) for name in names[:last]]


def _asks(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _remember(encoder: nn.Module, _inputs: Any, output: Any) -> None:
    """What an encoder gives, beside what the last rung of its ladder gave in the same pass."""
    for module in encoder.modules():
        climb = module._climb if isinstance(module, Rung) else Climb()
        if climb.encoded is not None and climb.source is None:
            climb.source = output[0]


def times(value: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """A product in the value's type: what is kept of it for backward is then no wider."""
    if value.dtype == layer.weight.dtype:
        product: torch.Tensor = layer(value)
        return product
    # The layer itself is called, since what divides parameters among processes waits for that.
    with torch.autocast(value.device.type, value.dtype):
        product = layer(value)
        return product
