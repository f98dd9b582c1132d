"""Write the embedded grammar's training split as plain text, each sentence with its judgement.

    python recipes/pretrain/write_grammar_text.py runs/grammar.txt

Evaluation splits are not used. Each pass is shuffled anew, so that no order is learned.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from lowres.core import registry

PASSES = 80
"""Makes about as many windows as the books have."""


def main(target: Path) -> None:
    task = registry.load("task", "grammaticality")()
    words = task.label_words
    lines = [f"{e.text}{words[e.label]}" for e in task.examples("train")]
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
