"""Narrow parameters: what is lost without float32, that nothing is with it, and that masters go on being right."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import over_ranks
from reference import cut, differing, state_of
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW

from trainer import CheckpointError, ConfigError, Step, Sum, Trainer
from trainer.distributed import ManyProcesses
from trainer.gradient.report import FREE_READS
from trainer.optim import Manual, cosine

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: SGD(p, lr=0.05, fused=True),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.01, fused=True),
    "adamw not fused": lambda p: AdamW(p, lr=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.05, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "manual": lambda p: Manual(p, lr=0.05),
}


@pytest.fixture(params=["read", "deferred"])
def reads(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "deferred":
        FREE_READS.discard("cpu")
    yield request.param
    FREE_READS.add("cpu")


def net(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def rows(count: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 3, generator=generator), torch.randn(count, 2, generator=generator) + 1
    return drawn[0].to(dtype), drawn[1].to(dtype)


def error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    outputs = model(batch[0])
    return (outputs.double() if outputs.dtype is torch.float64 else outputs.float() - batch[1]).square().mean()


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


# Accumulation


def test_what_64_micro_batches_lose_in_bfloat16_and_not_in_float32() -> None:
    """The reference takes the same bfloat16 parameters and rows into float64; the floor is what remains when the 64
    gradients, as bfloat16 gives them, are added up without any rounding."""
    data = rows(256)
    exact = net().double()
    (exact(data[0].double()) - data[1].double()).square().mean().backward()
    true = gradient_of(exact)
    parts = net()
    total = torch.zeros_like(true)
    for batch in cut(data, [4] * 64):
        parts.zero_grad()
        error(parts, batch).backward()
        total += gradient_of(parts) / 64
    floor = float((total - true).norm() / true.norm())
    found = {}
    for accumulate_in in ("parameter", "float32"):
        model = net()
        step = Step(model, error, SGD(model.parameters(), lr=0.0), accumulate_in=accumulate_in)
        step(cut(data, [4] * 64))
        found[accumulate_in] = float((gradient_of(model) - true).norm() / true.norm())
        kept = {"parameter": torch.bfloat16, "float32": torch.float32}[accumulate_in]
        assert all(p.grad.dtype is kept and p.dtype is torch.bfloat16 for p in model.parameters())
    assert found["float32"] < 1.1 * floor
    assert floor < 2.0**-8
    assert found["parameter"] > 8 * floor


def two_weights(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Sum]:
    outputs = model(batch[0]).float()
    return {"error": Sum((outputs - batch[1]).square().sum(), 16), "size": Sum(outputs.abs().sum(), len(batch[0]) + 1)}


@pytest.mark.parametrize("objective", [error, two_weights])
@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_masters_the_optimizer_gets_the_gradient_rounded_once(
    kind: str, zero_grad: str, objective: Any, reads: str
) -> None:
    model, other = net(), net()
    step = Step(model, objective, OPTIMIZERS[kind](model.parameters()), zero_grad=zero_grad, clip_norm=0.1)
    reference = OPTIMIZERS[kind](other.parameters())
    if type(reference) is SGD:
        reference.param_groups[0]["fused"] = (
            False  # in bfloat16 on the CPU, torch's fused one leaves elements where they are
        )
    for index in range(12):
        window = cut(rows(7, seed=index), [4, 3])
        report = step(window)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert mine.grad.dtype is torch.float32
            theirs.grad = mine.grad.bfloat16()
        reference.step()
        if zero_grad != "never":  # there it adds up over windows
            norm = report.grad_norm * report.clip_factor
            assert float(gradient_of(model).norm()) == pytest.approx(norm, rel=1e-5)
            assert norm == pytest.approx(min(report.grad_norm, 0.1))
        assert differing(state_of(model, step.optimizers[0]), state_of(other, reference)) == [], index


# Masters


def test_a_step_that_vanishes_in_rounding_is_kept_by_the_master() -> None:
    found = {}
    for master_parameters in (False, True):
        model = nn.Linear(1, 1, bias=False).bfloat16()
        nn.init.ones_(model.weight)
        step = Step(
            model,
            lambda m, x: m(x).float().sum(),
            SGD(model.parameters(), lr=1e-3),
            master_parameters=master_parameters,
        )
        for _ in range(500):
            step([torch.ones(1, 1).bfloat16()])
        found[master_parameters] = model.weight.item()
    assert found == {False: 1.0, True: 0.5}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masters_are_float32_parameters_moved_by_torch(kind: str, reads: str) -> None:
    """Forty windows with a clip and skips: by hand, float32 parameters, rounded into a net that gives the gradient."""
    model, other = net(), net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    step = Step(model, error, optimizer, schedule=cosine(100), clip_norm=0.5, master_parameters=True)
    wide = [p.detach().float() for p in other.parameters()]
    reference = OPTIMIZERS[kind]([w.requires_grad_() for w in wide])
    rate = reference.param_groups[0]["lr"]
    taken = 0
    for index in range(40):
        inputs, targets = rows(7, seed=index)
        if index % 7 == 0:
            inputs[5, 1] = float("nan")
        before = state_of(model, step.optimizers[0])
        report = step(cut((inputs, targets), [4, 3]))
        assert report.skipped == (index % 7 == 0)
        if report.skipped:
            assert differing(before, state_of(model, step.optimizers[0])) == []
            continue
        reference.param_groups[0]["lr"] = float(cosine(100)(taken) * rate)
        taken += 1
        for weight, parameter in zip(wide, model.parameters(), strict=True):
            weight.grad = parameter.grad.clone()
        reference.step()
        for weight, parameter in zip(wide, model.parameters(), strict=True):
            bound = {"atol": 0.0, "rtol": 0.0} if reads == "read" else {"atol": 1e-6, "rtol": 1e-5}
            torch.testing.assert_close(_master(step, parameter), weight, **bound)
            assert torch.equal(parameter, _master(step, parameter).bfloat16())
        for state in step.optimizers[0].state.values():
            assert all(v.dtype is torch.float32 for v in state.values() if isinstance(v, Tensor))


def _master(step: Step, parameter: Tensor) -> Tensor:
    masters = step.optimizers[0].param_groups[0]["params"]
    found: Tensor = next(master for master in masters if master.stands_for is parameter)
    return found


def test_it_goes_on_bit_for_bit_from_any_boundary(reads: str) -> None:
    """Restored under a poisoned rate and other parameters; the optimizer's state must come back as float32."""
    windows = [cut(rows(9, seed=index), [4, 2, 3]) for index in range(4)]

    def made(seed: int, lr: float) -> tuple[nn.Module, Any, Step]:
        model = net(seed=seed)
        optimizer = AdamW(model.parameters(), lr=lr, fused=True)
        return model, optimizer, Step(model, error, optimizer, clip_norm=0.5, master_parameters=True, zero_grad="never")

    finals = []
    for stops in ((), range(1, 16)):
        model, optimizer, step = made(0, 0.02)
        for place in range(16):
            if place in stops:
                file = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict(), step.state_dict()), file)
                file.seek(0)
                model, optimizer, step = made(9, 7.0)
                saved = torch.load(file, weights_only=True)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                step.load_state_dict(saved[2])
            window = windows[place // 4]
            if place % 4 < 3:
                step.accumulate(window[place % 4], window)
            else:
                step.finish()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        finals.append(state_of(model, optimizer) | step.state_dict()["masters"] | gradients)
    assert differing(finals[0], finals[1]) == []


def test_a_run_of_the_trainer_goes_on_bit_for_bit(tmp_path: Any) -> None:
    def trainer(steps: int, folder: str, seed: int = 0) -> Trainer:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        quiet: dict[str, Any] = {"console": False, "tensorboard": False, "metrics_file": False}
        return Trainer(
            model, error, AdamW(model.parameters(), lr=0.01, fused=True), data=rows(40, dtype=torch.float32),
            steps=steps, batch_size=4, accumulation_steps=2, precision="bf16_true", master_parameters=True, seed=3,
            folder=tmp_path / folder, **quiet,
        )  # fmt: skip

    straight = trainer(9, "straight")
    straight.fit()
    trainer(4, "cut").fit()
    again = trainer(9, "cut", seed=8)
    again.fit(resume="auto")
    assert all(p.dtype is torch.bfloat16 for p in again.model.parameters())
    mine, theirs = (state_of(t.model, t.step.optimizers[0]) | t.step.state_dict()["masters"] for t in (again, straight))
    assert differing(mine, theirs) == []


def test_what_somebody_else_writes_into_a_parameter_is_its_masters_new_value() -> None:
    model = net()
    step = Step(model, error, AdamW(model.parameters(), lr=0.0), master_parameters=True)
    step([rows(4)])
    other = net(seed=4)
    model.load_state_dict(other.state_dict())
    step([rows(4)])
    assert differing(state_of(model), state_of(other)) == []
    for parameter in model.parameters():
        assert torch.equal(_master(step, parameter), parameter.float())


def test_a_state_without_masters_and_one_that_does_not_fit() -> None:
    model = net()
    plain = Step(model, error, AdamW(model.parameters(), lr=0.01))
    state = plain.state_dict()
    assert state["masters"] == {}
    step = Step(model, error, AdamW(model.parameters(), lr=0.01), master_parameters=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    step.load_state_dict(state)
    for parameter in model.parameters():
        assert torch.equal(_master(step, parameter), parameter.float())
    state["masters"] = {"0.weight": torch.ones(8, 1)}
    with pytest.raises(CheckpointError, match=r"'0.weight' has shape \(8, 1\), the parameter here \(8, 3\)"):
        step.load_state_dict(state)


def test_a_parameter_that_joins_gets_its_master_and_its_state_comes_along() -> None:
    model = net()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    optimizer = AdamW(first, lr=0.01, fused=True)
    Step(model, error, optimizer)([rows(4)])
    before = copy.deepcopy([optimizer.state[p]["exp_avg"] for p in first])
    step = Step(model, error, optimizer, master_parameters=True)
    masters = optimizer.param_groups[0]["params"]
    assert [optimizer.state[m]["exp_avg"].dtype for m in masters] == [torch.float32] * 2
    assert all(torch.equal(optimizer.state[m]["exp_avg"], b.float()) for m, b in zip(masters, before, strict=True))
    step([rows(4)])
    optimizer.add_param_group({"params": last})
    was = [p.detach().clone() for p in last]
    step([rows(4)])
    assert [m.dtype for m in optimizer.param_groups[1]["params"]] == [torch.float32] * 2
    assert not any(torch.equal(p, w) for p, w in zip(last, was, strict=True))
    assert list(step.parameters.by_name) == [name for name, _ in model.named_parameters()]
    again = Step(model, error, optimizer, master_parameters=True)  # finds the masters that are there
    again([rows(4)])
    assert all(m.stands_for in set(model.parameters()) for g in optimizer.param_groups for m in g["params"])


def test_a_step_that_raises_leaves_the_gradients_dtype(reads: str) -> None:
    for master_parameters in (True, False):
        model = net()
        optimizer = AdamW(model.parameters(), lr=0.01)
        step = Step(model, error, optimizer, master_parameters=master_parameters)
        optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step([rows(4)])
        assert all(p.grad is None or p.grad.dtype is torch.float32 for p in model.parameters())
        assert all(p.grad_dtype is torch.float32 for p in model.parameters())


def test_float16_parameters_need_masters() -> None:
    model = net(torch.float16)
    step = Step(model, error, SGD(model.parameters(), lr=0.01))
    step([rows(4, dtype=torch.float16)])
    assert all(p.grad.dtype is torch.float16 for p in model.parameters())
    with pytest.raises(ConfigError, match="float16 itself, .* set master_parameters=true"):
        Step(net(torch.float16), error, SGD(model.parameters()), precision="fp16")
    model = net(torch.float16)
    step = Step(
        model, error, AdamW(model.parameters(), lr=0.01, fused=True), precision="fp16", loss_scale=1024.0,
        master_parameters=True,
    )  # fmt: skip
    exact = net(torch.float16).float()
    reference = Step(exact, error, AdamW(exact.parameters(), lr=0.01, fused=True))
    for index in range(10):
        data = rows(4, seed=index, dtype=torch.float16)
        assert not step([data]).skipped
        reference([(data[0].float(), data[1])])
        for parameter, wide in zip(model.parameters(), exact.parameters(), strict=True):
            assert parameter.grad.dtype is torch.float32
            torch.testing.assert_close(parameter.float(), wide, rtol=5e-3, atol=5e-3)


def test_an_optimizer_that_averages_in_its_parameters_has_no_masters() -> None:
    class Averages(SGD):
        def eval(self) -> None: ...

    model = net()
    with pytest.raises(ConfigError, match="Averages writes other numbers .*: set master_parameters=false"):
        Step(model, error, Averages(model.parameters()), master_parameters=True)


def test_a_master_takes_its_gradient_in_float32() -> None:
    with pytest.raises(ConfigError, match="accumulate_in=parameter and master_parameters=true are both set"):
        Step(net(), error, SGD(net().parameters()), accumulate_in="parameter", master_parameters=True)


def test_wide_parameters_are_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        model = net(dtype)
        optimizer = SGD(model.parameters(), lr=0.1)
        before = list(optimizer.param_groups[0]["params"])
        step = Step(model, error, optimizer, master_parameters=True)
        step([rows(4, dtype=dtype)])
        assert not step._narrow.any
        assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


# Over ranks


def half_of_it(rank: int, world: int, masters: bool) -> Any:
    model = net()
    step = Step(
        model, error, AdamW(model.parameters(), lr=1e-3, fused=True), master_parameters=masters, ranks=ManyProcesses()
    )
    for _ in range(3):
        step(cut(rows(256), [4] * 64)[rank::2])
    return model.state_dict(), gradient_of(model), [p.grad.dtype for p in model.parameters()]


@pytest.mark.parametrize("masters", [False, True])
def test_two_ranks_add_up_in_float32(masters: bool) -> None:
    model = net()
    step = Step(model, error, AdamW(model.parameters(), lr=1e-3, fused=True), master_parameters=masters)
    for _ in range(3):
        step(cut(rows(256), [4] * 64))
    (left, first, dtypes), (right, second, _) = over_ranks(half_of_it, masters)
    assert set(dtypes) == {torch.float32}
    assert torch.equal(first, second)
    assert differing(left, right) == []
    assert float((first - gradient_of(model)).norm() / first.norm()) < 1e-6
    assert differing(left, dict(model.state_dict())) == []
