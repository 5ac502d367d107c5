"""What holds for every file: one direction of imports, few requirements, short functions, commands that exist."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_sg import cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "ldm_sg").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
EVERYTHING = PACKAGE + [p for name in ("tools", "tests", "benchmarks") for p in sorted((ROOT / name).rglob("*.py"))]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

MAY_IMPORT: dict[str, set[str]] = {  # part of ldm_sg -> the other parts that it may know
    **{name: set() for name in ("config", "cli", "hardware", "store", "data", "weights")},
    "ops": {"hardware"},
    "diffusion": {"ops"},
    "model": {"ops"},
    "autoencoder": {"config", "hardware", "weights"},
    "annotate": {"ops", "config", "hardware", "weights", "data", "autoencoder", "store"},
    "train": {"ops", "config", "hardware", "weights", "data", "autoencoder", "store", "model", "diffusion"},
}
MAY_IMPORT["sample"] = MAY_IMPORT["train"] | {"train"}
MAY_IMPORT["evaluate"] = MAY_IMPORT["sample"] | {"sample", "annotate"}
OPTIONAL = ["faiss", "PIL", "timm", "tqdm", "tensorboard", "sklearn", "diffusers", "lmdb", "gradio", "torchvision"]
OPTIONAL += ["transformers", "huggingface_hub", "lightly", "scipy"]
SPLIT = {
    "annotate/test_faults.py": "ldm_sg/annotate/pipeline.py",
    "store/test_column.py": "ldm_sg/store/writer.py",
    "model/test_compile.py": "ldm_sg/model/unet.py",
    "sample/test_overfit.py": "ldm_sg/sample/sampler.py",
    "diffusion/test_diffusers.py": "ldm_sg/diffusion/samplers.py",
    "store/test_docs.py": "docs/store.md",
    "tools/test_bad_input.py": "ldm_sg/cli.py",
}  # test -> what of


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every (line, module) that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} is relative"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT / "ldm_sg").parts[0].removesuffix(".py")
    for line, module in imported(path):
        top, *rest = module.split(".")
        assert top not in ("tools", "tests", "benchmarks"), f"{name_of(path)}:{line} imports {module}"
        if top == "ldm_sg" and rest and rest[0] != part:
            assert rest[0] in MAY_IMPORT[part], f"{name_of(path)}:{line} imports {module}"


def test_library_needs_only_torch_numpy_omegaconf_and_safetensors() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    code += "import ldm_sg.ops, ldm_sg.model, ldm_sg.diffusion, ldm_sg.train"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=name_of)
def test_everything_public_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno} {node.name} has no docstring"


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_functions_and_files_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, name_of(path)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines"


def test_tests_mirror_the_package() -> None:
    for path in (ROOT / "tests").glob("*/test_*.py"):
        part = ROOT / "ldm_sg" / path.parent.name
        if not part.is_dir():
            continue  # tests/tools runs the commands, each test several of them
        tested = part / path.name.removeprefix("test_")
        split = SPLIT.get(f"{path.parent.name}/{path.name}")
        assert (ROOT / split if split else tested).is_file(), f"{name_of(path)} mirrors no file"


def commands(path: Path) -> list[list[str]]:
    """The tool and make commands in a document's code blocks and code spans, or in a tool's docstring."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".py":
        code = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    else:
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M) + re.findall(r"^    .*", text, re.M)
        code = [line for block in blocks for line in block.splitlines()]
        code += re.findall(r"`([^`\n]+)`", text)
    steps = [re.sub(r"^[$>] ", "", s.strip()) for line in code for s in re.split(r"&&|\|\||[;|]", line.split(" # ")[0])]
    found = [shlex.split(s) for s in steps if re.match(r"([A-Z_]+=\S+ )*(make|torchrun|python3?) ", s)]
    return [[w for i, w in enumerate(c) if i or "=" not in w] for c in found]


def parse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tool parse its arguments, and stop it there."""
    tool = next(i for i, word in enumerate(command) if word.startswith("tools/"))
    path = ROOT / command[tool]
    assert path.is_file(), f"{shlex.join(command)}: there is no {command[tool]}"
    assert "    cli.run(main, parsed)\n" in path.read_text()
    monkeypatch.setattr(cli, "run", lambda main, parsed: None)
    monkeypatch.setattr(sys, "argv", [str(path), *command[tool + 1 :]])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"{shlex.join(command)}: refused"


@pytest.mark.parametrize("path", [p for p in DOCUMENTS + TOOLS if p.is_file()], ids=name_of)
def test_written_commands_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands(path):
        if command[0] == "make":
            assert set(w for w in command[1:] if "=" not in w) <= set(targets), shlex.join(command)
        elif any(word.startswith("tools/") for word in command):
            parse(command, monkeypatch)


def test_readme_shows_the_three_commands_and_make() -> None:
    shown = {shlex.join(c) for c in commands(ROOT / "README.md")}
    three = {"python tools/annotate.py", "torchrun tools/train_ldm.py", "python tools/sample_grid.py --cluster 17"}
    assert three | {"make demo", "make test"} <= shown
