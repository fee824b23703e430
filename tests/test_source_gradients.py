"""Each source's gradient against that of its rows alone, and the run unmoved."""

import pytest
import torch
from torch import Tensor, nn

from trainer import ConfigError, Step, Sum, supervised
from trainer.diagnose.sources import SourceGradients
from trainer.gradient.report import Report
from trainer.optim import Manual, adamw

Batch = dict[str, object]


def model(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))


def batch(names: object, seed: int) -> Batch:
    rows = len(names) if isinstance(names, list) else 6
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": x.sum(dim=1), "source": names}


WINDOW = [batch(["web", "book", "web", "web", "book"], 1), batch("book", 2), batch(["code"] * 3 + ["web"] * 4, 3)]


def objective(net: nn.Module, one: Batch) -> dict[str, Tensor | Sum]:
    outputs, targets = net(one["x"]), one["y"]
    return {
        "fit": (outputs[:, 0] - targets).square().mean(),
        "sign": Sum(outputs[targets > 0].square().sum(), (targets > 0).sum()),
    }


def rows_of(source: str) -> list[Batch]:
    found = []
    for one in WINDOW:
        names = one["source"] if isinstance(one["source"], list) else [one["source"]] * len(one["x"])
        own = torch.tensor([name == source for name in names])
        if own.any():
            found.append({"x": one["x"][own], "y": one["y"][own]})
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"reduction": "sum"}, {"reduction": "micro_batches"}, {"coefficients": {"fit": 5.0}}]
)
def test_a_sources_gradient_is_that_of_a_window_of_its_rows(settings) -> None:
    net = model().eval()
    found = SourceGradients(step := Step(net, objective, Manual(net.parameters(), lr=0.0), **settings), 1)
    step(WINDOW)
    vectors = {}
    for name in ("web", "book", "code"):
        alone = Step(net, objective, Manual(net.parameters(), lr=0.0), **settings)
        parts = rows_of(name)
        for part in parts:
            alone.accumulate(part, parts)
        vectors[name] = torch.cat([gradient.flatten() for gradient in alone.gradient().values()])
        alone.cancel()
    assert found.latest is not None
    assert found.latest.norms == {name: pytest.approx(float(one.norm()), rel=1e-5) for name, one in vectors.items()}
    for (one, other), cosine in found.latest.cosines.items():
        truth = torch.cosine_similarity(vectors[one], vectors[other], dim=0)
        assert cosine == pytest.approx(float(truth), abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"activation_checkpointing": 2}])
def test_the_run_is_bit_for_bit_the_same_with_and_without(settings) -> None:
    found = []
    for every in (None, 2):
        net = model(norm=True)
        step = Step(net, objective, adamw(net.parameters()), **settings)
        sources = None if every is None else SourceGradients(step, every)
        torch.manual_seed(3)
        losses = [step(WINDOW).loss for _ in range(4)]
        found.append(([t.clone() for t in net.state_dict().values()], torch.get_rng_state(), losses))
    assert sources is not None and sources.latest is not None
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[0][1], found[1][1]) and found[0][2] == found[1][2]


def test_forward_runs_in_measured_windows_only() -> None:
    calls: list[int] = []

    def counted(net: nn.Module, one: Batch) -> dict[str, Tensor | Sum]:
        calls.append(step.clocks.windows + 1)
        return objective(net, one)

    net = model()
    step = Step(net, counted, adamw(net.parameters()))
    SourceGradients(step, 3)
    for _ in range(6):
        step(WINDOW)
    assert [calls.count(number) for number in range(1, 7)] == [8, 3, 8, 3, 3, 8]  # 2 + 1 + 2 parts


def test_sources_are_named_by_a_callable_or_a_tensor_too() -> None:
    net = model()
    pairs = [(torch.randn(4, 6), torch.randn(4, 2))]
    step = Step(net, supervised(nn.MSELoss()), adamw(net.parameters()))
    sources = SourceGradients(step, 1, lambda pair: (pair[1][:, 0] > 100).long())
    step(pairs)
    assert sources.latest is not None and list(sources.latest.norms) == ["0"]
    report = Report(dict, {}, {}, (1, 1, 0))
    assert sources.look({}, report) == []
    assert list(report.measured) == ["sources/0/norm"]


def test_what_does_not_name_its_sources_is_refused() -> None:
    net = model()

    def refused(told: object, match: str) -> None:
        step = Step(net, objective, adamw(net.parameters()))
        SourceGradients(step, 1, None if told is None else lambda one: told)
        plain = {key: value for key, value in WINDOW[1].items() if key != "source"}
        with pytest.raises(ConfigError, match=match):
            step([plain])

    refused(None, "a dict does not say: draw micro-batches that are mappings with the key 'source'")
    refused(["a", "b"], "was told 2 sources for a micro-batch of 6 rows")
    rows = {"x": torch.randn(20, 6), "y": torch.ones(20), "source": torch.arange(20)}
    step = Step(net, objective, adamw(net.parameters()))
    SourceGradients(step, 1)
    with pytest.raises(ConfigError, match="told 20 sources in one window, and compares at most 16"):
        step([rows])


def test_rows_that_do_not_run_alone_are_said_once_and_left_out() -> None:
    net = model(norm=True)
    step = Step(net, objective, adamw(net.parameters()))
    sources = SourceGradients(step, 1)
    alone = [batch(["a", "b", "b", "b"], 1)]
    before = [buffer.clone() for buffer in net.buffers()]
    for _ in range(2):
        assert not step(alone).skipped
    assert not torch.equal(before[0], next(net.buffers()))
    (said,) = sources.look({}, Report(dict, {}, {}, (1, 1, 0)))
    assert "do not run source by source: Expected more than 1 value per channel" in said
    assert sources.latest is None
