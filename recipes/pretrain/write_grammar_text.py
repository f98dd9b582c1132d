"""Write the grammatical sentences of the embedded grammar's training split as plain text.

    python recipes/pretrain/write_grammar_text.py runs/grammar.txt

Labels and evaluation splits are not used. Each of the passes is shuffled anew, so that no order of
sentences is learned.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from lowres.core import registry

PASSES = 60


def main(target: Path) -> None:
    task = registry.load("task", "grammaticality")()
    sentences = [e.text for e in task.examples("train") if e.label == 1]
    shuffler = random.Random(0)
    passes = []
    for _ in range(PASSES):
        shuffler.shuffle(sentences)
        passes.append("\n".join(sentences))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n\n\n".join(passes), encoding="utf-8")
    print(f"{target}: {len(sentences)} sentences, {PASSES} passes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
