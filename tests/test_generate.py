"""Decoding with a cache gives what full forwards give; sampling draws what it should."""

import sys

import numpy
import pytest

import tinylm
from tinylm.errors import InputError
from tinylm.generate import alike, beam_search, blank_ids, draw, fill, sample, stream, stream_text
from tinylm.tokenizer import train_bpe

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 30, 12]]
LONG = [i % 31 for i in range(20)]


def greedy(model, ids, n):
    """The slow way: a whole forward for every token."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(model(ids).data[0, -1].argmax()))
    return ids[-n:]


def test_the_cache_gives_the_tokens_of_the_full_forward(model, each_backend):
    rng = numpy.random.default_rng(0)
    for prompt in PROMPTS:
        new = [int(x) for (x,) in stream(model, [prompt], 20, rng, temperature=0)]
        assert new == greedy(model, prompt, 20)


@pytest.mark.parametrize("apart", [256, 4, 0])  # read at once, in groups, each by itself
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(
    model, each_backend, apart, monkeypatch
):
    """Padding must not be seen by attention, nor shift positions."""
    monkeypatch.setattr(sys.modules["tinylm.generate"], "APART", apart)
    prompts = [LONG, *PROMPTS, LONG[4:], PROMPTS[0]]
    steps = stream(model, prompts, 20, numpy.random.default_rng(0), temperature=0)
    rows = numpy.array(list(steps)).T.tolist()
    assert rows == [greedy(model, prompt, 20) for prompt in prompts]


def test_prompts_are_read_in_groups_of_like_length(monkeypatch):
    monkeypatch.setattr(sys.modules["tinylm.generate"], "APART", 4)
    rows = [[0] * n for n in (1, 2, 2, 9, 9, 10, 40, 41)]
    assert [[*map(len, group)] for group in alike(rows)] == [[1, 2, 2], [9, 9, 10], [40, 41]]
    assert alike(rows[:1]) == [rows[:1]]


def test_equal_prompts_are_read_once_and_answered_each(model, each_backend, monkeypatch):
    sizes, hidden = [], model.hidden

    def watched(tokens, *rest):
        sizes.append(tokens.shape)
        return hidden(tokens, *rest)

    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0]]
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", watched)
        steps = stream(model, prompts, 20, numpy.random.default_rng(0), temperature=0)
        rows = numpy.array(list(steps)).T.tolist()
    assert sizes == [(2, 6)] + [(4, 1)] * 19
    assert rows == [greedy(model, prompt, 20) for prompt in prompts]


def test_generation_goes_on_beyond_the_context(model):
    """Past 48 tokens the older half is dropped; the tokens are those of the shortened text."""
    ids = [int(x) for (x,) in stream(model, [[5]], 60, numpy.random.default_rng(0), temperature=0)]
    assert len(ids) == 60
    text = [5, *ids]
    assert text[49] == greedy(model, text[25:49], 1)[0]


def test_a_row_that_ended_stays_silent(model):
    alone = greedy(model, [5], 12)
    stop = alone[3]
    steps = list(
        stream(model, [[5], [7]], 12, numpy.random.default_rng(0), temperature=0, stop_ids=[stop])
    )
    first = [int(row[0]) for row in steps]
    end = first.index(stop)
    assert first[: end + 1] == alone[: end + 1]
    assert set(first[end + 1 :]) <= {-1}


def test_rows_that_ended_leave_and_the_others_go_on(model, each_backend, monkeypatch):
    """Most rows end early: what is left is computed alone, and says what it would have said."""
    prompts = [[i] for i in range(1, 9)]
    alone = [greedy(model, prompt, 30) for prompt in prompts]
    stops = sorted({row[k] for k, row in enumerate(alone[:6], 2)} - {*alone[6], *alone[7]})
    sizes, hidden = [], model.hidden

    def watched(tokens, *rest):
        sizes.append(len(tokens))
        return hidden(tokens, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", watched)
        rng = numpy.random.default_rng(0)
        said = [*stream(model, prompts, 30, rng, temperature=0, stop_ids=stops)]
    for row, expected in zip(numpy.transpose(said).tolist(), alone):
        end = next((i for i, token in enumerate(expected) if token in stops), 29)
        assert row == expected[: end + 1] + [-1] * (29 - end)
    assert sizes[0] == 8 > sizes[-1] >= 2


def test_sampling_follows_the_distribution():
    logits = numpy.log(numpy.array([[0.5, 0.3, 0.15, 0.05]], "float32"))
    rng = numpy.random.default_rng(0)

    def shares(**settings):
        drawn = sample(numpy.repeat(logits, 20_000, 0), rng, **settings)
        return numpy.bincount(drawn, minlength=4) / 20_000

    assert numpy.abs(shares() - [0.5, 0.3, 0.15, 0.05]).max() < 0.015
    assert numpy.abs(shares(top_k=2) - [0.625, 0.375, 0, 0]).max() < 0.015
    assert numpy.abs(shares(top_p=0.6) - [0.625, 0.375, 0, 0]).max() < 0.015
    hot = numpy.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    assert numpy.abs(shares(temperature=2.0) - hot / hot.sum()).max() < 0.015
    assert shares(temperature=0)[0] == 1
    assert shares(top_p=0)[0] == 1


def test_next_to_no_temperature_takes_the_likeliest():
    """A quotient by it would be infinite."""
    logits, rng = numpy.array([[1, 3, 2], [-5, -1, -9]], "float32"), numpy.random.default_rng(0)
    with numpy.errstate(all="raise", under="ignore"):
        assert sample(logits, rng, 5e-324).tolist() == [1, 1]


@pytest.mark.parametrize("temperature", [-1.0, numpy.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    """A negative one would prefer what is least likely."""
    with pytest.raises(InputError, match="temperature: expected 0 or more"):
        sample(numpy.zeros((1, 4), "float32"), numpy.random.default_rng(0), temperature)


@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 1000])
def test_drawing_by_runs_finds_what_one_running_sum_would(V):
    rng = numpy.random.default_rng(V)
    weights = rng.random((500, V)) * (rng.random((500, V)) < 0.5)  # half of them cannot be drawn
    weights[:, rng.integers(V)] = 1e-3
    share = rng.random(500)
    share[:2] = 0, numpy.nextafter(1, 0)
    drawn = draw(weights, share)
    ends = weights.cumsum(-1)
    expected = (ends > (share * ends[:, -1])[:, None]).argmax(-1)
    assert drawn.tolist() == expected.tolist()
    assert (weights[numpy.arange(500), drawn] > 0).all()


def test_a_seed_repeats_itself(model):
    def draw(seed):
        return [int(x) for (x,) in stream(model, [[5]], 20, numpy.random.default_rng(seed))]

    assert draw(3) == draw(3) != draw(4)


@pytest.fixture
def lm(prose):
    """An untrained model with a real tokenizer."""
    tokenizer = train_bpe([prose], 300)
    config = tinylm.ModelConfig(
        300, 2, 2, 2, 32, 64, 64, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id
    )
    return tinylm.Transformer(config, 3), tokenizer


def test_streamed_pieces_are_the_generated_text(lm):
    settings = {"max_new_tokens": 30, "seed": 1}
    pieces = list(stream_text(*lm, "the cat", **settings))
    text = tinylm.generate(*lm, "the cat", **settings)
    assert len(pieces) > 5
    assert "".join(pieces) == text
    assert not text.startswith("the cat")


@pytest.mark.parametrize("prompt", ["the cat", ""])
def test_greedy_generation_continues_the_encoded_prompt(lm, prompt):
    """An empty one is the begin token."""
    model, tokenizer = lm
    want = greedy(model, tokenizer.encode(prompt) or [tokenizer.bos_id], 10)
    if tokenizer.eos_id in want:
        want = want[: want.index(tokenizer.eos_id)]
    got = tinylm.generate(model, tokenizer, prompt, max_new_tokens=10, temperature=0.0)
    assert got == tokenizer.decode(want) != ""


def test_rows_of_the_table_that_are_no_tokens_are_never_written(lm, tmp_path):
    """Tables are padded to a round size; what the padding scores must not matter."""
    model, tokenizer = lm
    padded = tinylm.Transformer(tinylm.ModelConfig(**{**vars(model.config), "vocab_size": 320}))
    padded.embedding.weight.data[300:] = 100 * padded.embedding.weight.data[:20]
    tinylm.save(padded, tokenizer, tmp_path)
    text = tinylm.generate(*tinylm.load(tmp_path), "the cat", max_new_tokens=30, seed=1)
    assert text


def test_the_space_before_a_blank_belongs_to_the_middle(lm):
    _, tokenizer = lm
    text = tokenizer.decode(blank_ids(tokenizer, "The cat ___ a bird."))
    assert text == "<|prefix|>The cat<|suffix|> a bird.<|middle|>"


@pytest.mark.parametrize("text", ["no blank", "two ___ of ___ them"])
def test_a_text_without_exactly_one_blank_is_refused(lm, text):
    with pytest.raises(InputError, match="one blank"):
        fill(*lm, text)


def test_a_text_longer_than_the_context_is_refused(lm):
    with pytest.raises(InputError, match="longer than the context"):
        fill(*lm, "a cat sat under the moon " * 20 + "___")


def test_beam_search_finds_the_most_likely_answer():
    """Against every answer of up to two tokens, enumerated."""
    config = tinylm.ModelConfig(7, 1, 2, 2, 16, 32, 16, eos_token_id=1)
    model = tinylm.Transformer(config, 0)
    for p in model.parameters().values():
        p.data = p.data * 8

    def logp(ids):
        logits = model([4, 5, *ids]).data[0, -1].astype(float)
        return logits - numpy.log(numpy.exp(logits).sum())

    answers = {(): logp([])[1]}
    for a in (0, 2, 3, 4, 5, 6):
        answers[a,] = logp([])[a] + logp([a])[1]
        for b in (0, 2, 3, 4, 5, 6):
            answers[a, b] = logp([])[a] + logp([a])[b] + logp([a, b])[1]
    best = max(answers, key=answers.get)
    found, score = beam_search(model, [4, 5], 3, 36, [1])[0]
    assert tuple(found) == best
    assert abs(score - answers[best]) < 1e-4


def test_beam_search_knows_that_a_text_may_end_in_several_ways():
    """Both stop tokens are the likeliest after everything; they end one and the same answer."""
    model = tinylm.Transformer(tinylm.ModelConfig(40, 1, 2, 2, 16, 32, 16, tie_embeddings=False))
    model.norm.weight.data[:] = numpy.eye(16)[0]
    model.embedding.weight.data[:] = numpy.eye(16)[0]
    model.head.weight.data[:] = 0
    model.head.weight.data[[1, 2], 0] = 5, 4.9
    logits = model([4, 5]).data[0, -1].astype(float)
    found = beam_search(model, [4, 5], 5, 4, [1, 2])
    assert len({ids for ids, _ in found}) == 4
    assert found[0][0] == ()
    p = numpy.exp(logits)[[1, 2]].sum() / numpy.exp(logits).sum()
    assert numpy.exp(found[0][1]) == pytest.approx(p)


def test_a_blank_that_nothing_may_fill_is_not_called_too_long(lm):
    assert fill(*lm, "a ___ cat", max_new_tokens=0) == [("", 0.0)]
