"""What pyproject.toml and constraints.txt promise: all packages and YAML in the wheel, all dependencies pinned."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"trainer": "trainer", "configs": "trainer/configs", "recipes": "trainer/recipes"}


def sources() -> set[str]:
    """The names that the files of the three folders have inside the package."""
    found = set()
    for folder, inside in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".typed"}:
                found.add(f"{inside}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def test_the_list_of_packages_is_the_folders() -> None:
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in sources() if name.endswith("/__init__.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the project as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    project = folder / "project"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    built = subprocess.run([*pip, str(project)], capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("gradtrainer-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `trainer` of an environment of its own that has the wheel, and sees the packages it needs.

    A .pth file shows it the folder of these packages; what .pth files in there point to, this checkout among it, it
    does not see.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=240)
    inside = "Scripts" if os.name == "nt" else "bin"
    python = folder / inside / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-I", "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site) / "needed.pth").write_text("\n".join(sorted(packages)))
    return folder / inside / "trainer"


def test_a_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        commands = opened.read(next(name for name in opened.namelist() if name.endswith("entry_points.txt"))).decode()
    assert names == sources()
    assert commands.split() == ["[console_scripts]", "trainer", "=", "trainer.__main__:main"]


MY_RECIPE = """# @package _global_
# trainer train --config-dir my_recipes recipe=mine
description: a line through my points
model: {_target_: my_model.Line}
objective: {_target_: torch.nn.MSELoss}
metrics: {_target_: my_model.error, _partial_: true}
data: {source: {_target_: my_model.points}, batch_size: 8}
optimizer: {lr: 0.1}
limits: {epochs: 20}
"""
MY_MODEL = """
import torch
from trainer import Split, Sum

class Line(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

def points():
    x = torch.linspace(-1, 1, 64).reshape(64, 1)
    return Split(train=(x, 2 * x + 1), evaluation=(x, 2 * x + 1))

def error(model, micro_batch):
    inputs, targets = micro_batch
    return {"error": Sum((model(inputs) - targets).abs().sum(), len(inputs))}
"""


def test_the_installed_wheel_runs_recipes_and_ones_own_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*words: str) -> str:
        command = [str(installed), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
        return done.stdout

    code = "import trainer, trainer.configs, trainer.recipes; print(trainer.__file__, trainer.recipes.__file__)"
    python = [str(installed.with_name("python")), "-c", code]
    files = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert [Path(file).is_relative_to(installed.parents[1]) for file in files.split()] == [True, True]
    recipes = (ROOT / "configs" / "recipe").glob("*.yaml")
    assert [line.split()[0] for line in run("recipes").splitlines()] == sorted(path.stem for path in recipes)
    assert "No straight line parts XOR" in run("train", "recipe=xor", "limits.epochs=3")
    for own in (tmp_path / "my_recipes", tmp_path / "my_recipes" / "recipe"):
        own.mkdir()
    (tmp_path / "my_recipes" / "recipe" / "mine.yaml").write_text(MY_RECIPE)
    (tmp_path / "my_recipes" / "my_model.py").write_text(MY_MODEL)
    said = run("train", "--config-dir", "my_recipes", "recipe=mine", "run=a")
    assert float(re.findall(r"last evaluation: .*error ([\d.e-]+)", said)[0]) < 0.2
    assert (tmp_path / "outputs" / "mine" / "a" / "model.safetensors").exists()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name): re.sub("^==", "", str(each.specifier)) for each in requirements}


def test_every_dependency_is_pinned_and_installed_as_pinned() -> None:
    project = PYPROJECT["project"]
    open_ones = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    seen: dict[str, str] = {}
    while open_ones:
        requirement = open_ones.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        distribution = importlib.metadata.distribution(name)
        seen[name] = Version(distribution.version).public
        for text in distribution.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                open_ones.append(needed)
    pinned = pins()
    assert {name: pinned.get(name) for name in seen} == seen
    assert len(seen) > 30


@pytest.mark.parametrize("text", PYPROJECT["project"]["dependencies"])
def test_each_pin_is_within_the_range_that_users_are_promised(text: str) -> None:
    requirement = Requirement(text)
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier
