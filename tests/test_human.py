"""A person judges: what is asked, what is stored, and that a run which is killed loses nothing."""

import signal
import subprocess
import time
from contextlib import suppress

import numpy
import pytest
from commands import command, metrics, refused, tinylm, weights
from persons import REPLIES, arguments, judge, judgements, log_probabilities

from tinylm.errors import InputError, Waiting
from tinylm.judges import human
from tinylm.judges.human import Nobody, Person, marks
from tinylm.progress import Progress
from tinylm.settings import Plan
from tinylm.stages import feedback
from tinylm.store import Store, place_in


@pytest.fixture(scope="module")
def whole(assistant, tmp_path_factory):
    """A run that nothing interrupted: (directory, what it said)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = judge(assistant, out, REPLIES)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def test_a_run_in_the_terminal(whole):
    """Three rounds of three prompts; from the second on, a comparison, of which the log tells."""
    out, said = whole
    assert "Round 1 of 3, 1 of 2" in said  # one prompt left no choice
    assert "Round 3 of 3, 4 of 4" in said
    assert "won" in said
    last = [row for row in metrics(out) if "lr" in row][-1]
    assert last["win_n"] == 2
    assert 0 <= last["win_low"] <= last["win_rate"] <= last["win_high"] <= 1
    final = [row for row in metrics(out) if row.get("event") == "final"][-1]
    assert final["win_n"] == 2
    assert "held_out_reward" not in final


def test_the_store_holds_what_an_update_needs(whole):
    store = Store(place_in(whole[0]))
    items = store.items()
    assert [item.kind for item in items] == ["train"] * 3 + (["train"] * 3 + ["compare"]) * 2
    said = store.judgements()
    assert [j.comment for j in said if j.comment] == ["too long"]
    for item in items[:3]:
        logp = log_probabilities(store, item.id)
        assert [len(x) for x in logp] == [len(x) for x in item.ids]
        assert all(numpy.float32(x) == x and x < 0 for row in logp for x in row)
    picked = said[0]
    assert picked.scores[picked.shown[0]] == 1.0
    assert sum(score or 0 for score in picked.scores) == 1.0


def test_what_is_preferred_becomes_likelier(whole, assistant):
    assert weights(whole[0]) != weights(assistant / "sft")


def test_without_anyone_there_it_waits_and_goes_on(whole, assistant, tmp_path):
    """75 and a sentence; the items are stored; then it goes on to the same bits."""
    out = tmp_path / "run"
    done = tinylm(*arguments(assistant, out))
    assert done.returncode == 75
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    store = Store(place_in(out))
    assert [item.place for item in store.items(kind="train")] == [0, 1, 2]
    assert not store.judgements()
    store.close()
    for part, code in ((REPLIES[:3], 75), (REPLIES[3:6], 75), (REPLIES[6:], 0)):
        assert judge(assistant, out, part, "--resume").returncode == code
    assert weights(out) == weights(whole[0])
    assert told(out) == told(whole[0])


@pytest.mark.parametrize("after", [1, 4, 6])
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(whole, assistant, tmp_path, after):
    out = tmp_path / "run"
    running = subprocess.Popen(
        command(*arguments(assistant, out, "--page", "none", "--save-every", "2")),
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    running.stdin.write("".join(line + "\n" for line in REPLIES[:after]))
    running.stdin.flush()
    wait_for(lambda: place_in(out).exists() and judgements(out) == after)
    running.kill()
    running.wait()
    assert judgements(out) == after
    done = judge(assistant, out, REPLIES[after:], "--resume")
    assert done.returncode == 0, done.stderr
    assert weights(out) == weights(whole[0])
    assert judgements(out) == judgements(whole[0])
    assert told(out) == told(whole[0])


def told(out) -> list:
    """What the log says of the rounds."""
    names = ("step", "kl", "win_rate", "win_n")
    return [[row.get(name) for name in names] for row in metrics(out) if "lr" in row]


def wait_for(ready, seconds=60):
    for _ in range(int(20 * seconds)):
        with suppress(InputError):  # the store is being made
            if ready():
                return
        time.sleep(0.05)
    raise AssertionError("it took too long")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_it_waits(assistant, tmp_path, number):
    running = subprocess.Popen(
        command(*arguments(assistant, tmp_path / "run", "--page", "none")),
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = ""
    while "undo" not in said:
        said += running.stderr.readline()
    time.sleep(0.2)
    running.send_signal(number)
    _, rest = running.communicate(timeout=60)
    assert running.returncode == 75
    assert "waits for a person's judgement" in rest


def test_undo_takes_the_last_one_back(whole, assistant, tmp_path):
    out = tmp_path / "run"
    slips = ["u", "2", "u", *REPLIES[:6], "1", "u", "u", *REPLIES[5:]]
    done = judge(assistant, out, slips)
    assert done.returncode == 0, done.stderr
    assert weights(out) == weights(whole[0])
    assert judgements(out) == judgements(whole[0])


def test_nonsense_is_asked_again(assistant, tmp_path):
    done = judge(assistant, tmp_path / "run", ["", "9", "0", "what", "-1", "1" * 5000, "1"])
    assert done.returncode == 75
    assert judgements(tmp_path / "run") == 1


class Recorder(Nobody):
    """Remembers what it was told to show, and judges nothing."""

    def __init__(self):
        self.states = []

    def show(self, state):
        self.states.append(state)


def test_answers_are_shown_while_they_are_written(assistant, tmp_path, monkeypatch):
    """In the order in which they are judged afterwards, so that nothing jumps."""
    recorder, out = Recorder(), tmp_path / "run"
    monkeypatch.setitem(feedback.JUDGES, "human", lambda config: Person(recorder))
    monkeypatch.setattr(human, "FRAME", 0.0)
    settings = {"judge": "human", "answers": 4, "batch_size": 4, "max_new_tokens": 90}
    config = feedback.FeedbackConfig(**settings)
    plan = Plan(out, config, Progress(), given={*settings})
    with pytest.raises(Waiting):
        feedback.run(assistant / "sft", assistant / "prompts", plan)
    states = recorder.states
    assert [state["phase"] for state in states[-2:]] == ["asking", "stopped"]
    written = [state["answers"] for state in states[:-2]]
    assert len(written) > 50
    for before, after in zip(written, written[1:]):
        assert all(len(a) <= len(b) + 1 for a, b in zip(before, after))
    asked = states[-2]["answers"]
    assert len(asked) > 1
    places = [written[-1].index(text) for text in asked]
    assert places == sorted(places)


def test_asked_to_stop_while_answers_are_written_it_does_not_wait(assistant, tmp_path, monkeypatch):
    """A SIGTERM comes once: nobody may be there to send another one."""

    class Stopped(Nobody):
        sent = False

        def show(self, state):
            if state["phase"] == "writing" and not self.sent:
                self.sent = True
                signal.raise_signal(signal.SIGTERM)

        def ask(self):
            raise AssertionError("it waits")

    monkeypatch.setitem(feedback.JUDGES, "human", lambda config: Person(Stopped()))
    plan = Plan(tmp_path / "run", feedback.FeedbackConfig(judge="human"), Progress())
    with pytest.raises(Waiting, match="waits for a person's judgement"):
        feedback.run(assistant / "sft", assistant / "prompts", plan)


def test_marks():
    texts = ["a", "b", "a", "cut off"]
    assert marks(texts, [1, 0], 1) == [1.0, 0.0, 1.0, None]  # the second one shown, and its equal
    assert marks(texts, [1, 0], "tie") == [0.5, 0.5, 0.5, None]
    assert marks(texts, [1, 0], "skip") == [None] * 4


def test_more_answers_than_a_person_can_compare(assistant, tmp_path):
    more = ["--answers", "6", "--batch-size", "12"]
    refused(*arguments(assistant, tmp_path / "run"), *more, saying="up to 4")
