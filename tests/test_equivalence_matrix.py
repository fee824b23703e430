"""Every combination of the toggles against the same steps written by hand (`by_hand`, `matrix_cases`).

In float64 the gradient and the parameters may be 1e-12 of their norm apart. In the other precisions the bound is four
times what rounding alone does: the error of the same rows as one batch in that precision, by plain autograd, at least
that precision's unit roundoff.
"""

import functools
import math

import matrix_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_cases import ALL, AXES, Case, Found
from ranks import over_ranks
from torch import nn

from trainer import Step, supervised

FOUND: dict[Case, Found] = {}


@functools.cache
def _together(accumulation: int, precision: str) -> dict[Case, list[Found]]:
    """Cases of two ranks, sent to them together."""
    cases = [case for case in ALL if case[:1] + case[3:4] + case[6:] == (accumulation, precision, 2)]
    return dict(zip(cases, zip(*over_ranks(matrix_cases.run_on_rank, cases), strict=True), strict=True))


def on_two_ranks(case: Case) -> Found:
    """The first rank's findings; both have the same parameters, bit for bit."""
    first, second = _together(case.accumulation, case.precision)[case]
    return first if first.bits == second.bits else first._replace(wrong="the ranks' parameters differ")


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_combination_takes_the_steps_by_hand(case):
    FOUND[case] = found = matrix_cases.run(case) if case.ranks == 1 else on_two_ranks(case)
    assert not found.wrong
    assert found.gradient_share <= 1.0, found
    assert found.parameters_share <= 1.0, found


def test_the_matrix_is_whole(request, capsys):
    assert len(ALL) == len(set(ALL)) == math.prod(map(len, AXES.values())) == 2160
    selected = {
        one.callspec.params["case"] for one in request.session.items if "case" in getattr(one, "fixturenames", ())
    }
    assert selected <= FOUND.keys()
    with capsys.disabled():
        print(f"\n{len(FOUND)} of {len(ALL)} combinations ran; none is left out, as each means something.")
        for precision in AXES["precision"]:
            errors = [found for case, found in FOUND.items() if case.precision == precision]
            if errors:
                gradient, parameters, *shares = (max(column) for column in list(zip(*errors, strict=True))[:4])
                print(
                    f"  {precision}: {len(errors)} cases, largest error of the gradient {gradient:.1e}, of the "
                    f"parameters {parameters:.1e}; of what is allowed {shares[0]:.2g} and {shares[1]:.2g}"
                )


# Any cut of the same rows.

ROWS = 12
INPUTS = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = torch.randint(0, 3, (ROWS, 1), generator=torch.Generator().manual_seed(2))
TARGETS[3:5] = -100  # a micro-batch of these rows alone weighs nothing


def gradient_of(sizes, whole: bool, objective) -> torch.Tensor:
    model = matrix_cases.net(torch.float64)
    step = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.0))
    pieces = list(zip(INPUTS.unsqueeze(1).split(sizes), TARGETS.split(sizes), strict=True))
    if whole:
        step(pieces)
    else:
        for piece in pieces:
            step.accumulate(piece)
        step.finish()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


class Tokens:
    """Cross-entropy over targets of shape (rows, 1), as a mean with its weight."""

    def __init__(self) -> None:
        self.inner = supervised(nn.CrossEntropyLoss())

    def __call__(self, model, micro_batch):
        inputs, targets = micro_batch
        return self.inner(model, (inputs.flatten(0, 1), targets.flatten()))

    def weight(self, micro_batch):
        return (micro_batch[1] != -100).sum()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, ROWS), min_size=1, max_size=ROWS),
    st.booleans(),
    st.sampled_from([Tokens(), matrix_cases.over_tokens]),
)
def test_any_cut_of_the_same_rows_gives_the_same_gradient(sizes, whole, objective):
    cut, left = [], ROWS
    for size in sizes:
        if left:
            cut.append(min(size, left))
            left -= cut[-1]
    if left:
        cut.append(left)
    true = gradient_of([ROWS], True, objective)
    assert float((gradient_of(cut, whole, objective) - true).norm() / true.norm()) < 1e-12
