"""The step's state: saved at every boundary between micro-batches, also inside a window, it goes on bit for bit."""

import copy
import io
import json

import pytest
import torch
from reference import differing, state_of
from torch import Tensor, nn

from trainer import CheckpointError, ConfigError, Step, Sum, supervised
from trainer.errors import ObjectiveError, Paused
from trainer.optim import cosine


class Net(nn.Module):
    """BatchNorm's statistics, dropout's draws, and a parameter that is used in the first window only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 2))
        self.seldom = nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.body(inputs)
        return outputs * self.seldom if inputs[0, 0] > 0 else outputs


def sums(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Sum]:
    """Two weights that nobody knows before: one term is held apart."""
    outputs = model(micro_batch[0])
    error = (outputs - micro_batch[1]).square()
    return {"error": Sum(error.sum(), error.numel()), "size": Sum(outputs.abs().sum(), len(outputs) + 1)}


def windows() -> list[list[tuple[Tensor, Tensor]]]:
    """Four windows, drawn anew each time, the second with a NaN; the same numbers in other tensors."""
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for index in range(4):
        window = []
        for size in (4, 2, 3):
            inputs = torch.randn(size, 3, generator=generator)
            inputs[0, 0] = inputs[0, 0].abs() if index == 0 else -inputs[0, 0].abs()
            window.append((inputs, torch.randn(size, 2, generator=generator)))
        drawn.append(window)
    drawn[1][1][1][0, 0] = float("nan")
    return drawn


class Run:
    def __init__(self, objective: object, zero_grad: str, whole: bool, seed: int, rate: float) -> None:
        self.model = Net(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9, fused=True)
        self.step = Step(self.model, objective, self.optimizer, schedule=cosine(20), zero_grad=zero_grad, clip_norm=1.0)
        self.whole = whole
        self.windows = windows()
        self.losses: list[str] = []

    def do(self, events: list[tuple[int, int]]) -> None:
        for window, place in events:
            drawn = self.windows[window]
            if place < len(drawn):
                self.step.accumulate(drawn[place], drawn if self.whole else None)
            else:
                self.losses.append(repr(self.step.finish()))

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        state = {
            "step": self.step.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step.load_state_dict(state["step"])
        torch.set_rng_state(state["rng"])

    def final(self) -> dict[str, Tensor]:
        grads = {f"grad.{n}": p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return state_of(self.model, self.optimizer) | grads


EVENTS = [(window, place) for window in range(4) for place in range(4)]  # the fourth place is finish()


@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
@pytest.mark.parametrize("objective", [supervised(nn.MSELoss()), sums])
@pytest.mark.parametrize("whole", [True, False])
def test_going_on_from_any_boundary_is_bit_equal(zero_grad: str, objective: object, whole: bool) -> None:
    """Each boundary's file goes on beyond the end of the next window, into the one after it where there is one."""
    straight = Run(objective, zero_grad, whole, seed=0, rate=0.1)
    files, states = [], []
    for event in EVENTS:
        files.append(straight.save())
        straight.do([event])
        states.append(straight.final())
    assert straight.step.clocks.as_dict()["steps"] == 3
    for boundary, file in enumerate(files):
        other = Run(objective, zero_grad, whole, seed=9, rate=7.0)  # right only if everything was truly loaded
        other.load(file)
        stop = min(boundary + 6, len(EVENTS))
        other.do(EVENTS[boundary:stop])
        assert differing(other.final(), states[stop - 1]) == [], boundary
        assert other.losses == straight.losses[boundary // 4 :][: len(other.losses)]
        assert other.losses
    assert other.step.clocks.as_dict() == straight.step.clocks.as_dict()


def test_a_call_goes_on_with_the_window_drawn_again() -> None:
    straight = Run(supervised(nn.MSELoss()), "set_to_none", True, seed=0, rate=0.1)
    straight.step(straight.windows[0])
    for done in range(4):
        first = Run(supervised(nn.MSELoss()), "set_to_none", True, seed=0, rate=0.1)
        first.do(EVENTS[:done])
        file = first.save()
        second = Run(supervised(nn.MSELoss()), "set_to_none", True, seed=9, rate=7.0)
        second.load(file)
        assert second.step(second.windows[0]).micro_batches == 3
        assert differing(second.final(), straight.final()) == []
    second.load(first.save())
    with pytest.raises(ConfigError, match="a window of 1 micro-batches was given while another is open with 3"):
        second.step(second.windows[0][:1])


def test_between_two_micro_batches_is_a_place_to_pause_and_the_window_is_then_drawn_again() -> None:
    def made() -> Run:
        return Run(supervised(nn.MSELoss()), "set_to_none", True, seed=0, rate=0.1)

    straight = made()
    asked: list[int] = []
    straight.step(straight.windows[0], between=lambda: asked.append(straight.step._open.micro_batches))
    assert asked == [1, 2]

    run = made()

    def pause() -> None:
        if run.step._open.micro_batches == 2 and not again:
            again.append(True)
            raise Paused

    again: list[bool] = []
    with pytest.raises(Paused):
        run.step(run.windows[0], between=pause)
    assert run.step.is_open
    report = run.step(list(run.windows[0]), between=pause)  # other objects: the same window, drawn again
    assert report.micro_batches == 3
    assert differing(run.final(), straight.final()) == []


def test_instruments_are_called_before_each_terms_backward_and_after_each_micro_batch() -> None:
    run = Run(sums, "set_to_none", True, seed=0, rate=0.1)
    called: list[tuple[str, int]] = []
    run.step.before_backward.append(lambda open_, term, seed: called.append((term.name, open_.micro_batches)))
    run.step.after_backward.append(lambda open_, roots: called.append(("after", open_.micro_batches)))
    run.step(run.windows[0])
    names = list(sums(run.model, run.windows[0][0]))
    assert called == [one for at in range(3) for one in (*((name, at) for name in names), ("after", at + 1))]


def test_no_instrument_is_called_for_a_term_that_depends_on_no_parameter() -> None:
    model = Net(0)
    step = Step(model, lambda model, inputs: inputs.square().mean(), torch.optim.SGD(model.parameters(), lr=0.1))
    called: list[str] = []
    step.before_backward.append(lambda open_, term, seed: called.append(term.name))
    with pytest.raises(ObjectiveError, match="without a graph"):
        step.accumulate(torch.ones(4, 3))
    assert called == []


def test_a_step_that_did_nothing_yet_is_saved_and_loaded() -> None:
    state = Run(sums, "never", False, seed=0, rate=0.1).step.state_dict()
    assert (state["open"], state["aside"]) == (None, {})
    other = Run(sums, "never", False, seed=0, rate=0.1)
    other.do(EVENTS[:2])
    other.step.load_state_dict(state)
    assert repr(other.step.state_dict()) == repr(state)


def test_saving_changes_nothing_and_shares_no_memory() -> None:
    run = Run(sums, "never", False, seed=0, rate=0.1)
    run.do(EVENTS[:6])
    state = run.step.state_dict()
    kept = copy.deepcopy(state)
    run.do(EVENTS[6:])
    for part in ("gradients", "aside"):
        assert differing(kept[part], state[part]) == []
    assert differing(kept["open"]["buffers"], state["open"]["buffers"]) == []
    assert "body.0.weight" in kept["open"]["sums"]["terms"]["size"]["apart"]
    assert "body.0.weight" in kept["aside"]


def test_the_numbers_go_through_json() -> None:
    run = Run(supervised(nn.MSELoss()), "set_to_none", False, seed=0, rate=0.1)
    run.do(EVENTS[:2])
    state = run.step.state_dict()
    numbers = {name: value for name, value in state.items() if name not in ("gradients", "aside", "open")}
    numbers["sums"] = state["open"]["sums"]
    assert json.loads(json.dumps(numbers)) == numbers


def test_between_windows_nothing_large_is_saved_unless_it_is_needed() -> None:
    sizes = {}
    for zero_grad in ("set_to_none", "zeros", "never"):
        run = Run(supervised(nn.MSELoss()), zero_grad, True, seed=0, rate=0.1)
        run.do(EVENTS[:4])
        gradients = run.step.state_dict()["gradients"]
        sizes[zero_grad] = {type(gradient) for gradient in gradients.values()}
    assert sizes == {"set_to_none": set(), "zeros": {type(None)}, "never": {Tensor}}


def test_a_gradient_that_does_not_fit_is_refused_before_anything_changed() -> None:
    run = Run(supervised(nn.MSELoss()), "set_to_none", True, seed=0, rate=0.1)
    run.do(EVENTS[:2])
    state = run.step.state_dict()
    clocks = run.step.clocks.as_dict()
    wrong = copy.deepcopy(state)
    wrong["gradients"]["body.9.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match="gradient of 'body.9.weight' has no parameter here: did you mean"):
        run.step.load_state_dict(wrong)
    wrong = copy.deepcopy(state)
    wrong["gradients"]["seldom"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"'seldom' has shape \(3,\), the parameter here \(2,\)"):
        run.step.load_state_dict(wrong)
    assert run.step.clocks.as_dict() == clocks
    assert run.step._open is not None


def test_the_guess_is_saved_so_that_hooks_see_the_same() -> None:
    finals = []
    for resumed in (False, True):
        model = nn.Linear(2, 1)
        nn.init.ones_(model.weight)
        model.weight.register_hook(lambda gradient: gradient.clamp(-0.25, 0.25))
        step = Step(model, supervised(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=0.0))
        for window in range(2):
            for _ in range(4):
                step.accumulate((torch.ones(4, 2), torch.zeros(4, 1)))
            step.finish()
            if resumed and window == 0:
                state = step.state_dict()
                step = Step(model, step.objective, step.optimizers)
                step.load_state_dict(state)
        finals.append(model.weight.grad.tolist())
    assert finals[0] == finals[1] == [[1.0, 1.0]]  # four times a quarter: each quarter was seen as it is
