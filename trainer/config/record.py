"""What a run's folder says of how it came about: the whole config as plain YAML, and the words of the command line."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import CheckpointError

CONFIG = "config.yaml"
COMMAND = "command.txt"


def write(folder: Path, plain: Mapping[str, Any], again: Sequence[str], go_on: str) -> None:
    """Put config.yaml and command.txt into the folder, in place of older ones.

    Args:
        folder: the run's; made where it is not there.
        plain: the config as composed and resolved.
        again: the words that run it once more, from the folder that is the working folder now.
        go_on: those that go on with this run.
    """
    command = shlex.join(again)
    lines = [f"# in {Path.cwd()}", command]
    if go_on != command:
        lines.append(f"# to go on with this run: {go_on}")
    values = yaml.safe_dump(dict(plain), sort_keys=False, allow_unicode=True, width=120)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(f"# {command}\n{values}", encoding="utf-8")
        (folder / COMMAND).write_text("\n".join([*lines, ""]), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the run cannot be recorded there ({error.strerror or error}): give it another folder."
        ) from error
