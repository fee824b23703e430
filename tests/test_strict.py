"""JSON as it was written and no other."""

import json

import pytest

from trainer import CheckpointError
from trainer.checkpoint import strict


def test_what_was_written_is_read() -> None:
    value = {"a": [1, 2.5, -0.0, 1 << 80, "grün", None, True, {}], "b": {"a": 1}}
    assert strict.parsed(json.dumps(value).encode(), "here", 1000) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "nothing", "[1,]", "{'a': 1}", '{"a": 1} 2', '{"a": 1, "a": 1}', '{"b": {"a": 1, "a": 2}}', "[NaN]",
        "[Infinity]", "[-Infinity]", "[1e999]", "[-1e999]", "[" * 100_000, "\ufeff[1]", "[" + "9" * 5000 + "]",
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name(text) -> None:
    with pytest.raises(CheckpointError, match="^here is damaged: it is not the JSON that was written"):
        strict.parsed(text.encode(), "here", 1_000_000)


def test_bytes_that_are_no_text_and_more_bytes_than_are_read() -> None:
    with pytest.raises(CheckpointError, match="here is damaged"):
        strict.parsed(b'["\xff"]', "here", 100)
    with pytest.raises(CheckpointError, match="here has 101 bytes, more than the 100 that are read"):
        strict.parsed(b"[" + b" " * 99 + b"]", "here", 100)
