"""The public names, which are loaded when they are first used."""

import subprocess
import sys

import pytest

import trainer


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, trainer; print(sorted({'torch', 'pydantic', 'hydra', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", trainer.__all__)
def test_every_public_name_is_there_and_is_what_it_is_called(name):
    assert getattr(trainer, name).__name__ == name
    assert name in dir(trainer) and vars(trainer)[name] is getattr(trainer, name)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        trainer.Trainr  # noqa: B018
