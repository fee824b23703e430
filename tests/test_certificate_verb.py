"""`trainer check`: what it prints, and the exit code that says the verdict."""

import json

import pytest

from trainer.cli import main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", ["xor", "xor_mlp", "scalar", "vjp", "quadratic"])
def test_recipes_pass_and_nothing_is_written(recipe, here, capsys) -> None:
    assert main(["check", f"recipe={recipe}"]) == 0
    assert "the gradient is the one asked for" in capsys.readouterr().out
    assert list(here.iterdir()) == []


def test_batch_norm_under_accumulation_is_exit_code_6_and_named_for_machines(capsys) -> None:
    words = ["recipe=conv", "model.width=4", "data.batch_size=16", "gradient.accumulation_steps=2"]
    assert main(["check", *words, "--json"]) == 6
    said = json.loads(capsys.readouterr().out)
    assert said["recipe"] == "conv" and said["passed"] is False and said["micro_batches"] == 2
    (finding,) = said["findings"]
    assert (finding["kind"], finding["setting"], finding["module"]) == ("batch_statistics", "accumulation_steps", "1")


def test_a_run_with_a_wrong_gradient_does_not_begin(here, capsys) -> None:
    words = ["recipe=conv", "model.width=4", "data.batch_size=16", "gradient.accumulation_steps=2", "run=mine"]
    assert main(["train", *words, "check=first_step"]) == 6
    assert "WRONG GRADIENT: accumulation_steps in module '1'" in capsys.readouterr().err
    assert not list(here.rglob("last.safetensors"))


def test_a_custom_function_with_a_wrong_backward_is_exit_code_6(monkeypatch, capsys) -> None:
    from trainer.recipes.custom_relu import ReLU

    assert main(["check", "recipe=custom_relu", "--gradcheck", "1"]) == 0
    assert "ReLU, the module '1' passed" in capsys.readouterr().out
    monkeypatch.setattr(ReLU, "backward", staticmethod(lambda ctx, gradient: gradient))
    assert main(["check", "recipe=custom_relu"]) == 6
    assert "WRONG GRADIENT: a backward in module '1': ReLU" in capsys.readouterr().out
    assert main(["check", "recipe=custom_relu", "--meant", "ReLU"]) == 0
    assert main(["check", "recipe=custom_relu", "--gradcheck", "hidden"]) == 2
    assert "there is no module 'hidden'" in capsys.readouterr().err
