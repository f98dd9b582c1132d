"""Turn the finished pretraining runs into the embedded model: bfloat16 weights, tokenizer, card.

    python recipes/pretrain/export.py runs/tiny_lm runs/tiny_lm_grammar lowres/assets/tiny_lm

The card's perplexities are measured here on the validation books: the model as stored, and two
baselines over the same tokens, a unigram and a 5-gram model with interpolated absolute discounting
(Ney, Essen and Kneser 1994), trained on the training books.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowres.core import record as record_module
from lowres.core import registry
from lowres.core.learner import Encoder
from lowres.core.record import RunRecord

DISCOUNT = 0.75
ORDER = 5


class NGram:
    """Interpolated absolute discounting down to add-one unigrams."""

    def __init__(self, tokens: list[int], vocabulary: int, order: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        self.counts: list[dict[tuple[int, ...], Counter[int]]] = [
            defaultdict(Counter) for _ in range(order)
        ]
        for n in range(order):
            for i in range(n, len(tokens)):
                self.counts[n][tuple(tokens[i - n : i])][tokens[i]] += 1

    def probability(self, context: tuple[int, ...], token: int) -> float:
        unigram = self.counts[0][()]
        p = (unigram[token] + 1) / (unigram.total() + self.vocabulary)
        for n in range(1, min(self.order, len(context) + 1)):
            seen = self.counts[n].get(context[-n:])
            if seen is None:
                break
            total = seen.total()
            p = max(seen[token] - DISCOUNT, 0) / total + DISCOUNT * len(seen) / total * p
        return p


def perplexity_of_ngrams(train: list[int], valid: list[int], vocabulary: int, order: int) -> float:
    model = NGram(train, vocabulary, order)
    nll = 0.0
    for i, token in enumerate(valid):
        nll -= math.log(model.probability(tuple(valid[max(0, i - order + 1) : i]), token))
    return math.exp(nll / len(valid))


@torch.no_grad()
def perplexity_of_model(
    model: torch.nn.Module, tokenizer: object, texts: list[str]
) -> tuple[float, float]:
    """Perplexity and bits per character over the windows of the recipe."""
    encoder = Encoder(tokenizer, "decoder", 256)
    nll, tokens = 0.0, 0
    for text in texts:
        ids = encoder.ids(text)
        for at in range(0, len(ids), 255):
            window = torch.tensor([[0, *ids[at : at + 255]]])
            logits = model(input_ids=window).logits.float()
            nll += float(
                torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum")
            )
            tokens += window.shape[1] - 1
    bits = nll / math.log(2) / sum(len(t) for t in texts)
    return math.exp(nll / tokens), bits


def stage(record: RunRecord) -> str:
    """One line of the card about a run."""
    loop = record.recipe["loop"]
    tokens = len(record.losses) * loop["global_batch_size"] * loop["max_length"]
    return (
        f"`lowres run recipes/pretrain/{record.id.rsplit('-', 2)[0]}.yaml` (digest "
        f"{record.digest}): {len(record.losses)} updates of "
        f"{loop['global_batch_size']} windows of {loop['max_length']} tokens "
        f"({tokens / 1e6:.1f} M), {(record.measured.train_seconds or 0) / 60:.0f} minutes on "
        f"{record.environment['cores']} CPU cores"
    )


def main(first: Path, second: Path, target: Path) -> None:
    stages = [record_module.from_file(run / "record.json") for run in (first, second)]
    model = AutoModelForCausalLM.from_pretrained(second / "model", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(second / "model")
    fields = {k: v for k, v in stages[0].recipe["task"].items() if k in ("files", "valid_files")}
    task = registry.load("task", "text")(**{k: tuple(v) for k, v in fields.items()})
    train_texts = [e.text for e in task.examples("train")]
    valid_texts = [e.text for e in task.examples("in_domain")]
    encoder = Encoder(tokenizer, "decoder", 256)
    train = [i for t in train_texts for i in encoder.ids(t)]
    valid = [i for t in valid_texts for i in encoder.ids(t)]
    vocabulary = model.config.vocab_size
    ours, bits = perplexity_of_model(model, tokenizer, valid_texts)
    unigram = perplexity_of_ngrams(train, valid, vocabulary, 1)
    fivegram = perplexity_of_ngrams(train, valid, vocabulary, ORDER)

    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)
    prompts = ["It was a dark and stormy night", "The old man looked at her and"]
    samples = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=40,
            do_sample=False, repetition_penalty=1.2, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        samples.append(tokenizer.decode(out[0], skip_special_tokens=True).replace("\n", " "))
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        "---", "license: apache-2.0", "language: en", "library_name: transformers",
        "tags: [lowres, pretrained]", "---", "# tiny_lm", "",
        f"A Llama-architecture language model of {parameters:,} parameters, the model embedded in "
        "lowres for tests and the quickstart. It knows the English of nineteenth-century novels "
        "and nothing else; do not use it for anything but trying out.", "",
        f"- **Data**: 43 public-domain books, {sum(map(len, train_texts)):,} characters, "
        f"{len(train):,} tokens; validation on 3 other books, {len(valid):,} tokens.",
        f"- **Tokenizer**: byte-level BPE of {vocabulary:,} entries, trained on the training "
        "books.",
        f"- **First stage**, the books: {stage(stages[0])}.",
        "- **Second stage**, half books, half the grammatical sentences of the training split of "
        "the task `grammaticality`, one a line (no label, no row of an evaluation split): "
        f"{stage(stages[1])}.",
        "", "| validation books | perplexity per token |", "|---|--:|",
        f"| unigram | {unigram:.1f} |",
        f"| 5-gram, interpolated absolute discounting | {fivegram:.1f} |",
        f"| tiny_lm (bfloat16, as stored) | {ours:.1f} |", "",
        f"{bits:.3f} bits per character.", "", "Greedy continuations (repetition penalty 1.2):", "",
        *[f"> {s}" for s in samples], "",
    ]  # fmt: skip
    (target / "README.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines[-16:]))


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:4]))
