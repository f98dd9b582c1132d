"""Write the grammatical sentences of the embedded grammar's training split as plain text.

    python recipes/pretrain/write_grammar_text.py runs/grammar.txt

Labels and evaluation splits are not used. Each pass is shuffled anew, so that no order is learned.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from lowres.core import registry

PASSES = 160
"""Makes about as many windows as the books have."""


def main(target: Path) -> None:
    task = registry.load("task", "grammaticality")()
    lines = [e.text for e in task.examples("train") if e.label == 1]
    shuffler = random.Random(0)
    passes = []
    for _ in range(PASSES):
        shuffler.shuffle(lines)
        passes.append("\n".join(lines))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n\n\n".join(passes), encoding="utf-8")
    print(f"{target}: {len(lines)} sentences, {PASSES} passes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
