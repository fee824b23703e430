"""The open window: backward starts from the true divisor where it is known, near it elsewhere."""

import math

import pytest
import torch
from reference import cut, farthest, mlp, rows
from runs import taken
from torch import Tensor, nn

from trainer import ConfigError, Step, Sum, supervised
from trainer.gradient.objective import Term
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.opening import Summed
from trainer.gradient.seeds import _SEEDS
from trainer.gradient.term_sum import TermSum
from trainer.gradient.weigher import Weigher
from trainer.optim import Manual
from trainer.settings import GradientSettings

SIZES = [4, 1, 5, 2]


def watched(
    objective: object, windows: list[list[object]], whole: bool
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """For each window: the sum of what tensor hooks on the parameters saw, and the final gradient."""
    model = mlp()
    step = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.0))
    seen: dict[str, Tensor] = {}

    def note(name: str, gradient: Tensor) -> None:
        seen[name] = seen.get(name, torch.zeros_like(gradient)) + gradient

    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: note(name, gradient))
    sums, finals = [], []
    for window in windows:
        seen.clear()
        taken(step, window, whole)
        sums.append(dict(seen))
        finals.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    return sums, finals


def in_sum(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Sum:
    """A weight that nobody can know before: it comes out of the forward."""
    return Sum((model(micro_batch[0]) - micro_batch[1]).square().sum(), len(micro_batch[0]))


def test_hooks_see_the_true_gradient_where_the_window_is_known() -> None:
    sums, finals = watched(supervised(nn.MSELoss()), [cut(rows(12), SIZES)] * 2, whole=True)
    for seen, final in zip(sums, finals, strict=True):
        assert farthest(seen, final) <= 1e-14


@pytest.mark.parametrize(("objective", "whole"), [(supervised(nn.MSELoss()), False), (in_sum, False), (in_sum, True)])
def test_hooks_see_it_within_root_two_once_the_guess_is_good(objective: object, whole: bool) -> None:
    equal = cut(rows(12), [3, 3, 3, 3])
    sums, finals = watched(objective, [equal] * 3, whole)
    ratios = []
    for seen, final in list(zip(sums, finals, strict=True))[1:]:
        name = "0.weight"
        ratio = float((seen[name] / final[name]).mean())
        assert farthest(seen, {n: ratio * g for n, g in final.items()}) <= 1e-12  # one number for all of them
        ratios.append(ratio)
    assert all(1 / math.sqrt(2) <= ratio <= math.sqrt(2) for ratio in ratios)


@pytest.mark.parametrize("objective", [supervised(nn.MSELoss()), in_sum])
def test_a_clamping_hook_clamps_the_true_gradient(objective: object) -> None:
    """Summed raw and divided at the end, this hook would cut at another place for every length of the window."""
    limit = 0.02
    found = []
    for k in (1, 3):
        model = mlp()
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-limit, limit))
        data = rows(4)
        window = [data] * k  # the same rows k times: the same mean
        step = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.0), reduction="micro_batches")
        step(window)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert max(float(gradient.abs().max()) for gradient in found[-1].values()) <= k * limit
    plain = mlp()
    outcome = objective(plain, rows(4))
    (outcome.total / outcome.weight if isinstance(outcome, Sum) else outcome).backward()
    expected = {name: parameter.grad.clamp(-limit, limit) for name, parameter in plain.named_parameters()}
    assert farthest(found[0], expected) <= 1e-12
    thirds = {name: 3 * (parameter.grad / 3).clamp(-limit, limit) for name, parameter in plain.named_parameters()}
    assert farthest(found[1], thirds) <= 1e-12


