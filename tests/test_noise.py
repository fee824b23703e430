"""The noise scale against problems whose scale is known, and against a direct measurement on digits."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from trainer.recipes import digits

from trainer import Step, supervised
from trainer.diagnose.noise import NoiseScale, Scale
from trainer.optim import Manual


class Point(nn.Module):
    """½|w − x|² of each row: its gradient is w − x, so G = w − mean(x) and Σ is the rows' covariance."""

    def __init__(self, size: int, away: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((size,), away, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.w - x).square().sum(dim=1)


def measured(cuts: list[int], windows: int, away: float, every: int = 1, sigma: float = 2.0) -> tuple[Scale, float]:
    """The estimate, and the truth: tr Σ / |G|² = σ² / away²."""
    generator = torch.Generator().manual_seed(0)
    model = Point(50, away)
    step = Step(model, lambda m, x: m(x).mean(), Manual(model.parameters(), lr=0.0))
    noise = NoiseScale(step, every)
    step.after_backward.append(noise)
    for _ in range(windows):
        step([sigma * torch.randn(rows, 50, generator=generator, dtype=torch.float64) for rows in cuts])
    scale = noise.scale()
    assert scale is not None
    assert scale.windows == -(-windows // every)
    return scale, sigma**2 / away**2


@pytest.mark.parametrize(("cuts", "away"), [([8, 8, 8, 8], 0.5), ([16, 4, 12], 0.5), ([16, 16], 0.2), ([2, 30], 0.5)])
def test_a_known_scale_is_met_within_five_percent(cuts, away) -> None:
    scale, truth = measured(cuts, windows=400, away=away)
    assert scale.rows == pytest.approx(truth, rel=0.05)
    assert scale.low < truth < scale.high
    assert scale.high / scale.low < 1.3


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    hits = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        noise = NoiseScale(None, 1)
        for _ in range(60):  # |G|² = 1 and tr Σ = 100, each with its own scatter
            pair = torch.randn(2, generator=generator, dtype=torch.float64)
            noise._found.append((1.0 + 0.4 * pair[0].item(), 100.0 + 20.0 * pair[1].item()))
        scale = noise.scale()
        assert scale is not None
        hits.append(scale.low < 100.0 < scale.high)
    assert 0.9 <= sum(hits) / len(hits) <= 0.99


def test_a_run_that_goes_on_in_mid_window_comes_to_the_same_estimate() -> None:
    def made() -> tuple[Step, NoiseScale]:
        model = Point(50, 0.5)
        step = Step(model, lambda m, x: m(x).mean(), Manual(model.parameters(), lr=0.0))
        noise = NoiseScale(step, 1)
        step.after_backward.append(noise)
        return step, noise

    generator = torch.Generator().manual_seed(0)
    windows = [[torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(9)]
    whole, undisturbed = made()
    for window in windows:
        whole(window)
    first, noise = made()
    for window in windows[:4]:
        first(window)
    first.accumulate(windows[4][0], windows[4])
    second, went_on = made()
    second.load_state_dict(first.state_dict())
    went_on.load_state_dict(noise.state_dict())
    for window in windows[4:]:
        second(window)
    assert went_on.scale() == undisturbed.scale()
    assert went_on.scale().windows == len(windows)


def test_one_of_so_many_windows_is_measured() -> None:
    scale, truth = measured([8, 8], windows=90, away=0.5, every=3)
    assert scale.low < truth < scale.high


def test_on_digits_it_is_what_a_direct_measurement_gives() -> None:
    torch.manual_seed(0)
    images, labels = (tensor[:400] for tensor in digits.images().train)
    images = images.double()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).double()

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    of_rows = vmap(grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), images, labels)
    each = torch.cat([one.flatten(1) for one in of_rows.values()], dim=1).detach()
    truth = float(each.var(dim=0).sum() / each.mean(dim=0).square().sum())
    step = Step(model, supervised(nn.CrossEntropyLoss()), Manual(model.parameters(), lr=0.0))
    noise = NoiseScale(step, 1)
    step.after_backward.append(noise)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        chosen = torch.randint(len(images), (64,), generator=generator)
        step([(images[part], labels[part]) for part in chosen.split(16)])
    scale = noise.scale()
    assert scale is not None
    assert scale.low < truth < scale.high
    assert scale.high / scale.low < 2
    assert scale.rows == pytest.approx(truth, rel=0.2)


def test_what_tells_nothing_is_left_out() -> None:
    model = Point(3, 0.5)
    step = Step(model, lambda m, x: {"a": m(x).mean(), "b": m(x).sum()}, Manual(model.parameters(), lr=0.0))
    noise = NoiseScale(step, 1)
    step.after_backward.append(noise)
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(3):
        step([x, x])
    assert noise.scale() is None
    one = Step(model, lambda m, x: m(x).mean(), Manual(model.parameters(), lr=0.0))
    single = NoiseScale(one, 1)
    one.after_backward.append(single)
    for _ in range(3):
        one([x])
    assert single.scale() is None


def test_words() -> None:
    assert str(Scale(104.6, 90.2, 120.0, 40)) == "noise scale 105 rows (95 %: 90 to 120, from 40 windows)"
    assert "90 to any number" in str(Scale(104.6, 90.2, float("inf"), 40))
