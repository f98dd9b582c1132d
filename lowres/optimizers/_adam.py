"""What the optimizers with Adam's two moments share."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

Beta = Annotated[float, Field(ge=0, lt=1)]
"""How much of a moment stays from one update to the next."""

EMBEDDING = re.compile(r"(^|\.)(shared|wte|wpe|[a-z_]*emb[a-z_]*)\.weight$")
"""Embedding tables by the names that transformers gives them."""
