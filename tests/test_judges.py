"""Judges that are models: another run directory, and an endpoint, here a real local server.

The server is well, down, slow, wrong, or talks junk, as each test wants it.
"""

import json
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import pytest
from commands import command, metrics, refused, succeeds, untrained, weights, write_rows

from tinylm import checkpoint
from tinylm.chat import Row, turn
from tinylm.errors import InputError
from tinylm.judges import Group
from tinylm.judges.endpoint import ATTEMPTS, KEY, Endpoint, letter, mark
from tinylm.judges.model import Model
from tinylm.judges.pairwise import compare, question
from tinylm.tensor import no_grad


def group(*answers, prompt="say"):
    return Group(Row("line 1", [turn("user", prompt)], {}), list(answers))


def answers_in(text):
    """The answers A and B of a question."""
    a, b = text.split("Answer A:\n")[1].split("\n\nAnswer B:\n")
    return a, b.split("\n\nWhich")[0]


# ---- two at a time -----------------------------------------------------------------------------


def longer(questions):
    pairs = map(answers_in, questions)
    return [float(len(a) - len(b)) for a, b in pairs]


def test_a_score_is_the_mean_result_against_the_others():
    (scores,), agreed = compare([group("aaa", "a", "aa", "aa")], longer)
    assert scores == pytest.approx([1, -1, 0, 0])  # the two equal ones tie with each other
    assert agreed == [True] * 3


def test_who_prefers_a_place_calls_it_a_tie():
    (scores,), agreed = compare([group("aaa", "a")], lambda questions: [1.0] * len(questions))
    assert scores == [0, 0]
    assert agreed == [False]


def test_of_verdicts_in_nats_the_preference_for_a_place_cancels():
    def biased(questions):
        return [odds + 100 for odds in longer(questions)]

    assert compare([group("aaa", "a")], biased, in_nats=True) == ([[1, -1]], [False])


def test_both_orders_are_asked_and_nothing_twice():
    asked = []

    def verdicts(questions):
        asked.extend(questions)
        return longer(questions)

    groups = [group("a", "bb", "bb"), group("a", "bb"), group("same", "same"), group("alone")]
    scores, _ = compare(groups, verdicts)
    assert asked == [question(groups[0], "a", "bb"), question(groups[0], "bb", "a")]
    assert scores[1:] == [[-1, 1], [0, 0], [None]]


def test_without_one_of_the_verdicts_there_is_no_result():
    (scores,), agreed = compare([group("aaa", "a", "")], lambda qs: [1.0, None, 1, -1, 1, -1])
    assert scores == [1, 1, -1]  # of the last answer's two duels, both were judged
    assert len(agreed) == 2


def test_a_conversation_is_shown_with_who_said_what():
    messages = [turn("user", "hi"), turn("assistant", "ho"), turn("user", "say")]
    text = question(Group(Row("line 1", messages, {}), []), "x", "")
    assert "user: hi\nassistant: ho\nuser: say" in text
    assert answers_in(text) == ("x", "")  # an empty answer is legal


# ---- a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that has learned to give short answers, each of which ends."""
    folder = tmp_path_factory.mktemp("judges") / "untrained"
    letters = (
        "say abcdefghijklmnopqrstuvwxyz. ? AB Here is a request, and two answers to it.\n:ReTW"
    )
    untrained(folder, letters, 2, 2, 2, 32, 64, 512)
    rows = [{"prompt": f"say {c}", "completion": c * n} for c in "abcdef" for n in (1, 2, 3, 4)]
    data, out = write_rows(folder / "rows.jsonl", rows), folder.with_name("base")
    succeeds("sft", folder, "--data", data, "--out", out, "--max-steps", "60",
             "--learning-rate", "1e-2", "--block-size", "64")  # fmt: skip
    return out


def test_likelihood_is_the_mean_of_the_answer_s_tokens(base):
    judge = Model(str(base), "likelihood")
    (scores,) = judge([group("abc", "", "b" * 600)])
    model, form = judge.model, judge.form
    for score, answer in zip(scores, ("abc", "")):
        asked = form.ids([turn("user", "say")], True)
        ids = form.ids([turn("user", "say"), turn("assistant", answer)])
        with no_grad():
            logits = model(numpy.array([ids])).data[0].astype("float64")
        logp = logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))
        of = [logp[i - 1, ids[i]] for i in range(len(asked), len(ids))]
        assert score == pytest.approx(numpy.mean(of), abs=1e-4)
    assert scores[2] is None  # it does not fit the context


