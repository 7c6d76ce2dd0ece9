"""The arrows of the layout: commands and scripts use rae_suite/, which uses modeling_*.py, and never the other way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

COMMANDS = {"train_rae", "train_dit", "eval_rfid", "eval_fid", "linear_probe", "sample_dit"}
FILES = {
    "command": [ROOT / f"{name}.py" for name in sorted(COMMANDS)],
    "shared": sorted((ROOT / "rae_suite").glob("*.py")),
    "script": sorted((ROOT / "scripts").glob("*.py")),
    "example": sorted((ROOT / "examples").glob("*.py")),
    "model": sorted(ROOT.glob("modeling_*.py")),
}
SCRIPTS = {path.stem for path in FILES["script"]}
# what each kind of file may import of this repository
ALLOWED = {
    "command": {"rae_suite", "modeling"},
    "shared": {"rae_suite", "modeling"},
    "script": {"rae_suite", "modeling"},
    "example": set(),
    "model": set(),
}


def imported(path: Path) -> set:
    """Names of the modules that a file imports, at its top or in a function; their first part."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import in line {node.lineno}"
            names.add(node.module.split(".")[0])
    return names


def kind(module: str) -> str:
    """Which part of this repository a module is of; "" for one of a library."""
    if module in COMMANDS | SCRIPTS:
        return "command"
    if module == "rae_suite":
        return "rae_suite"
    return "modeling" if module.startswith("modeling_") else ""


@pytest.mark.parametrize("part", FILES)
def test_arrows_run_one_way(part):
    """No command imports another, nothing shared imports a command, models import nothing of this repository."""
    assert FILES[part]
    for path in FILES[part]:
        found = {module: kind(module) for module in imported(path) if kind(module)}
        wrong = {module for module, what in found.items() if what not in ALLOWED[part]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_few_shared_files_know_the_models():
    """Only those about networks: a training script of another stage finds nothing of this one's in the others."""
    know = {path.stem for path in FILES["shared"] if any(kind(module) == "modeling" for module in imported(path))}
    assert know == {
        "autoencoders", "class_labels", "comparison", "diffusers_rae", "discriminator", "dit_card", "dit_conversion",
        "dit_folders", "dit_networks", "flow", "latent_stats", "model_loading", "model_sources", "position_tables",
        "published_dit", "published_rae", "rae_card", "rae_networks", "start_weights",
    }  # fmt: skip


def test_the_root_shows_commands_and_models_only():
    python_files = {path.stem for path in ROOT.glob("*.py")}
    assert python_files == COMMANDS | {path.stem for path in FILES["model"]}


def test_the_readme_ends_with_the_tree():
    """Every Python file outside of tests and benchmarks has its line, and every line its file."""
    tree = (ROOT / "README.md").read_text().rstrip().rsplit("```", 2)[1]
    named = {line.split()[0] for line in tree.splitlines() if line.strip() and line.split()[0].endswith(".py")}
    files = {path.name for paths in FILES.values() for path in paths if path.name != "__init__.py"}
    assert files - named == set() and named - files == set()


def project_version() -> str:
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_make_help_lists_every_target_and_the_version():
    """Its text is that of the Makefile's targets, so none is forgotten; a target that is a file needs none."""
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, *lines = done.stdout.splitlines()
    assert first == f"RAE suite {project_version()}"
    targets = re.findall(r"^([\w./-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)
    commands = [name for name in targets if not name.startswith(".") and "/" not in name]
    assert [line.split()[:2] for line in lines] == [["make", name] for name in commands] and len(commands) > 10
    assert all(len(line.split()) > 3 for line in lines)


def test_the_version_stands_in_one_place():
    """Only pyproject.toml says it; the change log has a part of that name, or is on its way to it."""
    assert re.search(rf"^## (Unreleased|{re.escape(project_version())})", (ROOT / "CHANGELOG.md").read_text(), re.M)
    pattern = re.compile(r"^\W*(__)?version(__)?\W*[=:]\s*[\"']?\d+\.\d+", re.M)
    files = [path for paths in FILES.values() for path in paths]
    files += [ROOT / name for name in ("pyproject.toml", "CITATION.cff", "Makefile", "README.md")]
    assert [path.name for path in files if pattern.search(path.read_text())] == ["pyproject.toml"]


def test_what_github_reads():
    """The workflow runs .ci/run, which can be executed; every form of an issue asks for something."""
    folder = ROOT / ".github"
    [job] = yaml.safe_load((folder / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert ".ci/run" in [step.get("run") for step in job["steps"]] and (ROOT / ".ci" / "run").stat().st_mode & 0o100
    forms = sorted((folder / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
    assert len(forms) == 3
    for form in (yaml.safe_load(path.read_text()) for path in forms):
        assert {"name", "description", "body"} <= form.keys()
        assert any(part.get("validations", {}).get("required") for part in form["body"])
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["cff-version"] == "1.2.0"


def test_each_shared_file_can_be_imported_first():
    """No import in a circle, whichever file is asked for first."""
    names = [f"rae_suite.{path.stem}" for path in FILES["shared"] if path.stem != "__init__"]
    code = "import os, sys, importlib\nfor name in sys.argv[1:]:\n"
    code += "    pid = os.fork()\n    if pid == 0:\n        importlib.import_module(name)\n        os._exit(0)\n"
    code += "    if os.waitpid(pid, 0)[1]:\n        print(name)\n"
    # the libraries first, once for all of them
    libraries = "import torch, transformers, accelerate, datasets, torchvision, cleanfid.fid, diffusers\n"
    libraries += "import torchmetrics.functional.image, modeling_dit, modeling_rae\n"
    done = subprocess.run([sys.executable, "-c", libraries + code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr
