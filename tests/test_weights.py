"""Weights: each torch loss is held against what it divides by, by uneven micro-batches against the one big batch."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import farthest
from runs import taken
from torch import Tensor, nn
from torch.nn import functional

from trainer import ConfigError, ObjectiveError, Step, supervised
from trainer.gradient.weights import counter_of, first_tensor, host_number, power_of_two
from trainer.optim import Manual

ROWS, CLASSES = 9, 4


def draw(kind: str) -> Tensor:
    """Targets of a kind for outputs of shape (9, 4), or (9, 4, 3) where they are spatial."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    index = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    if kind == "index":
        return index
    if kind == "ignored":
        return index.where(torch.arange(ROWS) % 3 != 0, -100)
    if kind == "spatial":
        spatial = torch.randint(0, CLASSES, (ROWS, 3), generator=generator)
        return spatial.where(torch.rand(ROWS, 3, generator=generator) < 0.7, -100)
    if kind == "multilabel":
        return torch.stack([torch.randperm(CLASSES, generator=generator) for _ in range(ROWS)])
    return {
        "normal": normal,
        "unit": normal.sigmoid(),
        "signs": normal.sign(),
        "probabilities": normal.softmax(1),
        "counts": normal.abs().round(),
        "zero_one": (normal > 0).double(),
    }[kind]


WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
CASES = [
    (nn.MSELoss, functional.mse_loss, {}, "normal", None),
    (nn.L1Loss, functional.l1_loss, {}, "normal", None),
    (nn.SmoothL1Loss, functional.smooth_l1_loss, {"beta": 0.3}, "normal", None),
    (nn.HuberLoss, functional.huber_loss, {"delta": 0.3}, "normal", None),
    (nn.BCELoss, functional.binary_cross_entropy, {}, "unit", torch.sigmoid),
    (nn.BCEWithLogitsLoss, functional.binary_cross_entropy_with_logits, {"pos_weight": WEIGHTS}, "zero_one", None),
    (nn.SoftMarginLoss, functional.soft_margin_loss, {}, "signs", None),
    (nn.PoissonNLLLoss, functional.poisson_nll_loss, {"full": False}, "counts", None),
    (nn.HingeEmbeddingLoss, functional.hinge_embedding_loss, {"margin": 0.7}, "signs", None),
    (nn.KLDivLoss, functional.kl_div, {}, "probabilities", functools.partial(torch.log_softmax, dim=1)),
    (nn.MultiMarginLoss, functional.multi_margin_loss, {"weight": WEIGHTS}, "index", None),
    (nn.MultiLabelMarginLoss, functional.multilabel_margin_loss, {}, "multilabel", None),
    (nn.MultiLabelSoftMarginLoss, functional.multilabel_soft_margin_loss, {"weight": WEIGHTS}, "zero_one", None),
    (nn.CrossEntropyLoss, functional.cross_entropy, {}, "index", None),
    (nn.CrossEntropyLoss, functional.cross_entropy, {}, "ignored", None),
    (nn.CrossEntropyLoss, functional.cross_entropy, {"ignore_index": 2}, "index", None),
    (nn.CrossEntropyLoss, functional.cross_entropy, {"weight": WEIGHTS}, "ignored", None),
    (nn.CrossEntropyLoss, functional.cross_entropy, {"label_smoothing": 0.2}, "ignored", None),
    (nn.CrossEntropyLoss, functional.cross_entropy, {"label_smoothing": 0.2, "weight": WEIGHTS}, "ignored", None),
    (nn.CrossEntropyLoss, functional.cross_entropy, {"weight": WEIGHTS, "label_smoothing": 0.1}, "probabilities", None),
    (nn.CrossEntropyLoss, functional.cross_entropy, {"weight": WEIGHTS}, "spatial", None),
    (nn.NLLLoss, functional.nll_loss, {}, "ignored", functools.partial(torch.log_softmax, dim=1)),
    (nn.NLLLoss, functional.nll_loss, {"weight": WEIGHTS}, "spatial", functools.partial(torch.log_softmax, dim=1)),
]


class Net(nn.Module):
    def __init__(self, spatial: bool, last: object) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(5, CLASSES * (3 if spatial else 1), generator=generator).double())
        self.spatial = spatial
        self.last = last

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = inputs @ self.weight
        outputs = outputs.reshape(len(inputs), CLASSES, 3) if self.spatial else outputs
        return self.last(outputs) if self.last is not None else outputs


def gradient(loss: object, targets: Tensor, sizes: list[int], last: object, whole: bool = True) -> dict[str, Tensor]:
    """The gradient of a window cut so."""
    net = Net(loss_is_spatial(targets), last)
    inputs = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(5)).double()
    window = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    step = Step(net, supervised(loss), Manual(net.parameters(), lr=0.0), clip_value=1e9)
    taken(step, window, whole)
    return {"weight": net.weight.grad}