def test_a_model_s_verdict_is_how_much_likelier_it_says_a(base):
    judge = Model(str(base), "pairwise")
    asked = question(group(), "abc", "b")
    (odds,) = judge.verdicts([asked])
    ids = judge.form.ids([turn("user", asked)], True)
    with no_grad():
        logits = judge.model(numpy.array([ids])).data[0, -1]
    assert odds == pytest.approx(float(logits[judge.a] - logits[judge.b]), abs=1e-4)
    judge([group("abc", "b", "c")])
    assert 0 <= judge.notes()["position_consistency"] <= 1
    assert judge.notes() == {}


def test_the_letters_are_those_of_a_reply(base, tmp_path):
    """Many a tokenizer puts a space before a text; not before what follows a special token."""
    model, tokenizer = checkpoint.load(base)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
    tokenizer.spec |= {"pre_tokenizer": metaspace, "decoder": metaspace}
    checkpoint.save(model, tokenizer, tmp_path)
    judge = Model(str(tmp_path), "pairwise")
    assert [judge.a, judge.b] == [tokenizer.spec["model"]["vocab"][letter] for letter in "AB"]


def test_a_model_to_which_a_and_b_are_the_same_cannot_compare(tmp_path):
    """Else all would be ties. By likelihood it can judge."""
    folder = untrained(tmp_path / "model", "no capitals, say", 1, 1, 1, 16, 32, 512)
    with pytest.raises(InputError, match="no tokens to it"):
        Model(str(folder), "pairwise")
    assert None not in Model(str(folder), "likelihood")([group("a", "b")])[0]


def test_a_model_that_cannot_judge_is_a_sentence(base, tmp_path):
    for folder, mode, said in (
        ("", "pairwise", "--judge-model DIR"),
        (base, "rubric", "likelihood"),
    ):
        with pytest.raises(InputError, match=said):
            Model(str(folder), mode)
    model, tokenizer = checkpoint.load(base)
    tokenizer.config.pop("chat_template")
    checkpoint.save(model, tokenizer, tmp_path)
    with pytest.raises(InputError, match="never fine-tuned"):
        Model(str(tmp_path), "likelihood")


def test_a_template_that_is_no_use_is_told_as_the_judge_s(base, tmp_path):
    model, tokenizer = checkpoint.load(base)
    last = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}?{% endif %}"
    tokenizer.config["chat_template"] = last
    checkpoint.save(model, tokenizer, tmp_path)
    told = f"the chat template of --judge-model {tmp_path} rewrites earlier turns"
    with pytest.raises(InputError, match=told):
        Model(str(tmp_path), "likelihood")([group("a", "b")])


