"""Nothing that could run what others wrote: no pickle, no eval, no code of a model's own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoal

MODULES = sorted(Path(shoal.__file__).parent.rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "numpy.load", "np.load"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput"}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What a module does that it should not, as it would be written."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (f"import {name.name}" for name in names if name.name.split(".")[0] in UNSAFE_MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in UNSAFE_MODULES:
                yield f"from {module} import"
            case ast.Call(func=func, keywords=keywords):
                if (name := ast.unparse(func)) in UNSAFE_CALLS | SHELLS:
                    yield f"{name}()"
                for keyword in keywords:
                    if keyword.arg in ("trust_remote_code", "shell", "allow_pickle") and not is_false(keyword.value):
                        yield f"{keyword.arg}={ast.unparse(keyword.value)}"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(Path(shoal.__file__).parent)))
def test_a_module_runs_nobody_elses_words(module: Path) -> None:
    assert list(unsafe(ast.parse(module.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from yaml import load",
        "torch.load(path)",
        "x = eval(text)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
        "AutoConfig.from_pretrained(name, trust_remote_code=trusted)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_what_is_unsafe_is_seen(line: str) -> None:
    assert list(unsafe(ast.parse(line)))