def loss_is_spatial(targets: Tensor) -> bool:
    return targets.dim() == 2 and targets.shape[1] == 3


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides:UserWarning")  # torch has plans for the mean of kl_div
@pytest.mark.parametrize(("module", "function", "options", "kind", "last"), CASES)
def test_uneven_micro_batches_are_the_one_big_batch(
    module: type[nn.Module], function: object, options: dict[str, object], kind: str, last: object
) -> None:
    targets = draw(kind)
    inputs = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(5)).double()
    net = Net(loss_is_spatial(targets), last)
    module(**options)(net(inputs), targets).backward()
    big = {"weight": net.weight.grad}
    forms = [module(**options), functools.partial(function, **options)]
    if not options:
        forms.append(function)
    for form in forms:
        for whole in (True, False):
            assert farthest(gradient(form, targets, [4, 1, 2, 2], last, whole), big) <= 1e-12, (form, whole)
    # As a total it has the same weight, so the same mean comes out of it.
    for reduction in ("sum", "none"):
        total = module(**options, reduction=reduction)
        assert farthest(gradient(total, targets, [3, 6], last), big) <= 1e-12, reduction


def test_kl_batchmean_divides_by_rows() -> None:
    targets, last = draw("probabilities"), functools.partial(torch.log_softmax, dim=1)
    net = Net(False, last)
    inputs = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(5)).double()
    nn.KLDivLoss(reduction="batchmean")(net(inputs), targets).backward()
    for form in (nn.KLDivLoss(reduction="batchmean"), functools.partial(functional.kl_div, reduction="batchmean")):
        assert farthest(gradient(form, targets, [4, 1, 4], last), {"weight": net.weight.grad}) <= 1e-12


def test_a_micro_batch_that_is_ignored_whole_contributes_nothing() -> None:
    targets = draw("index").index_fill(0, torch.arange(3, 6), -100)
    assert math.isnan(functional.cross_entropy(torch.ones(3, 4), targets[3:6]))  # torch's own mean is 0 / 0
    for form in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        for whole in (True, False):
            cut_so = gradient(form, targets, [3, 3, 3], None, whole)
            assert farthest(cut_so, gradient(form, targets, [9], None)) <= 1e-12


def test_what_is_not_torchs_own_counts_rows() -> None:
    class Mine(nn.CrossEntropyLoss):
        pass

    targets = torch.tensor([1, -100, 2])
    assert counter_of(nn.CrossEntropyLoss()).count(targets, None) == 2
    for unknown in (Mine(), lambda outputs, targets: outputs.mean(), functools.partial(Mine())):
        counter = counter_of(unknown)
        assert counter.count(targets, None) == 3
        assert "torch does not have" in counter.what


def test_the_total_of_a_mean_keeps_the_options_whatever_the_form() -> None:
    """Where no read is free the total stands for the mean; it must be the same loss."""
    outputs = torch.randn(ROWS, CLASSES, dtype=torch.float64)  # no log-probabilities: nll and cross-entropy differ
    for module, function, options, kind, _ in CASES:
        if function not in (functional.cross_entropy, functional.nll_loss) or kind == "spatial":
            continue
        for form in (module(**options), functools.partial(function, **options)):
            counter = counter_of(form)
            mean = counter.total(outputs, draw(kind)) / counter.count(draw(kind), outputs)
            torch.testing.assert_close(mean, form(outputs, draw(kind)), rtol=1e-12, atol=0, msg=repr(form))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="'man' is not known"):
        counter_of(functools.partial(functional.mse_loss, reduction="man"))
    with pytest.raises(ConfigError, match="size_average.*reduction="):
        counter_of(functools.partial(functional.mse_loss, size_average=False))
    with pytest.raises(ObjectiveError, match="holds no tensor to count rows by: pass count_rows="):
        first_tensor({"text": ["a"]})


def test_first_tensor_looks_into_nests() -> None:
    assert first_tensor([{"a": 3, "b": (torch.ones(5, 2),)}]).shape == (5, 2)


@given(st.floats(1e-30, 1e30))
def test_the_power_of_two_is_within_root_two(value: float) -> None:
    power = power_of_two(value)
    assert math.frexp(power)[0] == 0.5
    assert 1 / math.sqrt(2) - 1e-15 <= value / power <= math.sqrt(2) + 1e-15
    assert float(power_of_two(torch.tensor(value, dtype=torch.float64))) in (power, 2 * power, power / 2)


def test_a_power_of_two_stays_and_nothing_becomes_one() -> None:
    assert [power_of_two(value) for value in (0.25, 1.0, 64.0, 0.0)] == [0.25, 1.0, 64.0, 1.0]
    assert power_of_two(torch.tensor(0.0)) == 1.0
    assert power_of_two(torch.tensor(48.0)) in (32.0, 64.0)


def test_a_weight_is_a_float_where_a_read_is_free_and_exact_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_number(torch.tensor(3)) == 3.0
    assert type(host_number(torch.tensor(3))) is float
    monkeypatch.setattr("trainer.gradient.weights.FREE_READS", set())
    kept = host_number(torch.tensor(2**24 + 1))
    assert isinstance(kept, Tensor)
    assert kept.dtype is torch.float64
    assert kept == 2**24 + 1
