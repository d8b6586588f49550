"""The tokenizer against Hugging Face's, against its own Python twin, and against hostile text."""

import functools
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import regex
from commands import python
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from tinylm import _bpe_python, backend
from tinylm import tokenizer as tk
from tinylm._tokenizer_json import LLAMA3_PATTERN, PATTERN, splitter
from tinylm.errors import InputError
from tinylm.llama2c import load_tokenizer
from tinylm.tokenizer import SPECIAL_TOKENS, Tokenizer

COMPILED = tk.bpe is not _bpe_python
SPACES = [*"\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2007\u200a\u200b\u200c\u200d"]
SPACES += [*"\u2028\u2029\u202f\u205f\u3000\ufeff\u180e\u2060", "\r\n", "\n\r", "  ", " \n", "\n\n"]
TRICKY = [
    "'s", "'S", "'ſ", "'ll", "'LL", "'Ll", "'ve", "'Re", "'t", "'D", "'m", "'K", "\u2019s", "don't",
    "<|end|>", "<|begin|>", "<|user|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<0x0A>", "▁",
    "▁▁", "123", "1234567", "½²", "Ⅻ", "٣٤", "ǅ", "e\u0301", "का", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "漢字",
    "한국어", "สวัสดี", "the", " cat", " sat", "__init__", "(x)", "!!!\n\n", "\0", "\x7f", "\x9f",
    "ß", "İ", "ﬁ", "ﬆ", "İ's", " '", "''s", " 's",
]  # fmt: skip
SENTENCES = ["The cat sat on the mat, and the dog didn't.", "Once upon a time there was 1 king."]


def known_characters() -> list[str]:
    """Every character that the regex engine of Hugging Face knows (Unicode 14 at present)."""
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)
    unassigned = pre_tokenizers.Split(Regex(r"\p{Cn}+"), "removed")
    return [c for part, _ in unassigned.pre_tokenize_str(everything) for c in part]


@pytest.fixture(scope="module")
def strings() -> list[str]:
    """Strings of everything: words, spaces, ASCII, any script (a block of 128 is one's home)."""
    rng = random.Random(0)
    characters = known_characters()
    assert len(characters) > 200_000

    def some() -> str:
        home = rng.randrange(0x3100) // 128 * 128
        return rng.choice([
            lambda: rng.choice(TRICKY),
            lambda: rng.choice(SPACES) * rng.choice([1, 1, 2, 3]),
            lambda: chr(rng.randrange(128)),
            lambda: rng.choice(characters),
            lambda: "".join(characters[home + rng.randrange(128)] for _ in range(4)),
        ])()  # fmt: skip

    return ["".join(some() for _ in range(rng.choice([1, 2, 4, 8, 30]))) for _ in range(4000)]


@pytest.fixture(scope="module")
def bpe(strings) -> Tokenizer:
    return tk.train_bpe([*SENTENCES * 20, *strings[:2000]], 2000)


@functools.cache
def small() -> Tokenizer:
    return tk.train_bpe(SENTENCES, 280)


def llama2c(folder) -> Tokenizer:
    """A small tokenizer.bin of llama2.c, written here, read by tinylm."""
    pieces = [*" abcdefghijklmnopqrstuvwxyzTO.,'<|>é漢", " t", "he", " the", "at", " c", " cat"]
    pieces += ["en", "end", "an", "nd", " an", " and", "and", "  ", "    ", "aa", "aaa", "aaaa"]
    tokens = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % b for b in range(256))]
    tokens += [piece.encode() for piece in pieces]
    data = b"".join(struct.pack("<fi", -i, len(t)) + t for i, t in enumerate(tokens))
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 7) + data)
    return load_tokenizer(folder / "tokenizer.bin")


def saved(tokenizer: Tokenizer, path) -> HFTokenizer:
    tokenizer.save(path)
    return HFTokenizer.from_file(str(path / "tokenizer.json"))


def assert_same_ids(ours: Tokenizer, theirs: HFTokenizer, strings: list[str]) -> None:
    theirs.encode_special_tokens = True  # a special token in a text is text for them too
    for text in strings:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), repr(text)


# ------------------------------------------------------------------ made here


def test_transformers_users_get_the_same_ids(bpe, strings, tmp_path):
    assert_same_ids(bpe, saved(bpe, tmp_path), strings)


def test_character_tokenizer_gives_the_same_ids_too(strings, tmp_path):
    tokenizer = tk.train_characters([*SENTENCES, "é漢\ud800"])
    assert_same_ids(tokenizer, saved(tokenizer, tmp_path), strings)
    assert tokenizer.decode(tokenizer.encode("The 漢: ж🙂\udc80")) == "The 漢\ufffd " + 3 * "\ufffd"


