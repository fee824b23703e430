import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.loggers.layers import BUCKETS, gradients_of, histogram


def test_only_gradients_that_are_there() -> None:
    with_one, without = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with_one.grad = torch.zeros(2)
    assert gradients_of({"a": with_one, "b": without}) == {"a": with_one.grad}


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60))
def test_a_histogram_holds_every_number_between_the_least_and_the_largest(numbers) -> None:
    found = histogram(torch.tensor(numbers))
    assert found is not None
    assert sum(count for _, _, count in found) == len(numbers)
    assert found[0][0] <= min(numbers) and found[-1][1] >= max(numbers)
    assert all(left < right for left, right, _ in found) or len(found) == BUCKETS
    assert [left for left, _, _ in found[1:]] == [right for _, right, _ in found[:-1]]


def test_what_has_no_histogram_and_what_has_one_bucket() -> None:
    for tensor in (torch.zeros(0), torch.tensor([1.0, math.nan]), torch.tensor([1.0, -math.inf])):
        assert histogram(tensor) is None
    assert histogram(torch.full((3, 2), 7.0, dtype=torch.bfloat16)) == [(6.993, 7.007, 6.0)]
    assert histogram(torch.zeros(5)) == [(-1e-3, 1e-3, 5.0)]
    both = histogram(torch.tensor([1 + 2j]))
    assert both is not None
    assert (both[0][0], both[-1][1], sum(count for _, _, count in both)) == (1.0, 2.0, 2.0)
    sparse = histogram(torch.tensor([0.0, 1.0, 2.0]).to_sparse())
    assert sparse is not None
    assert sum(count for _, _, count in sparse) == 2
