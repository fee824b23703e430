"""Arguments held against a signature before the call."""

from typing import Any

import pytest

from trainer.config.arguments import fits
from trainer.errors import ConfigError


def target(parameters, lr: float = 0.1, depth: int = 2, name: str | None = None, *, nesterov: bool = False):
    return parameters, lr, depth, name, nesterov


def loose(**anything: Any):
    return anything


class Net:
    def __init__(self, width: int):
        self.width = width


def held(function, keywords, positional=(), partial=False):
    fits(function, "my.target", "optimizer", list(positional), keywords, partial)


@pytest.mark.parametrize(
    ("function", "keywords", "sentence"),
    [
        (target, {"lrr": 1}, "there is no 'optimizer.lrr': of what my.target takes, did you mean 'lr'?"),
        (target, {"parameters": 1}, "optimizer.parameters cannot be set: it is given to my.target already."),
        (target, {"lr": "fast"}, "optimizer.lr='fast' is not possible: my.target wants float."),
        (target, {"depth": 1.5}, "optimizer.depth=1.5 is not possible: my.target wants int."),
        (target, {"depth": True}, "optimizer.depth=True is not possible: my.target wants int."),
        (target, {"name": 3}, "optimizer.name=3 is not possible: my.target wants str | None."),
    ],
)
def test_what_does_not_fit_names_the_key(function, keywords, sentence):
    with pytest.raises(ConfigError) as caught:
        held(function, keywords, positional=["parameters"])
    assert str(caught.value) == sentence


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="missing a required argument: 'width'"):
        held(Net, {})
    held(Net, {}, partial=True)
    held(Net, {"width": 3})


def test_what_fits_passes():
    held(target, {"lr": 1, "name": None, "nesterov": True}, positional=["parameters"])
    held(target, {"lr": object()}, positional=["parameters"])  # a made object is not judged
    held(loose, {"whatever": 3})
    held(dict, {"no": "signature"})