def test_a_custom_function_is_given_the_true_gradient() -> None:
    class Watched(torch.autograd.Function):
        seen: list[Tensor] = []

        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            Watched.seen.append(gradient.clone())
            return gradient

    def objective(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(Watched.apply(model(micro_batch[0])), micro_batch[1])

    class Told:
        def __call__(self, model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
            return objective(model, micro_batch)

        def weight(self, micro_batch: tuple[Tensor, Tensor]) -> int:
            return micro_batch[1].numel()

    model, data = mlp(), rows(12)
    objective(model, data).backward()
    Step(model, Told(), Manual(model.parameters(), lr=0.0))(cut(data, SIZES))
    whole, *parts = Watched.seen
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-14, atol=0)


def test_a_backward_that_writes_into_what_it_is_given_spoils_no_later_step() -> None:
    class Doubling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient.mul_(2)

    def objective(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
        return Doubling.apply(nn.functional.mse_loss(model(micro_batch[0]), micro_batch[1]))

    _SEEDS.clear()
    data = rows(4)
    found = []
    for _ in range(3):
        model = mlp()
        step = Step(model, objective, Manual(model.parameters(), lr=0.0))
        step([data])
        found.append(model[0].weight.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class Over:
    """Stands for what other ranks tell: every term weighs 40 over all of them, 5 in each micro-batch of this one."""

    def __init__(self, tells: bool = True) -> None:
        self.tells = tells

    def divisor(self, name: str, weight: object, means: bool) -> tuple[float, bool]:
        return 40.0, means

    def here(self, name: str) -> list[float] | None:
        return [5.0, 5.0] if self.tells else None

    def state_dict(self) -> dict[str, object]:
        return {"tells": self.tells}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.tells = state["tells"]


def window(
    reduction: str = "mean", drawn: list[Tensor] | None = None, expected: dict[str, float] | None = None, **more: object
) -> OpenWindow:
    weigher = Weigher(more.pop("objective", lambda m, b: b))
    return OpenWindow(GradientSettings(reduction=reduction), weigher, drawn, expected or {}, **more)


def seeds(open_: OpenWindow, micro_batches: list[Tensor]) -> list[float]:
    found = []
    for micro_batch in micro_batches:
        found.append(open_.seed(Term("loss", torch.ones(())), micro_batch, alone=True).item())
        open_.count(micro_batch)
    return found


def test_seeds_and_leftovers() -> None:
    drawn = [torch.ones(size, 2) for size in (3, 3, 2)]
    assert seeds(window(drawn=drawn), drawn) == [3 / 8, 3 / 8, 2 / 8]
    assert seeds(window("sum", drawn), drawn) == [3, 3, 2]
    assert seeds(window("micro_batches", drawn), drawn) == [pytest.approx(1 / 3)] * 3
    unknown = window()
    assert seeds(unknown, drawn) == [3 / 4, 3 / 4, 2 / 4]  # the power of two nearest to 3
    assert unknown.leftover() == 8 / 4
    told = window(expected={"loss": 9.0})
    assert seeds(told, drawn) == [3 / 8, 3 / 8, 2 / 8]
    assert told.leftover() == 1.0
    assert (told.micro_batches, told.rows, told.denominators()) == (3, 8, {"loss": 8.0})


def test_a_micro_batch_of_weight_zero_has_no_seed() -> None:
    open_ = window()
    assert open_.seed(Term("loss", torch.tensor(math.nan)), torch.ones(0, 2), alone=True) is None
    open_.count(torch.ones(0, 2))
    assert open_.weighs_nothing()
    assert open_.losses() == []
    assert open_.leftover() == 1.0
    assert math.isnan(open_.means()["loss"])


def test_the_seed_has_the_shape_and_dtype_of_the_value() -> None:
    for value in (torch.ones(1, 1), torch.ones((), dtype=torch.bfloat16)):
        seed = window().seed(Term("loss", value), torch.ones(4, 2), alone=True)
        assert (seed.shape, seed.dtype) == (value.shape, value.dtype)
    vector = torch.tensor([1.0, 0.5])
    seed = window(expected={"loss": 4.0}).seed(Term("loss", torch.ones(2), 1.0, vector), torch.ones(4, 2), alone=True)
    assert torch.equal(seed, vector / 4)


def test_many_different_seeds_do_not_pile_up() -> None:
    for rows_ in range(1, 600):
        window("sum").seed(Term("loss", torch.ones(())), torch.ones(rows_, 1), alone=True)
    assert len(_SEEDS) <= 256


def test_join_takes_the_same_window_and_refuses_another() -> None:
    drawn = [torch.ones(3, 2), torch.ones(3, 2)]
    open_ = window()
    seeds(open_, drawn)
    with pytest.raises(ConfigError, match="a window of 1 micro-batches was given while another is open with 2"):
        open_.join(drawn[:1])
    open_.join(drawn)
    open_.join(drawn)
    open_.join(None)
    with pytest.raises(ConfigError, match="while another is open"):
        open_.join(list(drawn))


def over(drawn: list[Tensor] | None, declares: bool = True, tells: bool = True) -> OpenWindow:
    weigher = Weigher(Declares() if declares else (lambda m, b: b))
    return OpenWindow(GradientSettings(), weigher, drawn, {}, opening=Over(tells))


class Declares:
    def __call__(self, model: object, micro_batch: Tensor) -> Tensor:
        return micro_batch

    def weight(self, micro_batch: Tensor) -> float:
        return 7.0


def test_with_other_ranks_the_divisor_and_the_weights_are_what_they_told() -> None:
    drawn = [torch.ones(3, 2), torch.ones(2, 2)]
    open_ = over(drawn)
    assert seeds(open_, drawn) == [5 / 40, 5 / 40]
    assert open_.terms["loss"].exact
    assert seeds(over(drawn, tells=False), drawn) == pytest.approx([7 / 40] * 2)
    # A Sum comes out of the forward: its divisor is exact only where the objective told its weight before.
    for declares in (True, False):
        open_ = over(drawn, declares)
        open_.seed(Term("loss", torch.ones(()), 2.0), drawn[0], alone=True)
        assert open_.terms["loss"].exact is declares
    # What the ranks came to counts from then on.
    open_ = over(drawn)
    seeds(open_, drawn)
    open_.summed = Summed((9, 90, 900), leftover=3.0)
    open_.terms["loss"].total = 100.0
    assert (open_.leftover(), open_.size()) == (3.0, (9, 90, 900))
    assert open_.means() == {"loss": 100 / 10}
    open_.terms["loss"].weight = 0.0
    assert math.isnan(open_.means()["loss"])


def test_a_micro_batch_that_is_none_of_the_window_is_weighed_by_itself() -> None:
    drawn = [torch.ones(3, 2), torch.ones(2, 2)]
    open_ = window(drawn=drawn)
    assert open_.seed(Term("loss", torch.ones(())), torch.ones(4, 2), alone=True).item() == pytest.approx(4 / 5)
    assert seeds(window(drawn=drawn[:1]), [drawn[0], torch.ones(6, 2)]) == [3 / 3, 6 / 3]


def test_the_divisor_of_a_sum_whose_weight_nobody_told() -> None:
    def divisor(length: int, weight: float, expected: dict[str, float]) -> tuple[object, bool]:
        open_ = window(drawn=[torch.ones(3, 2)] * length if length else None, expected=expected)
        open_.seed(Term("loss", torch.ones(()), weight), torch.ones(3, 2), alone=True)
        return open_.terms["loss"].divisor, open_.terms["loss"].exact

    assert divisor(1, 3.0, {"loss": 100.0}) == (3.0, True)  # alone in its window it is the whole weight
    assert divisor(4, 3.0, {"loss": 100.0}) == (16.0, False)  # as if all were like this one: 12
    assert divisor(0, 3.0, {"loss": 100.0}) == (128.0, False)  # as the last window was


def test_terms_held_apart_and_weights_that_lie_on_a_device() -> None:
    open_ = window()
    assert open_.held_apart() == []
    open_.terms = {"a": TermSum(1.0, True, "a", 0.0), "b": TermSum(1.0, True, "b", 0.0, apart={"w": torch.ones(2)})}
    open_.settle()
    assert [gradient.tolist() for gradient in open_.held_apart()] == [[1.0, 1.0]]
    assert [divisor for _, divisor in open_.apart()] == [1.0]
    assert open_.weighs_nothing()
    cpu = torch.device("cpu")
    zero, three = torch.zeros(()), torch.tensor(3.0)
    for first, second, nothing, flag in (
        (0.0, 0.0, True, None),  # the host knows
        (0.0, zero, False, 1.0),
        (2.0, zero, False, None),
        (0.0, three, False, 0.0),
        (three, zero, False, 0.0),
        (zero, zero, False, 1.0),
    ):
        open_.terms["a"].weight, open_.terms["b"].weight = first, second
        open_.settle()
        found = open_.weighs_nothing_on(cpu)
        assert (open_.weighs_nothing(), None if found is None else found.item()) == (nothing, flag), (first, second)
    # A weight of nothing on a device leaves nothing to divide by; another is divided by.
    open_.terms["a"].weight = zero
    assert float(open_.leftover_of(open_.terms["a"])) == 1.0
    open_.terms["a"].weight, open_.terms["a"].divisor = three, 2.0
    assert float(open_.leftover_of(open_.terms["a"])) == 1.5


def test_a_window_is_restored_whole() -> None:
    open_ = window()
    open_.rows, open_.tokens, open_.micro_batches = 5, 70, 2
    open_.terms = {"a": TermSum(2.0, False, "a", 3.0, [(0, math.nan, 1.0), (1, 2.0, 1.0)], apart={"w": torch.ones(2)})}
    other = window()
    other.load_state_dict(open_.state_dict())
    assert (other.rows, other.tokens, other.micro_batches, other.entered) == (5, 70, 2, 2)
    assert not other.losses_are_finite, "its gradient may well be"
    assert not other.weighs_nothing()
    assert len(other.held_apart()) == 1
    assert repr(other.state_dict()) == repr(open_.state_dict())


def test_a_micro_batch_that_never_ended_is_refused_by_the_next_and_by_the_end() -> None:
    open_ = window()
    open_.enter()
    open_.count(torch.ones(3, 2))
    open_.check_whole()
    open_.enter()
    for goes_on in (open_.enter, open_.check_whole):
        with pytest.raises(ConfigError, match="micro-batch 2 of this window raised"):
            goes_on()


def test_a_coefficient_of_a_term_that_is_not_there_is_refused() -> None:
    settings = GradientSettings(coefficients={"lost": 0.5})
    open_ = OpenWindow(settings, Weigher(lambda m, b: b), None, {})
    open_.seed(Term("loss", torch.ones(())), torch.ones(3, 2), alone=True)
    with pytest.raises(ConfigError, match="coefficients names 'lost', which the objective does not return"):
        open_.check_coefficients()
    open_.seed(Term("lost", torch.ones(())), torch.ones(3, 2), alone=False)
    open_.check_coefficients()


def test_a_closed_window_holds_no_data_and_no_gradients() -> None:
    drawn = [torch.ones(3, 2)]
    open_ = window(drawn=drawn)
    seeds(open_, drawn)
    open_.terms["late"] = TermSum(1.0, True, "late", 1.0, apart={"w": torch.ones(2)})
    open_.settle()
    open_.close()
    assert open_.drawn is None
    assert [sums.apart for sums in open_.terms.values()] == [None, None]


class Tokens:
    def __call__(self, model: object, micro_batch: Tensor) -> Tensor:
        return micro_batch

    def tokens(self, micro_batch: Tensor) -> int:
        return 7 * len(micro_batch)


def test_tokens_are_counted_where_the_objective_tells_them() -> None:
    for objective, tokens in ((Tokens(), 35), (lambda m, b: b, 0)):
        open_ = window(objective=objective)
        seeds(open_, [torch.ones(3, 2), torch.ones(2, 2)])
        assert open_.size() == (2, 5, tokens)


def test_a_sum_over_ranks_has_no_divisor() -> None:
    drawn = [torch.ones(3, 2), torch.ones(2, 2)]
    assert seeds(window("sum", drawn, opening=Over()), drawn) == [5.0, 5.0]


def test_the_loss_scale_is_in_every_seed_and_in_what_is_held_apart() -> None:
    open_ = window(loss_scale=8.0)
    seed = open_.seed(Term("loss", torch.ones(()), 4.0), torch.ones(4, 2), alone=True)
    assert seed.item() == 8 / 4
    open_.terms["late"] = TermSum(2.0, False, "late", 6.0, apart={"w": torch.ones(2)})
    open_.settle()
    assert [divisor for _, divisor in open_.apart()] == [6 / 2 * 8]


def test_a_window_whose_only_term_is_held_apart_leaves_nothing_together() -> None:
    open_ = window()
    open_.terms = {"late": TermSum(2.0, False, "late", 6.0, apart={"w": torch.ones(2)})}
    open_.settle()
    assert open_.leftover() == 1.0


def test_only_a_denominator_that_the_host_knows_and_that_is_one_is_the_next_guess() -> None:
    open_ = window()
    open_.terms = {
        "known": TermSum(1.0, True, "known", 3.0),
        "nothing": TermSum(1.0, True, "nothing", 0.0),
        "on a device": TermSum(1.0, True, "on a device", torch.tensor(3.0)),
    }
    assert open_.denominators() == {"known": 3.0}


def test_what_is_left_is_not_read_from_the_device_that_has_the_weight() -> None:
    open_ = window()
    sums = TermSum(2.0, False, "loss", torch.zeros((), device="meta"))  # whose numbers cannot be read
    assert open_.leftover_of(sums).device.type == "meta"


def apart(open_: OpenWindow, weights: dict[str, float | None]) -> list[str]:
    """Which of these terms are held apart after one micro-batch; None is the weight of a mean."""
    for name, weight in weights.items():
        open_.seed(Term(name, torch.ones(()), weight), torch.ones(3, 2), alone=False)
    return [name for name, sums in open_.terms.items() if sums.apart is not None]


class Names(Declares):
    def weight(self, micro_batch: Tensor) -> dict[str, float]:
        return {"a": 3.0, "b": 5.0}


def test_terms_are_together_where_one_leftover_serves_them_all() -> None:
    two = [torch.ones(3, 2), torch.ones(3, 2)]
    # All means of one micro-batch count the same, unless the objective names them, and a window is as long for each.
    assert apart(window(expected={"b": 100.0}), {"a": None, "b": None}) == []
    assert apart(window(objective=Names()), {"a": None, "b": None}) == ["a", "b"]
    assert apart(window("micro_batches", expected={"b": 100.0}), {"a": 3.0, "b": 5.0}) == []
    assert apart(window("micro_batches"), {"a": None, "b": 5.0}) == []
    # A weight that comes out of the forward is every term's own.
    assert apart(window(), {"a": 3.0, "b": 5.0}) == ["a", "b"]
    assert apart(window(), {"a": None, "b": 5.0}) == ["b"]
    # Exact divisors leave nothing over; a guess beside them would.
    assert apart(window(drawn=two), {"a": None, "b": None}) == []
    assert apart(window(drawn=two), {"a": None, "b": 5.0}) == ["b"]
    together = window(expected={"a": 4.0, "b": 100.0})
    apart(together, {"a": None, "b": None})
    assert [sums.divisor for sums in together.terms.values()] == [4.0, 4.0]


def test_a_window_of_unknown_length_is_guessed_from_the_last_and_else_as_one_micro_batch() -> None:
    three = [torch.ones(3, 2)] * 3
    assert seeds(window("micro_batches", expected={"loss": 4.0}), three) == [1 / 4] * 3
    first = window("micro_batches")
    assert seeds(first, three) == [1.0] * 3
    assert first.leftover() == 3.0


def test_what_is_known_of_other_ranks_is_restored_where_both_have_them() -> None:
    saved = window(opening=Over(tells=False)).state_dict()
    restored = window(opening=Over())
    restored.load_state_dict(saved)
    assert restored.opening.tells is False
    alone = window()
    alone.load_state_dict(saved)  # its other ranks are gone
    assert alone.opening is None
    restored.load_state_dict(alone.state_dict())
    assert restored.opening.tells is False