def test_llama2c_tokenizer_gives_the_same_ids_too(strings, tmp_path):
    tokenizer = llama2c(tmp_path)
    assert_same_ids(tokenizer, saved(tokenizer, tmp_path), strings)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.add_bos


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(
    [b"\xed\xa0\x80", b"\xed\xb2\x80", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", b" a", b"\0"]
)).map(b"".join)))  # fmt: skip
def test_any_bytes_come_back(data):
    ids = small().encode(data.decode("utf-8", "surrogateescape"))
    assert small().decode_bytes(ids) == data
    assert small().decode(ids) == data.decode("utf-8", "replace")


def test_a_lone_surrogate_is_a_replacement_character(bpe):
    assert bpe.decode(bpe.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert bpe.decode_bytes(bpe.encode("\udcff")) == b"\xff"


def test_no_text_becomes_a_special_token(bpe, tmp_path):
    for tokenizer in (bpe, tk.train_characters(["<|end|>"]), llama2c(tmp_path)):
        for name in (*SPECIAL_TOKENS, "<s>", "</s>", "<unk>"):
            ids = tokenizer.encode(f"a{name}b {name}{name}")
            if "\ufffd" not in tokenizer.decode(ids):
                assert tokenizer.decode(ids) == f"a{name}b {name}{name}"
            assert not set(ids) & set(tokenizer.special.values())


def test_special_tokens_stand_after_the_others_and_decode_to_their_text(bpe):
    assert [bpe.special[name] for name in SPECIAL_TOKENS] == list(range(1992, 2000))
    assert bpe.vocab_size == len(bpe.tokens) == 2000
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id, bpe.add_bos) == (1992, 1993, 1993, False)
    ids = [bpe.bos_id, *bpe.encode("the cat"), bpe.eos_id]
    assert bpe.decode(ids) == "<|begin|>the cat<|end|>"
    assert bpe.decode(ids, skip_special=True) == "the cat"
    assert bpe.decode_bytes([]) == b""


@pytest.mark.parametrize("wrong", [-1, 2000])
def test_an_id_outside_the_vocabulary_is_named(bpe, wrong):
    with pytest.raises(ValueError, match=f"id {wrong} is not in the vocabulary of 2000"):
        bpe.decode([1, wrong])


def test_a_loaded_tokenizer_is_the_saved_one(bpe, strings, tmp_path):
    bpe.with_special([], {"chat_template": "{{ messages }}"}).save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert [again.encode(s) for s in strings[:200]] == [bpe.encode(s) for s in strings[:200]]
        assert (again.special, again.eos_id) == (bpe.special, bpe.eos_id)
        assert again.config["chat_template"] == "{{ messages }}"


def test_encode_array_is_encode_in_uint32(bpe):
    array = bpe.encode_array("The cat")
    assert array.dtype == np.uint32 and array.tolist() == bpe.encode("The cat")
    assert bpe.encode("") == [] and len(bpe.encode_array("")) == 0


