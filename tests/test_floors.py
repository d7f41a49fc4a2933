"""The house's laws: imports run downwards, no loops, small files, small functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["kernels parallel", "moe", "models", "infer", "serve train", "benchmarks"]  # ground floor first
FOLDERS = " ".join(FLOORS).split()
FILES = [p for folder in FOLDERS for p in sorted((ROOT / folder).glob("*.py"))]


def _imports(file: Path) -> list[ast.ImportFrom]:
    return [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.level]


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=FLOORS)
def test_imports_run_downwards(floor: int) -> None:
    below = set(" ".join(FLOORS[:floor]).split())
    for folder in FLOORS[floor].split():
        for file in (ROOT / folder).rglob("*.py"):
            for node in _imports(file):
                if node.level >= 2:
                    target = (node.module or node.names[0].name).split(".")[0]
                    assert node.level == 2, f"{file.relative_to(ROOT)}: folders are flat"
                    allowed = target in below or target == "__version__"
                    assert allowed, f"{file.relative_to(ROOT)} imports {target}, which is not below it"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_two_files_import_each_other(folder: str) -> None:
    graph = {
        file.stem: {(n.module or n.names[0].name).split(".")[0] for n in _imports(file) if n.level == 1}
        for file in (ROOT / folder).glob("*.py")
    }

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"{folder}: import loop {' -> '.join((*path, name))}"
        for target in graph.get(name, ()):
            walk(target, (*path, name))

    for name in graph:
        walk(name, ())


def test_no_absolute_imports_of_the_package() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(n.split(".")[0] == "coterie" for n in names), f"{file.name}: use relative imports"


@pytest.mark.parametrize("file", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_files_and_functions_are_small(file: Path) -> None:
    text = file.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "every file begins with a docstring"
    assert text.count("\n") <= 330, "a file of over 330 lines holds two things: find them"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            lines = node.end_lineno - node.lineno + 1
            kernel = any("jit" in ast.dump(d) for d in node.decorator_list)
            assert lines <= (100 if kernel else 50), f"{node.name} has {lines} lines"


def test_model_code_is_written_for_one_device() -> None:
    for name in ("models/layers", "models/attention", "models/gpt", "moe/gate", "moe/experts", "moe/layer"):
        path = ROOT / f"{name}.py"
        assert "torch.distributed" not in path.read_text(), f"{name}.py must not know torch.distributed"


def test_nothing_unpickles() -> None:
    for file in [*FILES, *ROOT.glob("cli*.py"), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name for a in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cloudpickle", "dill", "joblib"}, f"{file.name} imports a pickle"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec"}, f"{file.name} calls {called}"
                if called == "torch.load":
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert keywords.get("weights_only") == "True", f"{file.name}: torch.load needs weights_only=True"
