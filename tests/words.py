"""A tokenizer in Python for worker processes: nothing to import."""

import os

WORDS = ["[PAD]", "[UNK]", *"abcdefgh"]


class Words:
    """The id of each word; ends its process at the word "die"."""

    def __call__(self, texts, **options):
        if "die" in texts:
            os._exit(9)
        return {"input_ids": [[WORDS.index(word) if word in WORDS else 1 for word in text.split()] for text in texts]}