@pytest.mark.parametrize("piece", ["a", " ", "\n ", "ab", "🙂", "漢", "1", "'", "\u0301", "▁"])
def test_a_long_monotonous_text_does_not_take_forever(bpe, piece, tmp_path):
    """A quadratic encoder would need hours for these."""
    text = piece * (300_000 // len(piece))
    assert bpe.decode(bpe.encode(text)) == text
    assert llama2c(tmp_path).decode(llama2c(tmp_path).encode(text)) == text.replace("▁", " ")


# ------------------------------------------------------------------ training


def test_training_depends_on_nothing_but_the_text(strings):
    texts = [*SENTENCES * 3, *strings[:300]]
    first = tk.train_bpe(texts, 600)
    assert tk.train_bpe(iter(texts[::-1]), 600).spec == first.spec


def test_the_commonest_pair_is_merged_first_and_the_smallest_among_equals():
    tokenizer = tk.train_bpe(["bcbc", " bc", " xy"], 256 + 4 + len(SPECIAL_TOKENS))
    assert tokenizer.tokens[256:260] == [b"bc", b" x", b" bc", b"bcbc"]


@pytest.mark.parametrize("module", [tk.bpe, _bpe_python])
def test_a_pair_that_came_and_went_is_no_merge(module):
    """Merging "ab" makes "ab" before "a", and unmakes it at once: no text holds this pair."""
    merges = module.learn_merges({"ababab": 3}, 99)
    assert merges == [(97, 98), (256, 256), (257, 256)]


def test_a_text_too_small_for_the_vocabulary_says_what_is_possible():
    with pytest.raises(ValueError, match="allows only 266 tokens; use --vocab-size 266 or less"):
        tk.train_bpe(["abc"], 1000)
    assert tk.train_bpe(["abc"], 266).vocab_size == 266
    with pytest.raises(ValueError, match="264 or more"):
        tk.train_bpe(["abc"], 263)


def test_rare_pieces_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(tk, "MOST_PIECES", 8)
    counts = tk.count_pieces([" common"] * 50 + [f" {c}" for c in "abcdefghijklmnop"] * 2)
    assert len(counts) <= 8 and counts[" common"] == 50


def test_progress_counts_merges_up_to_the_last():
    seen = []
    tk.train_bpe(SENTENCES, 270, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


# ------------------------------------------------------------------ the compiled twin


@pytest.mark.skipif(not COMPILED, reason="the extension is not built: there is no twin")
def test_compiled_and_python_agree(bpe, strings, tmp_path):
    for text in (*strings, "".join(strings)):
        assert [*tk.bpe.split_words(text)] == [*_bpe_python.split_words(text)]
    counts = tk.count_pieces(strings)
    assert tk.bpe.count_words(strings) == _bpe_python.count_words(strings)
    assert tk.bpe.learn_merges(counts, 3000) == _bpe_python.learn_merges(counts, 3000)
    spec = json.loads(json.dumps(bpe.spec))
    spec["model"] |= {"ignore_merges": True, "merges": bpe.spec["model"]["merges"][::-1]}
    characters = tk.train_characters(SENTENCES)
    for tokenizer in (bpe, Tokenizer(spec), characters, llama2c(tmp_path)):
        python = _bpe_python.Encoder(**tokenizer._layout.encoder_arguments(tokenizer.spec))
        for text in [*strings, "a" * 500, "\udcc3\udca9 \ud800"]:
            pieces = [*tokenizer._layout.pieces(text)]
            ids = python.encode(pieces)
            np.testing.assert_array_equal(tokenizer.encode_array(text), ids)
            np.testing.assert_array_equal(tokenizer._encoder.encode(pieces), ids)


@pytest.mark.skipif(not COMPILED, reason="the readable twin counts on one thread")
def test_pieces_are_counted_alike_on_any_number_of_threads(strings):
    before, counts = backend.threads(), []
    for n in (1, 2, 5):
        backend.set_threads(n)
        counts.append(tk.bpe.count_words(strings))
    backend.set_threads(before)
    assert counts[0] == counts[1] == counts[2] == _bpe_python.count_words(strings)


def test_a_child_of_fork_can_train_too(tmp_path):
    """It has none of its parent's threads; OpenMP would wait for them for ever."""
    program = (
        "import os\n"
        "from tinylm import backend, tokenizer\n"
        "backend.set_threads(2)\n"
        "spec = tokenizer.train_bpe(['the cat'] * 99, 266).spec\n"
        "if not (child := os.fork()):\n"
        "    os._exit(tokenizer.train_bpe(['the cat'] * 99, 266).spec != spec)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    python(program, cwd=tmp_path)


@pytest.mark.parametrize("module", [tk.bpe, _bpe_python])
def test_a_full_cache_starts_again(module, monkeypatch):
    monkeypatch.setattr(module, "CACHE_SIZE", 10)
    encoder = module.Encoder(list(range(256)), [(97, 98, 256)])
    pieces = [str(i) + "ab" for i in range(25)]
    first = encoder.encode(pieces)
    np.testing.assert_array_equal(encoder.encode(pieces), first)


# ------------------------------------------------------------------ made elsewhere


def byte_level(strings, pre_tokenizer, **options) -> HFTokenizer:
    """A tokenizer that Hugging Face trains; options go into the model in its tokenizer.json."""
    theirs = HFTokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(strings, trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"],
        show_progress=False,
    ))  # fmt: skip
    return with_model(theirs, **options)


def with_model(theirs: HFTokenizer, **options) -> HFTokenizer:
    spec = json.loads(theirs.to_str())
    spec["model"] |= options
    return HFTokenizer.from_str(json.dumps(spec))


def loaded(theirs: HFTokenizer, folder, config: dict | None = None) -> Tokenizer:
    theirs.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def sequence(*steps):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])


