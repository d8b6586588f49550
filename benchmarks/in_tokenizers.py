"""Vocabularies and encoding in `tokenizers` and `tiktoken`; tinylm's are in in_tinylm.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tasks import documents


class Contestant:
    """One library; `tokenizers` takes its number of threads from RAYON_NUM_THREADS."""

    def __init__(self, threads: int, library: str):
        self.threads, self.library = threads, library

    def learn_vocabulary(self, file: str, vocab_size: int, directory: str) -> dict:
        """With the pattern of tinylm's own tokenizer, which lies in the directory."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        ours, texts = Tokenizer.from_file(f"{directory}/tokenizer.json"), documents(file)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = ours.pre_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[*ours.get_added_tokens_decoder().values()],
            show_progress=False,
        )
        tick = time.perf_counter()
        tokenizer.train_from_iterator(texts, trainer)
        return {"seconds": time.perf_counter() - tick}

    def encode(self, file: str, directory: str) -> dict:
        texts, encode = documents(file), getattr(self, self.library)(directory)
        tick = time.perf_counter()
        ids = encode(texts)
        return {"seconds": time.perf_counter() - tick, "tokens": sum(map(len, ids))}

    def tokenizers(self, directory: str):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
        return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]

    def tiktoken(self, directory: str):
        """The same vocabulary: a token's rank is its id, because ids follow the merges."""
        import tiktoken

        spec = json.loads(Path(directory, "tokenizer.json").read_text())
        vocab = spec["model"]["vocab"]
        byte_of = {character: i for character, i in vocab.items() if i < 256}
        ranks = {bytes(map(byte_of.get, token)): i for token, i in vocab.items()}
        pattern = spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        made = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return lambda texts: made.encode_ordinary_batch(texts, num_threads=self.threads)