# ---- an endpoint -------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Chat completions by `answer(request) -> text, status, bytes, or (status, bytes, headers as
    pairs …)`; `asked`: all requests."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.keys, self.lock = answer, [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(content)
            self.server.keys.append(self.headers.get("Authorization"))
        said = self.server.answer(content)
        if isinstance(said, str):
            said = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        status, body = (said, b"{}") if isinstance(said, int) else (200, said)
        headers = {}
        if isinstance(said, tuple):
            status, body, *more = said
            headers = dict(more)
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(answer):
    server = Server(answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def says_longer(content):
    """Well behaved: prefers the longer answer."""
    a, b = answers_in(content["messages"][0]["content"])
    return "A" if len(a) > len(b) else " b." if len(a) < len(b) else "T"


def endpoint(url, mode="pairwise", timeout=5.0):
    judge = Endpoint(url, "wise", mode, 4, timeout)
    judge.pause = 0.01
    return judge


def test_an_endpoint_compares(monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret")
    with serving(says_longer) as server:
        judge = endpoint(server.url)
        assert judge([group("aaa", "a", "aa")]) == [[1, -1, 0]]
        notes = judge.notes()
    assert notes["position_consistency"] == 1
    assert (notes["judge_asked"], notes["judge_junk"]) == (6, 0)
    request = server.asked[0]
    assert (request["model"], request["temperature"]) == ("wise", 0)
    assert set(server.keys) == {"Bearer sk-secret"}
    assert judge.notes()["judge_asked"] == 0  # since the last call


def test_an_endpoint_gives_marks():
    with serving(lambda content: "10/10" if "aaa" in str(content) else "1") as server:
        judge = endpoint(server.url, "rubric")
        assert judge([group("aaa", "b", "b"), group("")]) == [[1, -1, -1], [-1]]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "parse, reply, found",
    [
        (letter, "A", 1), (letter, "**B**.", -1), (letter, "Answer: a", 1), (letter, "tie", 0),
        (letter, "A is the better choice.", 1), (letter, "B: it is A that errs.", -1),
        (mark, "10", 1), (mark, " 1 / 10.", -1), (mark, "**7**", 1 / 3),
    ],
)  # fmt: skip
def test_replies_that_can_be_read(parse, reply, found):
    assert parse(reply) == pytest.approx(found)


@pytest.mark.parametrize(
    "parse, reply",
    [(letter, "A good question!"), (letter, ""), (letter, "A or B"), (letter, "AB"),
     (mark, "11"), (mark, "0"), (mark, "-10"), (mark, ".9"),
     (mark, "7 or 8"), (mark, "seven"), (mark, "100")],
)  # fmt: skip
def test_replies_that_cannot(parse, reply):
    with pytest.raises(ValueError, match="but the reply was"):
        parse(reply)


def test_junk_is_shown_to_whoever_said_it_once():
    """The second reply counts if it can be read; if not, there is no judgement."""

    def mends_its_ways(content):
        return "Well, it depends." if len(content["messages"]) == 1 else says_longer(content)

    with serving(mends_its_ways) as server:
        judge = endpoint(server.url)
        assert judge([group("aaa", "a")]) == [[1, -1]]
        assert judge.notes()["judge_junk"] == 0
    again = server.asked[-1]["messages"]
    assert [message["role"] for message in again] == ["user", "assistant", "user"]
    assert "Expected one letter" in again[2]["content"]
    assert "Well, it depends." in again[2]["content"]

    with serving(lambda content: "Well, it depends.") as server:
        judge = endpoint(server.url)
        assert judge([group("aaa", "a")]) == [[None, None]]
        assert judge.notes()["judge_junk"] == 2
        assert "junk" in judge.trouble
        assert len(server.asked) == 4
        judge([group("aaa", "a")])
        assert len(server.asked) == 4  # it is known to say nothing of use


def test_down_it_is_tried_again_with_pauses_and_then_given_up():
    with serving(says_longer) as server:
        url = server.url
    judge, began = endpoint(url), time.monotonic()
    assert judge([group("aaa", "a", "aa")]) == [[None, None, None]]
    assert time.monotonic() - began >= 0.01 + 0.02 + 0.04
    notes = judge.notes()
    assert notes["judge_unreachable"] == 6
    assert url in judge.trouble


def test_a_short_illness_is_survived():
    replies = iter([503, 429, "A", "B"])
    with serving(lambda content: next(replies)) as server:
        judge = Endpoint(server.url, "wise", "pairwise", 1, 5.0)
        judge.pause = 0.01
        assert judge([group("aaa", "a")]) == [[1, -1]]
    assert len(server.asked) == 4


def test_too_slow_is_as_good_as_down():
    release = threading.Event()

    def slow(content):
        release.wait(10)
        return "A"

    with serving(slow) as server:
        judge = endpoint(server.url, timeout=0.05)
        assert judge([group("aaa", "a")]) == [[None, None]]
        release.set()
    assert "Timeout" in judge.trouble
    assert len(server.asked) >= ATTEMPTS


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", b"{}", b'{"choices": []}', b"[1]", b"[" * 100_000]
)
def test_what_is_no_chat_completion_is_no_judgement(body):
    with serving(lambda content: body) as server:
        judge = endpoint(server.url)
        assert judge([group("aaa", "a")]) == [[None, None]]
    assert "not a chat completion" in judge.trouble


@pytest.mark.parametrize("charset", ["zlib", "idna", "rot13", "undefined"])
def test_json_is_read_as_such_whatever_charset_it_claims(charset):
    said = json.dumps({"choices": [{"message": {"content": "T"}}]}).encode()
    header = "Content-Type", f"application/json; charset={charset}"
    with serving(lambda content: (200, said, header)) as server:
        assert endpoint(server.url)([group("aaa", "a")]) == [[0, 0]]


@pytest.mark.parametrize("place", ["javascript:1", "http://xn--a.example/"])
def test_to_be_sent_nowhere_is_no_judgement(place):
    with serving(lambda content: (302, b"", ("Location", place))) as server:
        assert endpoint(server.url)([group("aaa", "a")]) == [[None, None]]


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_what_cannot_get_better_ends_at_once_and_keeps_the_key(status, monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret")
    with serving(lambda content: (status, b"no such key: sk-secret")) as server:
        judge = Endpoint(server.url, "wise", "pairwise", 1, 5.0)
        with pytest.raises(InputError, match=f"status {status}") as error:
            judge([group("aaa", "a")])
    assert "sk-secret" not in str(error.value)
    assert (KEY in str(error.value)) == (status == 401)


def test_half_of_a_character_is_asked_about_and_said_back():
    """A lone surrogate, as of an emoji that was cut in two, is no reason to fall over."""
    replies = iter(["\ud83d", "A", "B"])
    with serving(lambda content: next(replies)) as server:
        judge = Endpoint(server.url, "wise", "pairwise", 1, 5.0)
        assert judge([group("aaa", "a", prompt="say \ud83d")]) == [[1, -1]]


def test_a_reply_that_repeats_the_key_does_not_spread_it(monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret")
    with serving(lambda content: b"you sent: sk-secret") as server:
        judge = endpoint(server.url)
        judge([group("aaa", "a")])
    assert "you sent: …" in judge.trouble


def test_a_question_that_is_refused_is_left_out_once_others_were_answered():
    def reply(content):
        return (400, b"filtered") if "bbb" in content["messages"][0]["content"] else "A"

    with serving(reply) as server:
        judge = endpoint(server.url)
        assert None not in judge([group("aaa", "a")])[0]
        assert judge([group("bbb", "b")]) == [[None, None]]
    assert "filtered" in judge.trouble


def test_what_an_endpoint_needs_is_a_sentence(monkeypatch):
    for url, name, mode, said in (("", "x", "pairwise", "--judge-url"),
                                  ("http://host:abc/v1", "x", "pairwise", "expected http://"),
                                  ("http://x", "", "pairwise", "--judge-name"),
                                  ("ftp://x", "x", "pairwise", "http"),
                                  ("http://x", "x", "likelihood", "rubric")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            Endpoint(url, name, mode, 1, 1.0)
    monkeypatch.setenv(KEY, "sk secret\n")
    with pytest.raises(InputError, match=KEY) as error:
        Endpoint("http://x", "x", "rubric", 1, 1.0)
    assert "secret" not in str(error.value)
    monkeypatch.delenv(KEY)
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080")  # GNOME's way to say it
    with pytest.raises(InputError, match="proxy"):
        Endpoint("http://x", "x", "rubric", 1, 1.0)
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(InputError, match=r"tinylm\[judge\]"):
        Endpoint("http://x", "x", "rubric", 1, 1.0)


def test_judgements_are_kept_and_a_line_cut_short_is_asked_again(tmp_path):
    with serving(says_longer) as server:
        for expected in (2, 2, 3):
            judge = endpoint(server.url)
            with judge.attending(None, tmp_path, None):
                assert judge([group("aaa", "a")]) == [[1, -1]]
            assert len(server.asked) == expected
            path = tmp_path / "training" / "judgements.jsonl"
            if expected == 2 and len(server.asked) == 2 and judge.notes()["judge_cached"]:
                path.write_text(path.read_text()[:-20])  # as a kill would leave it
    assert len([line for line in path.read_text().splitlines() if line.endswith("}")]) == 2


# ---- a whole run -------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {c}"} for c in "abcd"])


def feedback(base, prompts, out, url, steps=4):
    return ["feedback", base, "--prompts", prompts, "--out", out, "--judge", "endpoint",
            "--judge-url", url, "--judge-name", "wise", "--answers", "3", "--batch-size", "6",
            "--max-new-tokens", "8", "--max-steps", steps, "--save-every", "1", "--seed", "1",
            "--truncated", "0", "--resume"]  # fmt: skip


def test_killed_and_run_again_it_asks_nothing_twice(base, prompts, tmp_path):
    """SIGKILL in the middle of a step; the second run learns what the first would have learned."""
    fast = threading.Event()

    def thoughtful(content):
        fast.wait(0.05)
        return says_longer(content)

    with serving(thoughtful) as server:
        out = tmp_path / "killed"
        process = subprocess.Popen(
            command(*feedback(base, prompts, out, server.url)), stderr=subprocess.DEVNULL
        )
        while len(server.asked) < 9 and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        fast.set()
        done = succeeds(*feedback(base, prompts, out, server.url), TINYLM_JUDGE_KEY="sk-secret")
        asked = [content["messages"][0]["content"] for content in server.asked]
        assert len(asked) - len(set(asked)) <= 4  # at most those that were being answered
        n = len(asked)
        whole = tmp_path / "whole"
        succeeds(*feedback(base, prompts, whole, server.url))
        assert len(server.asked) == n + len(set(asked))
    assert weights(out) == weights(whole)
    rows = [row for row in metrics(out) if "lr" in row]
    assert sum("event" not in row for row in rows) >= 3  # it learned something
    assert {"judge_asked", "judge_cached", "judge_junk", "judge_unreachable"} <= set(rows[0])
    assert not [p for p in out.rglob("*") if p.is_file() and b"sk-secret" in p.read_bytes()]
    assert "sk-secret" not in done.stderr
    assert "`wise`" in Path(out / "README.md").read_text()


def test_a_judge_that_falls_silent_ends_the_run_which_can_go_on(base, prompts, tmp_path):
    """Exit code 2 and a sentence, with what was learned saved; with the judge well, to the end."""
    well = [True]

    def answer(content):
        return says_longer(content) if well[0] or len(server.asked) < 14 else "Hm."

    out = tmp_path / "run"
    with serving(answer) as server:
        well[0] = False
        refused(*feedback(base, prompts, out, server.url, 12), saying="junk: 'Hm.'")
        assert 0 < checkpoint.Checkpoint(out).state()["step"] < 12
    with serving(says_longer) as server:
        (out / "training" / "judgements.jsonl").unlink()  # where the junk is remembered
        succeeds(*feedback(base, prompts, out, server.url, 12))
    assert sum("event" not in row for row in metrics(out) if "lr" in row) >= 6
    assert metrics(out)[-1]["event"] == "final"


def test_feedback_by_likelihood_of_another_model(base, prompts, tmp_path):
    arguments = feedback(base, prompts, tmp_path / "run", "http://unused")
    arguments[arguments.index("endpoint")] = "model"
    succeeds(*arguments, "--judge-model", base)
    assert any("reward" in row for row in metrics(tmp_path / "run"))


BARE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def test_an_answer_of_no_tokens_gets_no_likelihood(base, tmp_path):
    """Where a template writes no end of turn; wherever among the answers it stands."""
    model, tokenizer = checkpoint.load(base)
    checkpoint.save(model, tokenizer.with_special([], {"chat_template": BARE}), tmp_path)
    judge = Model(str(tmp_path), "likelihood")
    (alone,), _ = judge([group("abc"), group("b")])
    for answers in (["", "abc"], ["abc", "", "b"], ["b", "abc", ""]):
        first, second = judge([group(*answers), group("", "abc")])
        assert [score is None for score in first] == [answer == "" for answer in answers]
        assert first[answers.index("abc")] == pytest.approx(alone, abs=1e-5)
        assert second == [None, pytest.approx(alone, abs=1e-5)]
    assert judge([Group(Row("line 1", [turn("user", "s")], {}), [""])]) == [[None]]
    with pytest.raises(InputError, match="makes nothing of this conversation"):
        judge([Group(Row("line 1", [turn("user", "")], {}), ["b"])])
