"""All three stages in one command, on a small part of the almanac so that it takes seconds."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from commands import weights

from tinylm import checkpoint, cli, quickstart
from tinylm.almanac import Almanac
from tinylm.model import ModelConfig, Transformer
from tinylm.stages import feedback, pretrain, sft

README = (Path(__file__).parent.parent / "README.md").read_text()
STEPS = {"eval_every": 100, "save_every": 100}


@pytest.fixture
def small(monkeypatch):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 512, "block_size": 384}
    monkeypatch.setattr(quickstart, "KINDS", ("state",))
    monkeypatch.setattr(quickstart, "PASSES", 4)
    monkeypatch.setattr(
        quickstart, "PRETRAIN", {**shape, "batch_size": 2, "max_steps": 20, **STEPS}
    )
    monkeypatch.setattr(quickstart, "SFT", {"max_steps": 10, **STEPS})
    feedback = {"answers": 2, "batch_size": 4, "max_new_tokens": 8, "max_steps": 3, **STEPS}
    monkeypatch.setattr(quickstart, "FEEDBACK", feedback)


def test_the_readme_s_commands_do_what_quickstart_does(monkeypatch):
    """Their flags make the settings that quickstart makes, so that the models are the same."""
    commands = README.split("```\nA=runs/quickstart/almanac\n")[1].split("```")[0]
    plans = {}
    for stage in (pretrain, sft, feedback):
        keep = lambda *inputs: plans.update({inputs[-1].out.name: inputs[-1].config})
        monkeypatch.setattr(stage, "run", keep)
    for line in commands.replace("\\\n", "").splitlines()[:3]:
        assert cli.run(line.split()[1:]) == 0
    expected = {
        "base": pretrain.PretrainConfig(**quickstart.PRETRAIN),
        "sft": sft.SFTConfig(**quickstart.SFT),
        "feedback": feedback.FeedbackConfig(**quickstart.FEEDBACK),
    }
    for plan in (*plans.values(), *expected.values()):
        plan.eval_every = plan.save_every = 0  # change no model
    assert plans == expected


def test_the_readme_s_numbers_are_those_of_quickstart():
    world = Almanac(0, quickstart.KINDS, quickstart.FACTS)
    assert f"an almanac of {sum(e.part != 'withheld' for e in world.entities)} things" in README
    for part, questions in world.questions().items():
        assert f"| {quickstart.PARTS[part]} | {len(questions)} |" in README
    shape = {field.name for field in dataclasses.fields(ModelConfig)} & {*quickstart.PRETRAIN}
    model = Transformer(ModelConfig(**{name: quickstart.PRETRAIN[name] for name in shape}))
    assert f"{model.n_parameters():,} parameters" in README


def test_quickstart_compares_the_stages_and_goes_on_where_it_stopped(small, tmp_path, capsys):
    out = tmp_path / "a q"
    assert cli.run(["quickstart", "--out", str(out), "--json"]) == 0
    told = capsys.readouterr()
    results = json.loads(told.out)
    assert results["seconds"] > 0
    assert list(results["stages"]) == ["base", "sft", "feedback"]
    for name, stage in results["stages"].items():
        assert stage["directory"] == str(out / name)
        model, _ = checkpoint.load(stage["directory"])
        assert model.n_parameters() > 1000
        for part in ("known", "reworded", "withheld", "invented"):
            found = stage[part]
            assert found["n"] > 10
            assert found["right"] + found["wrong"] + found["idk"] == pytest.approx(1, abs=1e-3)
    assert "The same questions asked of each stage" in told.err
    assert f"tinylm chat '{out}/sft'\n" in told.err  # to be copied into a shell
    assert json.loads((out / "results.json").read_text()) == results
    card = (out / "report.html").read_text()
    assert "things that do not exist" in card
    assert all(row["question"] in card for row in results["asked"])

    before = weights(out / "feedback")
    shutil.rmtree(out / "feedback")  # as if it had been killed there
    assert cli.run(["quickstart", "--out", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["stages"] == results["stages"]
    assert weights(out / "feedback") == before
    assert cli.run(["quickstart", "--out", str(out), "--seed", "1"]) == 2  # that is another world
    assert "--seed 1 differs" in capsys.readouterr().err
    assert weights(out / "feedback") == before
