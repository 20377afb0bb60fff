"""What the repository promises to its readers: true documents, short files, nothing of anybody's machine."""

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pyml
from pyml import info

ROOT = Path(__file__).resolve().parent.parent
SOURCE = {".py", ".pyi", ".cpp", ".h", ".inl", ".cu", ".toml", ".json", ".txt", ".yaml", ".md", ""}
PROGRAM = {".py", ".cpp", ".h", ".inl", ".cu"}
PUBLIC = ("pyml", "pyml.ops", "pyml.nn", "pyml.testing", "pyml.backend", "pyml.info", "pyml.privacy", "pyml.optim")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def test_program_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in tracked() if p.suffix in PROGRAM
            if (n := len(p.read_text().splitlines())) > 400}  # fmt: skip
    assert not long, f"more than 400 lines, split by meaning: {long}"


def test_nothing_names_a_machine():
    """No absolute path of a work place, no address of a package registry."""
    places = "|".join(("work", "tmp", "home", "root", "opt", "Users"))
    hosts = "|".join(("py" + "pi", "files.python" + "hosted", "download.py" + "torch"))
    pattern = re.compile(rf"(?<![\w.$}}])/(?:{places})/\w|\b(?:{hosts})\.org")
    found = []
    for path in tracked():
        if path.suffix in SOURCE | {".csv"} and path.name != "LICENSE":
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if pattern.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_links_in_documents_lead_somewhere():
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if not target.startswith(("http://", "https://", "mailto:")) and not (document.parent / target).exists():
                broken.append(f"{document.name}: {target}")
    assert not broken, broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_commands_in_documents_exist(document):
    """Every `make TARGET` of a document is a target, and every `pyml COMMAND` a command."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    text = document.read_text()
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    for span in re.findall(r"`([^`\n]+)`", text) + lines:
        if made := re.match(r"make ((?:[a-z][a-z-]*\s*)+)", span):
            for target in made[1].split("#")[0].split():
                assert target in targets, f"{document.name}: make {target}: no such target"
    from typer.main import get_command

    from pyml.cli import app

    known = get_command(app).commands
    for line in lines:
        if asked := re.match(r"pyml ([a-z]+)(?: ([a-z_]+))?", line):
            assert asked[1] in known, f"{document.name}: pyml {asked[1]}: no such command"
            if asked[2] and hasattr(known[asked[1]], "commands"):
                assert asked[2] in known[asked[1]].commands, f"{document.name}: pyml {asked[1]} {asked[2]}"


def test_readme_starts_with_the_two_commands():
    first = blocks((ROOT / "README.md").read_text(), "sh")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]


def test_readme_example_runs(device):
    (example,) = blocks((ROOT / "README.md").read_text(), "python")
    if device == "cuda":
        pytest.skip("the example is for a CPU")
    result = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert float(re.search(r"loss ([\d.]+)", result.stdout)[1]) < 0.01, "the example learns its function"


@pytest.mark.parametrize("page", [p for p in DOCUMENTS if p.parent.name == "docs"], ids=lambda p: p.name)
def test_examples_of_the_guides_run(page, tmp_path, monkeypatch):
    """The Python blocks of a page run one after the other; a comment `# [2, 3]` behind an assignment is its shape."""
    monkeypatch.chdir(tmp_path)
    examples = blocks(page.read_text(), "python")
    if not examples:
        pytest.skip("no example")
    scope: dict[str, object] = {}
    for example in examples:
        exec(compile(example, page.name, "exec"), scope)
        for name, shape in re.findall(r"^(\w+) = .*# \[([\d, ]+)\]", example, flags=re.M):
            assert list(scope[name].shape) == [int(n) for n in shape.split(",")], f"{page.name}: shape of {name}"


def test_readme_table_is_up_to_date():
    text = (ROOT / "README.md").read_text()
    assert info.in_readme(text) == text, "run: python -m pyml.info --readme README.md"
    with pytest.raises(ValueError, match="README: expected the lines"):
        info.in_readme("no table here")


@pytest.mark.parametrize(("where", "skipped"), [("cpu", []), ("cuda", ["plain"])])
def test_on_a_gpu_only_what_asks_for_the_device_runs(where, skipped):
    """`make gpu-test` is short: compilers, nested sessions and the training of the methods do the same there."""
    from tests import conftest

    found = []

    def item(name, *fixtures):
        values = {"path": ROOT, "fixturenames": fixtures, "get_closest_marker": lambda name: None}
        return SimpleNamespace(**values, add_marker=lambda mark: found.append(name))

    config = SimpleNamespace(getoption={"--device": where, "--full": False}.get)
    conftest.pytest_collection_modifyitems(config, [item("of the device", "backend", "device"), item("plain", "op")])
    assert found == skipped


def test_public_names_are_documented():
    missing = []
    for name in PUBLIC:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:  # a family that is planned
                continue
            raise
        if not module.__doc__:
            missing.append(name)
        for public in getattr(module, "__all__", [n for n, v in vars(module).items() if inspect.isfunction(v)]):
            value = getattr(module, public)
            if public.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            if not value.__doc__ and getattr(value, "__module__", "").startswith("pyml"):
                missing.append(f"{name}.{public}")
            if inspect.isclass(value) and name in ("pyml.nn", "pyml.optim"):
                own = {n: m for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")}
                inherited = {n for base in value.__mro__[1:] for n in vars(base)}
                missing += [f"{name}.{public}.{n}" for n, m in own.items() if not m.__doc__ and n not in inherited]
    assert not missing, f"no docstring: {sorted(set(missing))}"


def test_environment_variables_are_in_one_table():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Environment variables", 1)[1].split("\n## ", 1)[0]
    reads = re.compile(r"""(?:environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*|getenv\()["'](PYML_\w+)["']""")
    used = set()
    for path in tracked():
        if path.suffix in PROGRAM and "tests" not in path.relative_to(ROOT).parts[:1]:
            used |= set(reads.findall(path.read_text()))
    assert used, "the pattern above finds none"
    missing = {name for name in used if f"`{name}`" not in table}
    assert not missing, f"not in the table of CONTRIBUTING.md: {missing}"


def test_versions_agree():
    project = (ROOT / "pyproject.toml").read_text()
    stated = re.search(r'^version = "(.+)"', project, flags=re.M)[1]
    assert pyml.__version__ == stated
    assert f"## {stated}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text().splitlines()[0]
