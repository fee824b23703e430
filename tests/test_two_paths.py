"""The two ways to the parameters, held against each other and against torch alone: divisor and clip folded into the
fused kernel (read at once, or left on the device), and one pass over the gradients before the optimizer's own step.

200 windows each. Their weights are told only by the objective and vary, so that the divisor's guess leaves a factor
below and above 1; two parameters thaw in the middle. Once with a clip, which cuts about half of them, and with every
ninth window not finite, the first among them; once with neither. The gradient does not depend on the parameters, so
that rounding is not amplified: torch alone gets it by hand, in float64, and never sees a skipped window.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW

from trainer import Step, Sum, kernels
from trainer.gradient.report import FREE_READS
from trainer.optim.update import is_fused

OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.02}),
    "sgd decay maximize": (SGD, {"lr": 0.02, "weight_decay": 0.01, "maximize": True}),
    "momentum": (SGD, {"lr": 0.02, "momentum": 0.9}),
    "momentum dampening decay": (SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "nesterov decay": (SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "nesterov maximize": (SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (Adam, {"lr": 0.01}),
    "adam decay amsgrad": (Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.01}),
    "adamw amsgrad": (AdamW, {"lr": 0.01, "amsgrad": True}),
    "adamw maximize": (AdamW, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "adagrad": (Adagrad, {"lr": 0.05}),
    "adagrad decays": (Adagrad, {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.01}),
    "adagrad maximize": (Adagrad, {"lr": 0.05, "maximize": True, "initial_accumulator_value": 0.1}),
}
PATHS = {"folded, read": True, "folded, on the device": True, "one pass": False}
WINDOWS, THAW, CLIP = 200, 100, 1.2
SHAPES = {"first": (6, 4), "second": (19,), "late": (4, 3), "last": ()}
SIZE = 6 * 4 + 19 + 4 * 3 + 1

Batch = tuple[Tensor, float]


def drawn(skips: bool) -> list[list[Batch]]:
    """Windows of one to three micro-batches: (what each parameter's gradient is, flattened; the weight)."""
    generator = torch.Generator().manual_seed(4)
    windows = []
    for index in range(WINDOWS):
        window = []
        for _ in range(1 + index % 3):
            weight = float(2.0 ** torch.randint(-3, 4, (), generator=generator)) * 1.3
            window.append((torch.randn(SIZE, generator=generator, dtype=torch.float64) * weight * 0.2, weight))
        if skips and index % 9 == 0:
            window[-1][0][30 if index >= THAW else 3] = float("nan" if index % 2 else "inf")
        windows.append(window)
    return windows


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in SHAPES.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(values.to(dtype), requires_grad=name not in ("late", "last")))


def pull(model: Model, batch: Batch) -> Sum:
    """Its gradient is the batch itself."""
    parts = batch[0].split([p.numel() for p in model.parameters()])
    return Sum(
        sum((p.flatten() * x.to(p.dtype)).sum() for p, x in zip(model.parameters(), parts, strict=True)), batch[1]
    )


def run(kind: str, dtype: torch.dtype, path: str, skips: bool, clip: float | None) -> tuple[Any, ...]:
    model = Model(dtype)
    make, options = OPTIMIZERS[kind]
    how = {"fused": True} if PATHS[path] else {"foreach": True}
    optimizer = make(model.parameters(), **options, **how)
    step = Step(model, pull, optimizer, clip_norm=clip, count_rows=lambda batch: 1)
    deferred = 0
    reports = []
    for index, window in enumerate(drawn(skips)):
        if index == THAW:
            model.requires_grad_(True)
        for batch in window:
            step.accumulate(batch, window if index % 2 else None)
        reports.append(step.finish())
        deferred += isinstance(reports[-1]._skipped, Tensor)
    assert is_fused(optimizer) == PATHS[path]
    assert (deferred >= 190) == (path == "folded, on the device")  # the steps that make a state are read
    return optimizer, reports


def by_torch(kind: str, dtype: torch.dtype, skips: bool, clip: float | None) -> Any:
    """torch.optim alone, not fused."""
    model = Model(dtype)
    make, options = OPTIMIZERS[kind]
    optimizer = make(model.parameters(), **options, foreach=False)
    for index, window in enumerate(drawn(skips)):
        gradient = sum(batch[0] for batch in window) / sum(batch[1] for batch in window)
        if index < THAW:
            gradient = gradient[: 6 * 4 + 19]
        if not gradient.isfinite().all():
            continue
        if clip is not None:
            gradient = gradient * min(1.0, clip / float(gradient.norm()))
        parts = iter(gradient.split([p.numel() for p in model.parameters()][: 4 if index >= THAW else 2]))
        for parameter in model.parameters():
            part = next(parts, None)
            parameter.grad = None if part is None else part.view(parameter.shape).to(dtype)
        optimizer.step()
    return optimizer


def apart(one: Any, other: Any) -> float:
    """The largest difference of any parameter, state or `.grad` as it was left, by the largest number in its tensor."""
    largest = 0.0
    for mine, theirs in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        pairs = [(mine, theirs), (mine.grad, theirs.grad)]
        states = one.state[mine], other.state[theirs]
        assert states[0].keys() == states[1].keys()
        for name in states[0]:
            if isinstance(states[0][name], Tensor):
                pairs.append((states[0][name], states[1][name]))
            if name == "step":
                assert float(states[0][name]) == float(states[1][name])
        for left, right in pairs:
            assert left.dtype == right.dtype
            left, right = left.detach(), right.detach()
            scale = right.double().abs().max().clamp(min=1e-30)
            largest = max(largest, float((left.double() - right.double()).abs().max() / scale))
    return largest


@pytest.fixture
def on_device() -> Iterator[Callable[[str], None]]:
    def choose(path: str) -> None:
        if path == "folded, on the device":
            FREE_READS.discard("cpu")
        else:
            FREE_READS.add("cpu")

    yield choose
    FREE_READS.add("cpu")


# As far as torch's fused kernels are from its own default after so many steps, and a little for the factor's rounding.
BOUNDS = {torch.float32: 5e-6, torch.float64: 1e-14}


@pytest.mark.parametrize(("skips", "clip"), [(True, CLIP), (False, None)], ids=["skips and clip", "neither"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_both_paths_and_torch_alone_agree(
    kind: str, dtype: torch.dtype, skips: bool, clip: float | None, on_device: Callable[[str], None]
) -> None:
    ends = {"torch": by_torch(kind, dtype, skips, clip)}
    for path in PATHS:
        if dtype is torch.float64 and path == "folded, on the device":
            continue  # the kernels read their scale as a float32, so that these take the one pass
        on_device(path)
        ends[path], reports = run(kind, dtype, path, skips, clip)
        assert [report.skipped for report in reports] == [skips and index % 9 == 0 for index in range(WINDOWS)]
        if clip is not None:
            clipped = sum(not r.skipped and r.clip_factor < 1.0 for r in reports)
            assert WINDOWS * 0.2 < clipped < WINDOWS * 0.8
    for path in ends:
        for other in ("one pass", "torch"):
            assert apart(ends[path], ends[other]) < BOUNDS[dtype], (path, other)


def test_the_fold_is_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, one path could be tested three times."""
    scales: list[float] = []
    real = kernels.update_directly

    def spy(optimizer: Any, scale: Tensor | None) -> bool:
        scales.append(1.0 if scale is None else float(scale))
        return real(optimizer, scale)

    monkeypatch.setattr(kernels, "update_directly", spy)
    run("adamw", torch.float32, "folded, read", True, CLIP)
    assert len(scales) > 170
    assert min(scales) == 1.0 and max(scales) > 1.5
    before = len(scales)
    run("adamw", torch.float32, "one pass", True, CLIP)
    assert len(scales) == before
