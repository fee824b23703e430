"""The rooms and their arrows, read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trainer"

# From the lowest room up: a room may import from rooms below it and from its own, never from above.
KEEPING = ["diagnose.capture", "diagnose.health", "diagnose.per_sample", "diagnose.replay"]
LAYERS = [
    ["errors", "settings", "signals", "torchrun"],
    ["gradient.report", "gradient.clocks", "distributed", "kernels", "rng", "bits"],
    ["gradient"],
    ["optim", "data", "activations", "diagnose", "step_state"],
    ["step", "modes", "device"],
    ["evaluate", "checkpoint", "loggers", "summary", "due", "certificate", *KEEPING],
    ["asked", "capturing", "feed", "held_out", "limits", "ranks_of_run"],
    ["loop"],
    ["config", "verbs"],
    ["cli"],
    ["__main__"],
]
LONG = {
    "settings.py": "every toggle once",
    "step.py": "the life of a gradient, read straight down",
    "loop.py": "the run, read straight down",
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, package: str = "trainer") -> set[str]:
    """Modules of the package that a file imports anywhere but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for name in ("body", "orelse"):
            inner = getattr(node, name, None)
            if isinstance(inner, list):
                kept = [
                    one for one in inner if not (isinstance(one, ast.If) and "TYPE_CHECKING" in ast.unparse(one.test))
                ]
                setattr(node, name, kept)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    inside = {name.removeprefix(f"{package}.") for name in found if name == package or name.startswith(f"{package}.")}
    return {name for name in inside if name in MODULES} - {""}


def layer(module: str) -> int:
    rooms = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
    while module not in rooms:
        assert "." in module, f"trainer/{module} is in no layer: give it its place in LAYERS"
        module = module.rsplit(".", 1)[0]
    return rooms[module]


def test_every_room_of_the_list_is_there() -> None:
    for rooms in LAYERS:
        for room in rooms:
            assert room in MODULES or any(name.startswith(f"{room}.") for name in MODULES), room


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_no_import_points_upwards(module) -> None:
    for other in imports(MODULES[module]):
        if other != module:
            assert layer(other) <= layer(module), f"{module} imports {other}, which is above it"


def test_no_imports_go_in_a_circle() -> None:
    # A package's __init__ that lists its own modules is no file that they need.
    graph = {name: {o for o in imports(path) if o != name} for name, path in MODULES.items() if name}
    for name, path in MODULES.items():
        if name and path.name == "__init__.py":
            for other in graph:
                if other.startswith(f"{name}."):
                    graph[other].discard(name)
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph[name]:
                walk(other, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("module", list(MODULES))
def test_the_package_imports_neither_recipes_nor_configs_nor_tests(module) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        for name in names:
            assert name.split(".")[0] not in ("recipes", "tests", "configs", "runs"), name
            assert not name.startswith(("trainer.recipes", "trainer.configs")), name


@pytest.mark.parametrize("module", list(MODULES))
def test_no_user_error_is_an_assert_and_nothing_prints(module) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"trainer/{module}, line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert module.split(".")[0] in ("cli", "config"), f"trainer/{module}, line {node.lineno}"


def test_nothing_is_unpickled_and_no_text_is_run() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "torch.load", "numpy.load"), path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [str(getattr(node, "module", ""))]
                assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & set(names), path


def test_a_file_has_under_300_lines_or_a_reason() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        length = len(path.read_text(encoding="utf-8").splitlines())
        assert length < 300 or name in LONG, f"trainer/{name} has {length} lines"
        assert length < 420, f"trainer/{name} has {length} lines"


def test_every_file_says_what_it_is_for() -> None:
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"trainer/{name} has no docstring"


def test_help_needs_no_torch() -> None:
    module = "trainer, trainer.errors, trainer.settings, trainer.cli"
    heavy = ("torch", "numpy", "hydra", "tensorboard", "sklearn")
    code = f"import sys, {module}; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_loop_imports_no_logger_library_until_it_is_asked_for() -> None:
    code = "import sys, trainer.loop; print([n for n in ('tensorboard', 'hydra', 'sklearn') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import trainer

    for name in trainer.__all__:
        assert getattr(trainer, name).__name__ == name
    assert set(trainer.__all__) <= set(dir(trainer))
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'Trainr'"):
        trainer.Trainr  # noqa: B018
