"""The rules that keep the house in order: who may import whom, and what must be there."""

import ast
import importlib
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from commands import python

import tinylm
from tinylm import _bpe, backend
from tinylm.kernels import _cpu

PACKAGE = Path(tinylm.__file__).parent
ROOT = Path(__file__).parent.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = {"torch", "tensorflow", "jax", "transformers", "tokenizers", "mlx", "keras"}

# the floors: a module may import from its own floor's list only
ALLOWED = {
    "errors": set(),
    "tensor": set(),
    "config": {"errors"},
    "backend": {"kernels"},
    "ops": {"backend", "tensor"},
    "nn": {"backend", "ops", "tensor"},
    "optim": {"backend", "tensor"},
    "model": {"backend", "config", "errors", "nn", "ops", "tensor"},
    "data": {"errors"},
    "files": {"errors"},
    "corpus": {"data", "errors", "files", "tokenizer"},
    "chat": {"errors", "files", "tokenizer"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_of_tinylm(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("tinylm.")} & {
        p.stem if p.stem != "__init__" else p.parent.name for p in MODULES
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_a_module_must_not_import(path):
    names = imported(path)
    roots = {name.split(".")[0] for name in names}
    assert not roots & FRAMEWORKS
    assert not roots & {"tests", "pickle", "urllib", "requests", "socket"}
    if path.name != "cuda.py":
        assert "cupy" not in roots
    if path.name != "endpoint.py":  # the only one that calls another machine, and when asked to
        assert "httpx" not in roots
    if path.stem in ALLOWED and path.parent == PACKAGE:
        assert parts_of_tinylm(path) <= ALLOWED[path.stem]
    if path.parent.name == "kernels":
        assert not {n for n in names if n.startswith("tinylm") and "kernels" not in n}
    if path.parent.name == "judges":
        # a judge may be a model, or a person for whom answers are written and stored
        models = {"backend", "checkpoint", "evaluate", "generate", "model", "store", "tensor"}
        page = {"page"} if path.stem == "choice" else set()
        assert parts_of_tinylm(path) <= {"chat", "data", "errors", "judges"} | models | page
    if path.parent.name == "stages":
        assert not {n for n in names if n.startswith("tinylm.stages.")}


def test_only_the_bindings_know_python():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu"}]
    assert len(sources) > 5
    knowing = {p.name for p in sources if "pybind11/" in p.read_text()}
    assert knowing == {"bindings.cpp"}


def test_ops_hold_no_numpy():
    assert not {"numpy", "cupy"} & {n.split(".")[0] for n in imported(PACKAGE / "ops.py")}


def test_the_compiled_extensions_are_here_and_in_use():
    """Without them every speed that we promise is gone: this fails, and never skips."""
    assert backend.name == "cpu"
    assert _cpu.isa() in {"baseline", "avx2", "avx512", "avx512bf16", "amx"}
    assert _bpe.__file__.endswith((".so", ".pyd"))


def test_imports_go_down_only():
    """A circle of imports is two files that can only be understood together."""
    known = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES}
    floors = TopologicalSorter()
    for path in MODULES:
        if path.parent != PACKAGE or path.stem != "__init__":  # it gathers what there is
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            named = {each for each in imported(path) if each.startswith("tinylm.")}
            floors.add(name, *(each for each in named if each in known))
    floors.prepare()  # raises CycleError


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]), ids=lambda p: p.name
)
def test_what_is_run_once_in_months_asks_for_names_that_are_there(path):
    for name in (name for name in imported(path) if name.startswith("tinylm.")):
        module, _, what = name.rpartition(".")
        if not hasattr(importlib.import_module(module), what):
            importlib.import_module(name)


def test_the_three_stages_in_one_file_learn(capsys):
    path = ROOT / "docs" / "minimal.py"
    whole, size, steps = path.read_text(), "T, C, H, L = 128, 96, 4, 2", "STEPS = 1600, 100, 40"
    assert whole.count(size) == whole.count(steps) == 1
    few = whole.replace(size, "T, C, H, L = 128, 32, 4, 1").replace(steps, "STEPS = 80, 40, 4")
    names = {"__name__": "__main__", "__file__": str(path)}
    exec(compile(few, path, "exec"), names)
    told = capsys.readouterr().out
    for stage, share in (("pre-training", 0.75), ("fine-tuning", 0.95)):
        first, *_, last = re.findall(rf"{stage}, loss of an? \w+ +([\d.]+)", told)
        assert float(last) < share * float(first)
    assert len(re.findall(r"feedback, share right +[\d.]+", told)) == 4
    assert len(re.findall(r"\d+% right, \d+% in whole sentences", told)) == 3

    def losses():
        return names["losses_of"]([names["question"]("Chad")] * 2, said[:2]).data.sum(1)

    said = ["yes.\n", "no.\n"] * 32  # what is right becomes likelier, and what is wrong less so
    names |= {"answers_to": lambda questions: said, "right_answers": lambda name: said[:1]}
    before = losses()
    names["train"]("feedback", 20, 1e-3, names["feedback"])
    (right, wrong), (right_before, wrong_before) = losses(), before
    assert right < right_before - 1 and wrong > wrong_before + 1


def test_the_installed_package_is_what_is_tested():
    assert ROOT not in PACKAGE.parents


def test_importing_needs_no_network_and_writes_nothing(tmp_path):
    program = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import tinylm, tinylm.cli\n"
    )
    python(program, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_the_compiled_kernels_it_still_works_and_says_so(tmp_path):
    """A machine without a compiler gets the reference kernels and a notice."""
    program = (
        "import sys\n"
        "sys.modules['tinylm.kernels._cpu'] = None\n"
        "sys.modules['tinylm._bpe'] = None\n"
        "import numpy, tinylm\n"
        "from tinylm.tokenizer import train_bpe\n"
        "ids = train_bpe(['the cat and the cat'], 270).encode('the cat')\n"
        "model = tinylm.Transformer(tinylm.ModelConfig(270, 1, 2, 2, 16, 32, 8))\n"
        "model.loss(ids[:-1], ids[1:]).mean().backward()\n"
        "print(tinylm.backend.name)\n"
    )
    done = python(program, cwd=tmp_path)
    assert done.stdout.strip() == "reference"
    assert "not compiled" in done.stderr


def test_the_readme_s_test_command_is_the_one_that_ci_runs():
    """The last line of the README's first block of commands, word for word."""
    commands = (ROOT / "README.md").read_text().split("```")[1].strip().splitlines()
    assert commands[-1].endswith("&& pytest -n auto")
    assert commands[-1] in (ROOT / ".ci" / "run").read_text()
