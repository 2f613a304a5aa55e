"""The rules of the tree, read off the code itself."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    ["base"],
    ["text", "tokenizer", "model"],
    ["data", "train"],
    ["sample", "feedback", "reward"],
    "preference rl evaluate hub serve plan report replay demo adapters routing objectives distill".split(),
    ["stages"],
]
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}
FILES = sorted((ROOT / "jaxlm").rglob("*.py"))
SIDEWAYS = {("train", "data")}


def folder_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "jaxlm").parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def code_lines(paths: list[Path]) -> int:
    """Lines with code on them, as `cloc` counts: no blank lines, comments or strings that stand alone (docstrings)."""
    return sum(len(lines_of_code(path.read_text())) for path in paths)


def lines_of_code(source: str) -> set[int]:
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in silent for n in range(t.start[0], t.end[0] + 1)}
    alone = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return lines - {line for node in alone for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def test_lines_of_code_are_counted_without_words():
    source = '"""Doc."""\n\nx = 1  # one\n# two\ny = """a\nb"""\n\ndef f():\n    """No."""\n'
    assert lines_of_code(source) == {3, 5, 6, 8}


def test_imports_go_to_lower_levels_only():
    wrong = []
    for path in FILES:
        here = folder_of(path)
        if not here:  # __init__ and __main__ stand above all levels and import lazily
            continue
        for name in imports(path):
            if not name.startswith("jaxlm."):
                continue
            there = name.split(".")[1]
            lazy_map = there == "__main__" and here == "stages"
            allowed = there == here or there == "version" or lazy_map or (here, there) in SIDEWAYS
            if not allowed and LEVEL.get(there, 9) >= LEVEL[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_stages_import_no_stage():
    wrong = [
        (path.name, name)
        for path in (ROOT / "jaxlm/stages").glob("*.py")
        for name in imports(path)
        if name.startswith("jaxlm.stages.") and not name.startswith("jaxlm.stages.config")
    ]
    assert wrong == []


def test_only_the_model_imports_flax():
    assert {folder_of(path) for path in FILES if any(n.split(".")[0] == "flax" for n in imports(path))} == {"model"}


def test_configs_need_the_standard_library_only():
    standard = {"dataclasses", "typing", "math", "collections", "enum", "zlib"}
    for path in FILES:
        if path.name == "config.py" and folder_of(path) != "base":
            for name in imports(path):
                package = name.split(".")[0]
                fine = package in standard or (
                    package == "jaxlm" and (".config" in name or name.startswith("jaxlm.base.errors"))
                )
                assert fine, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "asks for a better cut"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            most = 120 if folder_of(path) == "stages" and node.name in ("main", "train_step") else 60
            assert length <= most, f"{node.name} has {length} lines"


def test_total_sizes():
    low = [path for path in FILES if LEVEL.get(folder_of(path), 9) <= 3 or folder_of(path) == "stages"]
    everything = [*FILES, *(p for folder in ("configs", "launch", "tools") for p in (ROOT / folder).rglob("*.py"))]
    assert code_lines(low) <= 9000
    assert code_lines(everything) <= 22000


def test_config_files_are_short():
    for path in (ROOT / "configs").glob("*.py"):
        tree = ast.parse(path.read_text())
        get_config = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "get_config")
        assert (get_config.end_lineno or 0) - get_config.lineno < 60, path
        assert ast.get_docstring(tree), f"{path}: needs a header with command, hardware, time and result"


def test_the_reference_is_plain():
    assert len((ROOT / "tools/reference_model.py").read_text().splitlines()) <= 60