BYTE_LEVEL_KINDS = {
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "gpt4": (sequence(pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True)), {}),
    "llama3": (sequence(pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")),
               {"ignore_merges": True}),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False)]), {}),
    "digits": (sequence(pre_tokenizers.Digits()), {}),
    "matches only": (sequence(pre_tokenizers.Split(Regex(r"\p{L}+"), "removed", invert=True)), {}),
    "no split": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_byte_level_files_give_the_ids_of_hugging_face(kind, strings, tmp_path):
    pre_tokenizer, options = BYTE_LEVEL_KINDS[kind]
    theirs = byte_level(SENTENCES * 20 + strings[:1000], pre_tokenizer, **options)
    config = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": None}
    ours = loaded(theirs, tmp_path, config)
    assert_same_ids(ours, theirs, strings[:2000])
    assert (ours.special, ours.eos_id, ours.bos_id) == ({"<|endoftext|>": 0}, 0, None)
    assert_same_ids(ours, saved(ours, tmp_path / "again"), strings[:100])


LLAMA2_KINDS = {
    "prepend": {},
    "first": {"scheme": "first", "split": False},
    "always": {"scheme": "always", "split": True},
    "never": {"scheme": "never", "split": True},
    "digits, never": {"scheme": "never", "split": True},
    "digits, first": {"scheme": "first", "split": True},
    "prepend, never": {"scheme": "never", "split": True},
}


@pytest.mark.parametrize("kind", LLAMA2_KINDS)
def test_llama2_files_give_the_ids_of_hugging_face(kind, strings, tmp_path):
    theirs = saved(llama2c(tmp_path), tmp_path / "ours")
    if kind != "prepend":
        scheme, split = LLAMA2_KINDS[kind].values()
        if "prepend" not in kind:
            theirs.normalizer = None
        theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
        if "digits" in kind:
            digits = pre_tokenizers.Digits(individual_digits=True)
            theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, theirs.pre_tokenizer])
        theirs.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    ours = loaded(theirs, tmp_path)
    theirs.encode_special_tokens = True
    for text in strings[:2000]:
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)
    assert ours.decode(ours.encode("the cat and é🙂\n")) == "the cat and é🙂\n"
    theirs.encode_special_tokens = False
    after = [ours.encode(text, begins=False) for text in ("the cat", "a moon")]
    ids = [1, *after[0], 2, *after[1]]
    assert theirs.encode("<s>the cat</s>a moon", add_special_tokens=False).ids == ids
    assert ours.decode(ids, skip_special=True).split() == ["the", "cata", "moon"]


@pytest.mark.parametrize("kind", ["whole", "bytes"])
def test_a_text_with_spaces_written_out_is_not_cut_where_that_tells(kind, strings, tmp_path):
    theirs = HFTokenizer(models.BPE())
    steps = [pre_tokenizers.Metaspace(prepend_scheme="never", split=False)]
    if kind == "bytes":
        steps.append(pre_tokenizers.ByteLevel(False, use_regex=False))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(steps)
    pieces = ["a", "b", "▁"] if kind == "whole" else pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate([*pieces, "ab", "▁ab", "bâ"])}
    merges = [] if kind == "whole" else [["b", "â"]]
    theirs = with_model(theirs, vocab=vocab, merges=merges, ignore_merges=kind == "whole")
    ours = loaded(theirs, tmp_path)
    for text in ("ab", "ab b", " ab", "b ", "a b a"):
        assert ours.encode(text) == theirs.encode(text).ids, text


def test_the_space_that_llama2_puts_before_a_text_comes_off_where_a_text_begins(tmp_path):
    tokenizer = llama2c(tmp_path)
    cat, the = tokenizer.encode("cat"), tokenizer.encode("the")
    assert tokenizer.decode_bytes(cat + the) == b" cat the"
    assert tokenizer.decode(cat + the) == "cat the"
    assert tokenizer.decode([1, *cat, 2, 1, *the]) == "<s>cat</s><s>the"
    assert tokenizer.decode([1, *cat], skip_special=True) == "cat"
    assert tokenizer.decode(the, continues=True) == "".join(tokenizer.decode_stream(the)) == " the"
    assert tokenizer.decode(tokenizer.encode("  cat")) == "  cat"


def test_a_stream_waits_for_whole_characters(bpe):
    ids = [*b"a\xf0\x9f\x99\x82b\xc3"]
    assert list(bpe.decode_stream(ids)) == ["a", "", "", "", "🙂", "b", "", "\ufffd"]


