"""Train the byte-level BPE tokenizer of the embedded model on the pretraining text.

    python recipes/pretrain/train_tokenizer.py recipes/pretrain/tiny_lm

Writes tokenizer.json and tokenizer_config.json into the folder, where config.json already lies.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lowres.core import paths

VOCABULARY = 4096
SPECIAL = ["<s>", "</s>", "<pad>"]


def main(folder: Path) -> None:
    source = paths.find("pretrain/books_train.txt.xz")
    if source is None:
        sys.exit(f"there is no pretrain/books_train.txt.xz under {paths.data_folder()}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with lzma.open(source, "rt", encoding="utf-8") as lines:
        tokenizer.train_from_iterator(lines, trainer)
    # Every window of pretraining begins with the start token, so every prompt must.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
    )
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
