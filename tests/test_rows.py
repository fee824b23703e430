"""Rows of a micro-batch, in every nesting that data comes in."""

from typing import NamedTuple

import torch

from trainer.data.rows import rows_at


class Pair(NamedTuple):
    inputs: torch.Tensor
    names: list[str]


def test_rows_are_taken_wherever_they_lie() -> None:
    x, table = torch.arange(8).reshape(4, 2), torch.zeros(3)
    names = ["a", "b", "c", "d"]
    batch = {
        "x": x,
        "pair": Pair(x * 10, names),
        "deep": (x[:, 0], [table, 7]),
        "scalar": torch.tensor(5),
        "word": "four",
    }
    found = rows_at(batch, [3, 1], 4)
    assert found["x"].tolist() == [[6, 7], [2, 3]]
    assert isinstance(found["pair"], Pair) and found["pair"].names == ["d", "b"]
    assert found["pair"].inputs.tolist() == [[60, 70], [20, 30]]
    assert found["deep"][0].tolist() == [6, 2]
    assert found["deep"][1][0] is table and found["deep"][1][1] == 7
    assert found["scalar"] is batch["scalar"] and found["word"] == "four"
    assert rows_at((x, torch.tensor([1, 2, 3, 4])), [0], 4)[1].tolist() == [1]
