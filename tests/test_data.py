"""Text files to token shards to batches: nothing lost, nothing seen across documents."""

import gzip
import json

import numpy
import pytest

from tinylm.corpus import (
    BLOCK,
    as_documents,
    list_files,
    make_corpus,
    plain_pieces,
    read_texts,
)
from tinylm.data import Windows, in_order, next_token_batch, permuted
from tinylm.errors import InputError
from tinylm.evaluate import encode_files, in_batches, shard_bytes, xz_bits_per_byte
from tinylm.stages.pretrain import Blanks, PretrainConfig
from tinylm.tokenizer import train_bpe


@pytest.fixture(scope="module")
def tokenizer(prose):
    return train_bpe([prose], 340)


def documents(*paths, **settings):
    return ["".join(d) for d in as_documents(read_texts(list_files(paths), **settings))]


def corpus_text(tokenizer, corpus, folder, split):
    return b"".join(shard_bytes(tokenizer, corpus.shards(folder, split)))


def test_every_kind_of_file_in_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("plain\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as f:
        f.write("packed")
    (tmp_path / "c.jsonl").write_text('\ufeff{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.md").write_text("# deep")
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert documents(tmp_path) == ["plain\n", "packed", "one", "two", "# deep"]


def test_a_folder_may_lie_in_a_hidden_one(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.txt").write_text("found")
    assert documents(tmp_path / ".cache") == ["found"]


def test_progress_is_told_in_bytes_on_the_disk(tmp_path):
    rows = [json.dumps({"text": f"{i} " * 500}) for i in range(2000)]
    for name, text in (("a.txt", "plain " * 400_000), ("b.jsonl", "\n".join(rows) + "\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for path in tmp_path.iterdir():
        told = []
        assert [*read_texts([path], seen=told.append)]
        assert sum(told) == path.stat().st_size
        assert min(told) >= 0


def test_what_windows_writes_is_the_same_text(tmp_path, tokenizer):
    """A byte order mark, and carriage returns around a separator."""
    (tmp_path / "a.txt").write_bytes("\ufeffthe cat\r\n##\r\nthe moon\r\n".encode())
    corpus = make_corpus([tmp_path / "a.txt"], tokenizer, tmp_path / "t", "##", held_out=0.0)
    assert corpus_text(tokenizer, corpus, tmp_path / "t", "train") == b"the catthe moon"
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "the cat"}\r\n{"text": "a"}\r\n'.encode())
    assert documents(tmp_path / "b.jsonl") == ["the cat", "a"]


def test_a_separator_splits_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one<|doc|>two<|doc|>three")
    assert documents(tmp_path / "a.txt", separator="<|doc|>") == ["one", "two", "three"]


DEEP = pytest.param('{"text": ' + "[" * 200_000, id="deep")


@pytest.mark.parametrize("line", ['{"text": "x"', "[1, 2]", '{"body": "x"}', '{"text": 5}', DEEP])
def test_a_bad_json_line_is_named_by_number(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2"):
        documents(tmp_path / "a.jsonl")


def test_a_broken_gzip_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 10_000)[:-20])
    with pytest.raises(InputError, match=r"a\.txt\.gz"):
        documents(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("content", [b"%PDF-1.4\n\xe2\0\0", "Windows\n".encode("utf-16")])
def test_what_is_not_text_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.gz").write_bytes(gzip.compress(content))
    for name in ("a.txt", "b.gz"):
        with pytest.raises(InputError, match=rf"{name}: not plain text"):
            documents(tmp_path / name)


class Slow:
    """A file that hands out few bytes at a time, to force many cuts."""

    def __init__(self, content):
        self.content = content

    def read(self, n):
        head, self.content = self.content[:7], self.content[7:]
        return head


def test_tokens_do_not_depend_on_where_a_document_was_cut(prose, tokenizer):
    text = prose[:3000] + "  many   spaces \n\n and\r\nline\tends é漢字 " + prose[:500]
    for separator in ("", "cat"):
        pieces = list(plain_pieces(Slow(text.encode()), separator))
        whole = text.split(separator) if separator else [text]
        ids, found = [], []
        for piece, ends in pieces:
            ids += tokenizer.encode(piece)
            if ends:
                found, ids = [*found, ids], []
        assert len(pieces) > 20
        assert found == [tokenizer.encode(document) for document in whole]


def test_shards_hold_the_text_to_the_byte(tmp_path, tokenizer, prose):
    raw = prose.encode() + b"\xff\xfe not UTF-8 \xed\xa0\x80\n" + "Ünïcödé 漢字\n".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    corpus = make_corpus(list_files([tmp_path / "a.txt"]), tokenizer, tmp_path / "out")
    text = [corpus_text(tokenizer, corpus, tmp_path / "out", s) for s in ("train", "heldout")]
    assert b"".join(text) == raw
    assert (corpus.train_bytes, corpus.heldout_bytes) == tuple(map(len, text))
    assert corpus.invalid_bytes == 5
    assert abs(len(text[1]) / len(raw) - 0.1) < 0.01
    assert not list((tmp_path / "out").glob("*.partial"))


def test_newlines_around_documents_do_not_count_wherever_one_is_cut(tmp_path, tokenizer):
    """Nor when a text is judged: it is what training would have read."""
    documents, path = ["abc.\n" * (BLOCK // 4) + "moon", "cat"], tmp_path / "a.txt"
    path.write_text("\n##\n".join(documents) + "\r\n")
    corpus = make_corpus([path], tokenizer, tmp_path / "t", "##", held_out=0.0)
    (shard,) = corpus.shards(tmp_path / "t", "train")
    begin, end = tokenizer.special["<|begin|>"], tokenizer.special["<|end|>"]
    assert shard.tolist() == [i for d in documents for i in (begin, *tokenizer.encode(d), end)]
    assert encode_files(tokenizer, [path], "##").tolist() == shard.tolist()


def test_duplicates_are_dropped_and_counted(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the cat##a bird##the cat##the moon##a bird##the cat ")
    corpus = make_corpus(
        list_files([tmp_path / "a.txt"]), tokenizer, tmp_path / "out", "##", held_out=0.0
    )
    assert (corpus.documents, corpus.duplicates) == (4, 2)
    text = corpus_text(tokenizer, corpus, tmp_path / "out", "train")
    assert text == b"the cata birdthe moonthe cat "


def test_of_many_documents_whole_ones_are_held_out(tmp_path, tokenizer):
    rows = [{"text": f"the cat number {i}"} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = make_corpus(list_files([tmp_path / "a.jsonl"]), tokenizer, tmp_path / "out")
    shard = corpus.shards(tmp_path / "out", "heldout")[0]
    begin, end = tokenizer.special["<|begin|>"], tokenizer.special["<|end|>"]
    assert (shard == begin).sum() == (shard == end).sum() == 20
    assert shard[0] == begin
    assert shard[-1] == end


def test_a_share_that_no_document_reaches_holds_out_the_end_of_each(tmp_path, tokenizer):
    texts = (f"the cat saw {i} birds near an old tree " * 20 for i in range(150))
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    corpus = make_corpus([tmp_path / "a.jsonl"], tokenizer, tmp_path / "t", "", 0.005)
    assert corpus.heldout_tokens >= 150


def test_an_empty_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="no text"):
        make_corpus(list_files([tmp_path / "a.jsonl"]), tokenizer, tmp_path / "out")


def test_a_byte_that_has_changed_is_told(tmp_path, tokenizer, prose):
    (tmp_path / "a.txt").write_text(prose)
    corpus = make_corpus([tmp_path / "a.txt"], tokenizer, tmp_path)
    shard = tmp_path / "heldout-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xfe")
    with pytest.raises(InputError, match=r"data.json: .* a heldout token \d+, expected less than"):
        corpus.shards(tmp_path, "heldout")


def test_a_bad_row_leaves_nothing_half_done(tmp_path, tokenizer):
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "fine"}\n{"text": 5}\n')
    with pytest.raises(InputError, match="line 2"):
        make_corpus([rows], tokenizer, tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer, prose):
    import tracemalloc

    def peak(copies):
        path = tmp_path / f"{copies}.txt"
        path.write_text("".join(f"{i} {prose}" for i in range(copies)))
        make_corpus(list_files([path]), tokenizer, tmp_path / "warm")  # caches are filled
        tracemalloc.start()
        make_corpus(list_files([path]), tokenizer, tmp_path / str(copies))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    small = 3 * BLOCK // len(prose)
    assert peak(4 * small) < 1.3 * peak(small)


# ---- windows ------------------------------------------------------------------------------------


def test_an_epoch_visits_every_window_once():
    windows = Windows([numpy.arange(1001), numpy.arange(2000, 2500)], 10, seed=1)
    rows = windows.draw(windows.per_epoch)
    first = rows[:, 0]
    assert windows.per_epoch == 99 + 48
    assert len(set(first.tolist())) == len(first)
    assert (numpy.diff(rows, axis=1) == 1).all()
    assert not (numpy.diff(first) > 0).all()
    again = windows.draw(windows.per_epoch)
    assert (again[:, 0] != first).any()


def test_any_position_can_be_resumed():
    shards = [numpy.arange(5000)]
    ahead = Windows(shards, 16, seed=3)
    ahead.draw(700)
    resumed = Windows(shards, 16, seed=3)
    resumed.drawn = ahead.drawn
    assert (ahead.draw(50) == resumed.draw(50)).all()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 4097])
def test_permuted_is_a_permutation(n):
    images = [permuted(i, n, key=7) for i in range(n)]
    assert sorted(images) == list(range(n))
    assert n < 10 or images != [permuted(i, n, key=8) for i in range(n)]


def test_a_text_shorter_than_a_context_is_refused():
    with pytest.raises(InputError, match="10 tokens, fewer than one context of 16"):
        Windows([numpy.arange(10)], 16, seed=0)


def test_no_target_crosses_into_the_next_document():
    batch = next_token_batch(numpy.array([[5, 6, 1, 0, 7, 8, 1, 0, 9]]), begin=0)
    assert batch.targets.tolist() == [[6, 1, -1, 7, 8, 1, -1, 9]]
    assert batch.start.tolist() == [[0, 0, 0, 3, 3, 3, 3, 7]]


@pytest.mark.parametrize("size", [3, 2**64])
def test_evaluation_predicts_each_token_once(size):
    shard = numpy.array([0, *range(2, 60), 1])
    batches = list(in_batches(in_order([shard], 8), size, begin=0))
    targets = numpy.concatenate([b.targets[b.targets >= 0] for b in batches])
    assert targets.tolist() == shard[1:].tolist()


def test_xz_knows_the_training_text(prose):
    half = len(prose) // 2
    train, heldout = prose[:half].encode(), prose[half:].encode()
    alone = xz_bits_per_byte([], [heldout])
    assert 0 < xz_bits_per_byte([train], [heldout]) < alone
    assert xz_bits_per_byte([train + heldout], [heldout]) < 0.1


# ---- blanks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blanks(tokenizer):
    return Blanks(tokenizer)


def test_prefix_middle_and_suffix_are_the_text(blanks, tokenizer, prose):
    """And a blank is whole words, with the space before them."""
    rng = numpy.random.default_rng(0)
    for i in range(200):
        text = prose[i * 40 : i * 40 + 80].strip()
        made, learned = blanks.example(tokenizer.encode(text), rng, blank_only=True)
        made, at = made[:-1], learned.index(True)
        shown = tokenizer.decode(made)
        prefix, rest = shown.removeprefix("<|prefix|>").split("<|suffix|>")
        suffix, middle = rest.removesuffix("<|end|>").split("<|middle|>")
        assert prefix + middle + suffix == text
        assert middle == tokenizer.decode(made[at:-1])
        assert middle.startswith(" ") or not prefix or prefix[-1] == "\n"
        assert not suffix or not suffix[0].isalnum()
        assert middle.strip()


@pytest.mark.parametrize("objective", ["missing", "mixed"])
def test_loss_falls_on_the_middle_or_on_everything(blanks, tokenizer, prose, objective):
    ids = numpy.array(tokenizer.encode(prose))
    rows = numpy.stack([ids[i * 100 : i * 100 + 65] for i in range(20)])
    config = PretrainConfig(objective=objective, max_steps=1)
    batch = blanks.batch(rows, tokenizer.special["<|begin|>"], config, 0)
    made = 0
    for tokens, targets, start in zip(batch.tokens, batch.targets, batch.start, strict=True):
        if blanks.prefix not in tokens:
            assert objective == "mixed"
            continue
        made += 1
        assert (tokens[start] == blanks.prefix)[targets >= 0].all()
        inside = False
        for i, token in enumerate(tokens):
            inside = (inside or token == blanks.middle) and token != blanks.end
            if objective == "missing":
                assert (targets[i] >= 0) == inside
            if targets[i] >= 0 and i + 1 < len(tokens):
                assert targets[i] == tokens[i + 1]
    assert made == 20 if objective == "missing" else 3 < made < 17


def test_blanks_depend_on_seed_and_row_only(blanks, tokenizer, prose):
    """Or resuming would not give the same bits."""
    ids = numpy.array(tokenizer.encode(prose))
    rows = numpy.stack([ids[i * 100 : i * 100 + 65] for i in range(8)])
    config = PretrainConfig(objective="missing", max_steps=1)
    begin = tokenizer.special["<|begin|>"]
    whole = blanks.batch(rows, begin, config, 0)
    late = blanks.batch(rows[4:], begin, config, 4)
    assert (whole.tokens[4:] == late.tokens).all()
    assert (whole.targets[4:] == late.targets).all()