@pytest.mark.parametrize("config, wants", [({}, True), ({"add_bos_token": False}, False)])
def test_whether_a_model_wants_bos_is_read_from_either_file(config, wants, strings, tmp_path):
    theirs = byte_level(SENTENCES, BYTE_LEVEL_KINDS["gpt2"][0])
    theirs.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert loaded(theirs, tmp_path, {"bos_token": "<|endoftext|>"} | config).add_bos == wants


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
REFUSED = {
    "pre_tokenizer 'BertPreTokenizer'": {"pre_tokenizer": {"type": "BertPreTokenizer"}},
    "pre_tokenizer 'ByteLevel' .*add_prefix_space": {
        "pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}
    },
    "pre_tokenizer after ByteLevel: 'Digits'": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [BYTE_LEVEL, {"type": "Digits", "individual_digits": True}],
        }
    },
    "pre_tokenizer before 'Metaspace'": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
            ],
        }
    },
    "pre_tokenizer before 'Metaspace' .*never": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated"},
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"},
            ],
        }
    },
    "Split pattern": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated"}
    },
    r"Hugging Face reads \\w in": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}
    },
    "normalizer 'Prepend'": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}] * 2,
        }
    },
    "normalizer 'NFC'": {"normalizer": {"type": "NFC"}},
    "decoder 'WordPiece'": {"decoder": {"type": "WordPiece"}},
    "model 'Unigram'": {"model": {"type": "Unigram", "vocab": []}},
    "dropout 0.1": {"model": {"dropout": 0.1}},
    "end_of_word_suffix '</w>'": {"model": {"end_of_word_suffix": "</w>"}},
    "fuse_unk": {"model": {"fuse_unk": True}},
    "byte_fallback without the token <0x00>": {"model": {"byte_fallback": True}},
    "added token 'x': it is not special": {
        "added_tokens": [{"id": 1, "content": "x", "special": False}]
    },
    "merge 'x y' needs a token": {"model": {"merges": ["x y"]}},
    "not what a tokenizer.json holds": {"model": None},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_understood_is_refused_by_name(reason, bpe, tmp_path):
    spec = json.loads(json.dumps(bpe.spec))
    for part, content in REFUSED[reason].items():
        spec[part] = spec[part] | content if part == "model" and content else content
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{reason}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        (r"[\p{L}&&[^\p{Han}]]+", r"[\p{L}&&["),
        ("a{1,3}+", "{1,3}+"),
        ("a{,3}+", "{,3}+"),
        ("a{3}?", "{3}?"),
        (r"\p{Word}+", r"\p{Word}"),
    ],
)
def test_a_pattern_that_hugging_face_reads_in_another_way_is_refused(pattern, part):
    with pytest.raises(InputError, match=regex.escape(f"reads {part} in another way")):
        splitter(pattern)


def test_a_bracket_that_is_written_out_begins_no_set():
    pattern, text = r"\[[^\]]*\]|[\[\\(]+", r"a[b]c[\(["
    theirs = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
    assert [*splitter(pattern)(text)] == [part for part, _ in theirs]


BROKEN = [(None, "no such"), (b"{", "cannot be"), (b"\xff", "cannot be"), (b"[]", "JSON object")]


@pytest.mark.parametrize("content, reason", BROKEN)
def test_a_broken_file_is_named(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{reason}"):
        Tokenizer.load(tmp_path)


def test_a_broken_llama2c_file_is_named(tmp_path):
    llama2c(tmp_path)
    file = tmp_path / "tokenizer.bin"
    assert load_tokenizer(file, 280).vocab_size == 280
    good, file = file.read_bytes(), tmp_path / "broken.bin"
    backwards, no_utf8 = struct.pack("<fi", 0, -8), struct.pack("<fi", 0, 1) + b"\xff"
    for broken in (good[:-20] + b"\0", good[:-1], good + backwards, good + no_utf8):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"broken\.bin: not a tokenizer\.bin"):
            load_tokenizer(file)
    with pytest.raises(ValueError, match=r"missing\.bin: not a tokenizer\.bin"):
        load_tokenizer(tmp_path / "missing.bin")


def test_real_llama2c_tokenizer_where_the_shared_data_is():
    file = Path("/work/shared/data/stories260K/tok512.bin")
    if not file.exists():
        pytest.skip("no shared data here")
    tokenizer = load_tokenizer(file, 512)
    ids = tokenizer.encode("Once upon a time, there was a little girl.")
    assert [1, *ids][:4] == [1, 403, 407, 261]
    assert tokenizer.decode(ids) == "Once upon a time, there was a little girl."
