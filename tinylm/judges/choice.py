"""The judges by name, and how each is made of the settings of `tinylm feedback`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tinylm.judges import Judge, human, verifier
from tinylm.judges.endpoint import Endpoint
from tinylm.judges.model import Model
from tinylm.judges.reward import RewardModel

MODES = ("auto", "pairwise", "rubric", "likelihood")
PAGES = ("auto", "serve", "none")
Settings = Any  # of the feedback stage: stages/feedback.py

JUDGES: dict[str, Callable[[Settings], Judge]] = {
    "verifier": lambda config: verifier.Verifier(
        verifier.load(config.verifier) if config.verifier else verifier.exact(config.confidence)
    ),
    "reward-model": lambda config: RewardModel(config.reward_model),
    "model": lambda config: Model(config.judge_model, mode_of(config, "likelihood")),
    "endpoint": lambda config: Endpoint(
        config.judge_url,
        config.judge_name,
        mode_of(config, "pairwise"),
        config.judge_concurrency,
        config.judge_timeout,
    ),
    "human": lambda config: human.Person(asker(config)),
}


def mode_of(config: Settings, usual: str) -> str:
    return usual if config.judge_mode == "auto" else config.judge_mode


def asker(config: Settings):
    """What a person is asked on."""
    if config.page == "none":
        return human.Terminal()
    if config.page == "auto" and not sys.stderr.isatty():
        return human.Nobody()
    from tinylm.page import Page

    return Page(config.host, config.port)
