"""Rules that a reader relies on: the order of imports, the size of modules, unique class names, pure policies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import finemoe
from finemoe.policy import POLICIES

ROOT = Path(__file__).parent.parent
SOURCE = Path(finemoe.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# A module imports only what stands before it. Packages stand for all of their modules.
ORDER = (
    "types", "errors", "budget", "metrics", "config", "system", "checkpoint", "jit", "store", "policy", "learned",
    "engine", "gpu", "gguf", "model", "trace", "sim", "serving", "ray", "bench", "cli", "__main__",
)  # fmt: skip
ALONE = {"types", "errors"}  # the vocabulary rests on nothing
REFERENCE_KNOWS = {"errors", "types", "config", "system"}
IMPURE = {
    "asyncio", "concurrent", "ctypes", "io", "mmap", "multiprocessing", "os", "pathlib", "psutil", "random", "secrets",
    "shutil", "socket", "subprocess", "tempfile", "threading", "time", "torch", "transformers", "urllib",
}  # fmt: skip
FAMILIES = re.compile(
    r"\b(mixtral|olmoe|qwen\w*|deepseek\w*|gpt_?oss\w*|phimoe|jamba|granite\w*|glm\w*|ernie\w*|minimax\w*|nemotron\w*"
    r"|hunyuan\w*|llama\w*|dbrx|gemma\w*|longcat\w*|jetmoe|dots\d\w*)\b",
    re.IGNORECASE,
)
LIBRARY = re.compile(r"llama\.cpp|\bllama_\w+")  # and functions of its C API
PUBLISHED = re.compile("|".join(POLICIES))  # a policy may be called after the model that it was published with


def names(path: Path) -> list[str]:
    """Dotted name of a module within finemoe, as parts; `[]` for the package itself."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, wherever it stands, `TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def relative(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_imports_only_what_stands_before_it(path: Path) -> None:
    own = names(path)
    if not own:
        return  # the package itself offers what stands last
    rank = ORDER.index(own[0])
    for line, name in imports(path):
        root, _, rest = name.partition(".")
        if root != "finemoe":
            continue
        imported = rest.partition(".")[0]
        if imported == "__version__":
            assert own[0] in {"serving", "bench", "cli"}, f"{relative(path)}:{line}: {name}"
            continue
        if imported == own[0] and len(own) + (path.name == "__init__.py") > 1:
            continue  # within a package
        assert imported in ORDER[:rank], f"{relative(path)}:{line} imports {name}, which stands after {own[0]}"
        assert own[0] not in ALONE, f"{relative(path)}:{line} imports {name}"
        assert own[:2] != ["model", "reference"] or imported in REFERENCE_KNOWS, (
            f"{relative(path)}:{line} imports {name}"
        )


def test_every_module_has_its_place_in_the_order() -> None:
    assert {own[0] for own in map(names, MODULES) if own} <= set(ORDER)


@pytest.mark.parametrize("path", [p for p in MODULES if names(p)[:1] == ["policy"]], ids=relative)
def test_the_policy_is_pure(path: Path) -> None:
    for line, name in imports(path):
        assert name.partition(".")[0] not in IMPURE, f"{relative(path)}:{line} imports {name}"
        assert not name.startswith("numpy.random"), f"{relative(path)}:{line} imports {name}"
    called = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    assert not called & {"open", "print", "input", "exec", "eval", "__import__"}
    assert "np.random" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


SHARED_CLASS_NAMES: dict[str, str] = {}  # name -> why two packages use it


def test_a_class_name_belongs_to_one_package() -> None:
    owners: dict[str, set[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners.setdefault(node.name, set()).add(names(path)[0] if names(path) else "finemoe")
    shared = {name for name, packages in owners.items() if len(packages) > 1}
    assert shared == set(SHARED_CLASS_NAMES)


def test_no_name_is_assigned_twice_at_the_top_of_a_module() -> None:
    for path in MODULES:
        assigned: set[str] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            new = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            new += [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
            assert not assigned & {*new}, f"{relative(path)}:{node.lineno}: {assigned & {*new}}"
            assigned |= {*new}


def test_there_is_no_module_for_leftovers() -> None:
    assert not [relative(p) for p in MODULES if p.stem in {"utils", "util", "helpers", "misc", "common"}]


NAMES_FAMILIES = (
    ["model", "reference"],
    ["bench"],
    ["sim", "hardware"],
)  # as data: what to build, compare with, or model


@pytest.mark.parametrize(
    "path", [p for p in MODULES if not any(names(p)[: len(n)] == n for n in NAMES_FAMILIES)], ids=relative
)
def test_no_code_branches_on_a_model_family(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            text = LIBRARY.sub("", PUBLISHED.sub("", node.value))
            assert not FAMILIES.search(text), f"{relative(path)}:{node.lineno} names a family: {node.value!r}"
        if isinstance(node, ast.Name | ast.Attribute):
            word = node.id if isinstance(node, ast.Name) else node.attr
            assert not FAMILIES.search(LIBRARY.sub("", word)), f"{relative(path)}:{node.lineno} names a family: {word}"


def test_importing_the_package_does_not_import_torch() -> None:
    check = "import finemoe, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_constraints_pin_every_dependency_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    assert all(re.fullmatch(r"[\w.]+", pinned) for pinned in pins.values()), (
        "exact versions of any build, and nothing else"
    )
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {re.split(r"[\s<>=!~\[;]", requirement)[0] for group in groups for requirement in group}
    assert {name.lower().replace("_", "-") for name in wanted} <= {name.lower().replace("_", "-") for name in pins}
