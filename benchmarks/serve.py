"""One contestant in a process of its own: reads a task a line, answers with JSON a line.

python serve.py in_torch '{"threads": 2, "compiled": true}'
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys


def peak_memory() -> float:
    """The most that this process ever held, MB."""
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    contestant = None
    for line in sys.stdin:
        task = json.loads(line)
        try:
            if contestant is None:
                module = importlib.import_module(sys.argv[1])
                contestant = module.Contestant(**json.loads(sys.argv[2]))
            answer = getattr(contestant, task.pop("do"))(**task) or {}
            answer["memory"] = peak_memory()
        except (NotImplementedError, ImportError) as error:
            answer = {"unavailable": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
