"""What pyproject.toml and constraints.txt promise: all packages and YAML in the wheel, all dependencies pinned."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
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


def test_a_wheel_holds_every_file_and_works(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    built = subprocess.run([*pip, str(project)], capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("gradtrainer-*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        commands = wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
        wheel.extractall(tmp_path / "installed")
    assert names == sources()
    assert commands.split() == ["[console_scripts]", "trainer", "=", "trainer.cli:main"]
    code = "import trainer, trainer.configs, trainer.recipes; print(trainer.__file__, trainer.recipes.__file__)"
    bare = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); {code}"]
    files = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert [Path(file).is_relative_to(tmp_path / "installed") for file in files] == [True, True]


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
