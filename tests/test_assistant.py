"""sft, feedback and chat as commands: what they make, what they refuse, what they survive."""

import json
import os
import subprocess

import pytest
from commands import (
    SMALL,
    command,
    kill_at_random,
    metrics,
    refused,
    succeeds,
    weights,
    write_rows,
)

from tinylm import checkpoint
from tinylm.checkpoint import Checkpoint

ANIMALS = ["cat", "dog", "bird", "fish", "fox", "hen", "cow", "pig", "bee", "ant", "owl", "frog"]


def says(animal):
    return f"The {animal} says {animal[::-1]}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("assistant")


@pytest.fixture(scope="module")
def base(folder, text_file):
    small = [*SMALL, "--max-steps", 3, "--block-size", 64]
    succeeds("pretrain", text_file, "--out", folder / "base", *small)
    return folder / "base"


@pytest.fixture(scope="module")
def conversations(folder):
    rows = [{"prompt": f"What does the {a} say?", "completion": says(a)} for a in ANIMALS * 3]
    return write_rows(folder / "conversations.jsonl", rows)


@pytest.fixture(scope="module")
def prompts(folder):
    rows = [{"prompt": f"What does the {a} say?", "accepted": [says(a)]} for a in ANIMALS]
    return write_rows(folder / "prompts.jsonl", rows)


SFT = ["--max-steps", "120", "--learning-rate", "0.01", "--batch-size", "4", "--held-out", "0.1"]
FEEDBACK = ["--max-steps", "12", "--answers", "4", "--batch-size", "8", "--max-new-tokens", "24"]


@pytest.fixture(scope="module")
def assistant(base, conversations, folder):
    done = succeeds("sft", base, "--data", conversations, "--out", folder / "sft", *SFT, "--json")
    return folder / "sft", json.loads(done.stdout)


@pytest.fixture(scope="module")
def improved(assistant, prompts, folder):
    out = folder / "feedback"
    done = succeeds(
        "feedback", assistant[0], "--prompts", prompts, "--judge", "verifier", "--out", out,
        *FEEDBACK, "--json",
    )  # fmt: skip
    return out, json.loads(done.stdout)


# ---- what they make ----------------------------------------------------------------------------


def test_sft_teaches_to_answer(assistant):
    out, result = assistant
    assert result["loss"] < 0.7
    assert result["steps"] == 120
    done = succeeds("chat", out, "--temperature", "0", "--json")
    assert json.loads(done.stdout) == {"messages": []}


def test_chat_without_a_terminal_answers_line_by_line(assistant):
    said = "What does the cat say?\nWhat does the owl say?\n"
    flags = ["--temperature", "0", "--json", "--system", "Be kind."]
    done = succeeds("chat", assistant[0], *flags, said=said)
    roles = [message["role"] for message in json.loads(done.stdout)["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_a_byte_that_is_no_text_is_no_reason_to_stop(assistant):
    """Nor one that cannot be shown."""
    strict, said = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, b"the \xff cat\n"
    for name, *prompt in (["chat"], ["generate", said]):
        whole = [*command(name, assistant[0], "--max-new-tokens", 1, "--seed", 0), *prompt]
        done = subprocess.run(whole, input=said, capture_output=True, env=strict, check=False)
        assert done.returncode == 0, done.stderr


def test_chat_with_a_base_model_says_what_it_is(base):
    done = succeeds("chat", base, "--max-new-tokens", "5", said="the cat\n")
    assert "never taught to answer" in done.stderr
    assert done.stdout.strip()


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(assistant):
    lines = "".join(f"What does the {a} say?\n" for a in ANIMALS)
    done = succeeds("chat", assistant[0], "--max-new-tokens", "10", said=lines)
    assert "no longer fit the context" in done.stderr


def test_chat_refuses_what_does_not_fit_the_context(assistant):
    """What was said before it is not lost."""
    said = "What does the cat say?\n" + "why " * 100 + "\n"
    done = refused("chat", assistant[0], "--json", said=said, saying="too many for a context of 64")
    assert [m["role"] for m in json.loads(done.stdout)["messages"]] == ["user", "assistant"]


def test_transformers_chats_with_what_sft_made(assistant):
    transformers = pytest.importorskip("transformers")
    out, _ = assistant
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    form = transformers.AutoTokenizer.from_pretrained(out)
    asked = [{"role": "user", "content": "What does the cat say?"}]
    ids = form.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"]
    made = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    from tinylm.generate import answers

    (ours,) = answers(*checkpoint.load(out), [asked], max_new_tokens=20)
    assert form.decode(made, skip_special_tokens=True).strip() == ours


def test_feedback_leaves_a_whole_directory_and_its_numbers(improved):
    out, result = improved
    assert result["steps"] == 12
    rows = [row for row in metrics(out) if "lr" in row]
    assert {"reward", "kl", "truncated", "equal_groups", "answer_tokens"} <= set(rows[0])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    _, tokenizer = checkpoint.load(out)
    assert tokenizer.config["chat_template"]
    assert "rloo" in (out / "README.md").read_text()


def test_a_verifier_of_one_s_own_judges(assistant, prompts, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(prompt, answer, row):\n    return -float(len(answer))\n"
    )
    succeeds(
        "feedback", assistant[0], "--prompts", prompts, "--out", tmp_path / "r", *FEEDBACK,
        "--verifier", f"{tmp_path}/mine.py:short", "--max-steps", 2,
    )  # fmt: skip
    assert metrics(tmp_path / "r")[0]["reward"] < -1


def test_fill_of_a_model_that_never_filled_a_blank_says_so(base):
    done = succeeds("fill", base, "the cat saw a ___ bird.")
    assert "the objective next" in done.stderr
    assert "--objective missing or mixed" in done.stderr


def test_show_mask_colours_what_is_learned(base, conversations):
    done = succeeds(
        "sft", base, "--data", conversations, "--show-mask", 2, FORCE_COLOR="1", COLUMNS="200"
    )
    assert done.stdout.count("\x1b[1;32m") == 2
    assert "\x1b[1;32mThe cat says tac.<|end|>\x1b[0m" in done.stdout
    told = succeeds("sft", base, "--data", conversations, "--show-mask", 2, "--json").stdout
    assert ["The cat says tac.<|end|>", True] in json.loads(told)["examples"][0]


# ---- what they survive -------------------------------------------------------------------------


@pytest.fixture(params=["sft", "feedback"])
def stage(request, base, conversations, prompts, assistant, improved):
    """(a finished run, the arguments that make it)"""
    if request.param == "sft":
        return assistant[0], ["sft", base, "--data", conversations, *SFT]
    arguments = ["feedback", assistant[0], "--prompts", prompts, *FEEDBACK]
    return improved[0], arguments


def test_killed_at_random_moments_it_ends_with_the_same_bits(stage, tmp_path):
    finished, arguments = stage
    out = tmp_path / "run"
    arguments = [*arguments, "--out", out, "--save-every", "1", "--resume"]
    assert kill_at_random(4, out, *arguments) >= 2
    succeeds(*arguments)
    assert weights(out) == weights(finished)


def test_resume_on_a_finished_run_is_done(stage):
    finished, arguments = stage
    done = succeeds(*arguments, "--out", finished, "--resume")
    assert "finished" in done.stderr


def test_other_data_on_resume_is_refused(stage, tmp_path):
    finished, arguments = stage
    at = arguments.index("--data" if "--data" in arguments else "--prompts") + 1
    other = tmp_path / "other.jsonl"
    other.write_text(arguments[at].read_text() * 2)
    state = Checkpoint(finished).state()
    arguments = [*arguments[:at], other, *arguments[at + 1 :]]
    more = ["--out", finished, "--resume", "--max-steps", state["step"] + 1]
    refused(*arguments, *more, saying="other")


# ---- what they refuse --------------------------------------------------------------------------


def test_rows_that_cannot_be_learned_are_reported_by_line(base, tmp_path):
    good = {"prompt": "the cat", "completion": "saw"}
    long = {"prompt": "the cat", "completion": "saw " * 100}
    data = write_rows(tmp_path / "rows.jsonl", [good, long, good, long])
    done = succeeds("sft", base, "--data", data, "--out", tmp_path / "r", "--max-steps", 1)
    told = " ".join(done.stderr.split())
    assert "2 rows do not fit the context of 64 tokens and are left out: line 2, 4" in told
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([good, long, good, long]))
    done = succeeds("sft", base, "--data", data, "--show-mask", 1)
    assert "and are left out: row 2, 4" in " ".join(done.stderr.split())
    data = write_rows(tmp_path / "long.jsonl", [long])
    refused("sft", base, "--data", data, "--out", tmp_path / "q", saying="no conversation fits")


def test_what_sft_cannot_use(base, conversations, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n')
    start = ["sft", base, "--out", tmp_path / "r"]
    refused(*start, "--data", bad, saying="bad.jsonl, line 2: not valid JSON")
    refused(*start, "--data", tmp_path / "none", saying="no such file")
    refused(*start, "--data", conversations, "--block-size", 4096, saying="--block-size 4096")
    refused(*start, "--data", conversations, "--epochs", 0, saying="--epochs")
    refused("sft", base, "--data", conversations, saying="--out DIR")
    bare = tmp_path / "bare"
    checkpoint.save(*checkpoint.load(base), bare)
    (bare / "tokenizer.json").unlink()
    refused("sft", bare, *start[2:], "--data", conversations, saying="tokenizer.json")


def test_what_feedback_cannot_use(assistant, prompts, tmp_path):
    start = ["feedback", assistant[0], "--out", tmp_path / "r"]
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "why " * 80, "accepted": []}])
    refused(*start, "--prompts", long, saying="long.jsonl, line 1: the prompt has")
    said = [("user", "why? why?"), ("assistant", "because"), ("user", "what does the cat say?")]
    talk = {"messages": [{"role": role, "content": text} for role, text in said], "accepted": []}
    talk = write_rows(tmp_path / "talk.jsonl", [talk])
    remedy = "in a context of 64: leave out its first turns, or lower --max-new-tokens"
    refused(*start, "--prompts", talk, saying=remedy)
    refused(*start, "--prompts", prompts, "--answers", 1, saying="--answers 1")
    refused(*start, "--prompts", prompts, "--batch-size", 9, saying="--batch-size 9")
    refused(*start, "--prompts", prompts, "--verifier", "none", saying="file.py:function")
    twice = ["--updates", 2, "--accumulate", 2]
    refused(*start, "--prompts", prompts, *twice, saying="the same answers would be added up")
    forgotten = ["--reward-model", assistant[0]]
    refused(*start, "--prompts", prompts, *forgotten, saying="add --judge reward-model")
    bare = [{"prompt": "Hi?", "accepted": ["Hi."]}] * 40 + [{"prompt": "Hi?"}]
    bare = write_rows(tmp_path / "bare.jsonl", bare)
    refused(*start, "--prompts", bare, "--max-new-tokens", 20, saying="asked about line 41")
    refused(*start, "--prompts", prompts, "--port", 70000, saying="--port: expected 0 to 65535")
    ends = tmp_path / "ends.py"
    ends.write_text("import sys\nsys.exit()\n")
    verifier = ["--verifier", f"{ends}:f", "--max-new-tokens", 20]
    refused(*start, "--prompts", prompts, *verifier, saying="cannot be loaded (SystemExit")
    judge = ["--judge", "model", "--judge-model", assistant[0], "--judge-mode", "pairwise"]
    judge += ["--max-new-tokens", 20, "--out", tmp_path / "judged"]
    assert not (tmp_path / "r").exists()
    refused(*start, "--prompts", prompts, *judge, saying="too long for the context of --judge-m")
    (tmp_path / "bad.py").write_text("def f(prompt, answer, row):\n    return 'fine'\n")
    verifier = ["--verifier", f"{tmp_path}/bad.py:f", "--max-new-tokens", 20]
    refused(*start, "--prompts", prompts, *verifier, saying="gave 'fine': expected a number")


def test_what_to_try_next_can_be_pasted(base, conversations, tmp_path):
    out = tmp_path / "my run"
    done = succeeds("sft", base, "--data", conversations, "--out", out, "--max-steps", 1)
    assert f"{out}: try  tinylm chat '{out}'" in " ".join(done.stderr.splitlines())


def test_who_names_minutes_does_not_want_the_steps_of_the_default(assistant, prompts, tmp_path):
    out = tmp_path / "r"
    minutes = [*FEEDBACK[2:], "--minutes", "0.01"]
    succeeds("feedback", assistant[0], "--prompts", prompts, "--out", out, *minutes)
    config = Checkpoint(out).state()["config"]
    assert (config["max_steps"], config["minutes"]) == (0, 0.01)


def test_feedback_on_a_base_model_warns_why_it_will_not_work(base, prompts, tmp_path):
    done = succeeds(
        "feedback", base, "--prompts", prompts, "--out", tmp_path / "r", *FEEDBACK,
        "--max-steps", 1,
    )  # fmt: skip
    assert "never fine-tuned" in done.stderr
    assert "all its answers score alike" in " ".join(done.stderr.split())
