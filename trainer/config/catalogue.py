"""Which recipes and group options there are, read from the folders alone: neither Hydra nor torch is imported."""

import importlib.util
from pathlib import Path

import yaml

from trainer.errors import ConfigError


def shipped() -> Path:
    """The folder of the configs that come with the package."""
    spec = importlib.util.find_spec("trainer.configs")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("trainer.configs is not installed: run pip install -e . in the project's folder.")
    return Path(spec.submodule_search_locations[0])


def options(group: str, config_dir: Path | None = None) -> dict[str, Path]:
    """The files of a group by the name that the command line says; those of `config_dir` come before shipped ones."""
    found: dict[str, Path] = {}
    for root in (shipped(), *((config_dir,) if config_dir else ())):
        for path in sorted((root / group).glob("**/*.yaml")):
            found[path.relative_to(root / group).with_suffix("").as_posix()] = path
    return found


def groups(config_dir: Path | None = None) -> list[str]:
    """The names of the groups that have options."""
    roots = (shipped(), *((config_dir,) if config_dir else ()))
    return sorted({file.parent.name for root in roots for file in root.glob("*/*.yaml")} - {"hydra"})


def described(path: Path) -> str:
    """The `description` of a recipe's file, or nothing where it has none."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return "(this file cannot be read)"
    line = values.get("description") if isinstance(values, dict) else None
    return str(line) if line else ""
