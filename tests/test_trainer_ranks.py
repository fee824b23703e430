"""Whole runs on two ranks: the same training as in one process, and what ranks have to agree on."""

import contextlib
import io
import math
import os
import random
import signal
import time

import pytest
import torch
from ranks import Pool, over_ranks, pool
from runs import MSE, QUIET, error, net, rows
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from trainer import Trainer
from trainer.cli import main
from trainer.data import order
from trainer.errors import Stopped
from trainer.optim import adamw, sgd

SILENT = {**QUIET, "audit": False}


class Rows(Dataset):
    def __init__(self, count: int) -> None:
        self.tensors = rows(count, torch.float64)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, row: int):
        return self.tensors[0][row], self.tensors[1][row]


class Stream(IterableDataset):
    """Rows in an order that it draws from python's generator, without a length."""

    def __init__(self, count: int) -> None:
        self.tensors = rows(count, torch.float64)

    def __iter__(self):
        found = list(zip(*self.tensors, strict=True))
        random.shuffle(found)
        yield from found


def data_of(kind: str, count: int = 23):
    tensors = rows(count, torch.float64)
    if kind == "tensors":
        return tensors
    if kind == "dataset":
        return Rows(count)
    if kind == "batches":
        return list(zip(*(tensor.split(3) for tensor in tensors), strict=True))
    if kind == "stream":
        return Stream(count)
    data = TensorDataset(*tensors)
    if kind == "distributed sampler":
        sampler = DistributedSampler(data, shuffle=True, seed=5, drop_last=False)
        return DataLoader(data, batch_size=3, sampler=sampler)
    return DataLoader(data, batch_size=3, shuffle=True)


class Sees:
    """The loss, and which rows it was of."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, model, batch):
        if model.training:
            self.seen += batch[0][:, 0].tolist()
        return (model(batch[0]) - batch[1]).square().mean()


def model_of(seed: int = 0, dropout: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    return net(0.5).double() if dropout else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def trained(
    ddp: bool, kind: str, accumulation_steps: int, folder=None, limits=None, resume="never", accept=(), **settings
):
    sees = Sees()
    model = model_of()
    optimizer = adamw(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model,
        sees,
        optimizer,
        data=data_of(kind),
        evaluation_data=rows(11, torch.float64, seed=2),
        metrics=error,
        folder=folder,
        **{
            "accumulation_steps": accumulation_steps,
            "batch_size": 3,
            "evaluation_batch_size": 2,
            "clip_norm": 1.0,
            "seed": 7,
            "distributed": "ddp" if ddp else "none",
            **(limits or {"epochs": 2}),
            **SILENT,
            **settings,
        },
    )
    stop = trainer.fit(resume, accept)
    return {
        "parameters": [parameter.detach().clone() for parameter in model.parameters()],
        "seen": sees.seen,
        "clocks": stop.clocks,
        "metrics": stop.metrics,
        "best": stop.best,
        "reason": stop.reason,
    }


def on_rank(rank, world, *arguments, **keywords):
    return trained(True, *arguments, **keywords)


@pytest.mark.parametrize("kind", ["tensors", "dataset", "batches", "stream", "loader"])
def test_a_run_on_two_ranks_is_the_run_with_twice_the_window(kind) -> None:
    left, right = over_ranks(on_rank, kind, 2)
    alone = trained(False, kind, 4)
    assert left["clocks"] == right["clocks"]
    assert {name: left[name] == right[name] for name in ("metrics", "best", "reason")}
    assert all(torch.equal(one, other) for one, other in zip(left["parameters"], right["parameters"], strict=True))
    once = sorted(rows(23, torch.float64)[0][:, 0].tolist())
    assert sorted(left["seen"] + right["seen"]) == sorted(once * 2)
    assert left["clocks"]["rows"] == 46 and left["clocks"]["epochs"] == 2
    if kind in ("tensors", "dataset", "batches"):  # the others draw an order of their own in one process
        assert left["clocks"] == alone["clocks"]
        assert left["metrics"] == pytest.approx(alone["metrics"], rel=1e-12)
        for one, other in zip(left["parameters"], alone["parameters"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_an_evaluation_counts_each_row_once() -> None:
    left, right = over_ranks(on_rank, "tensors", 2)
    model = model_of()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), left["parameters"], strict=True):
            parameter.copy_(value)
        x, y = rows(11, torch.float64, seed=2)
        true = {"loss": float((model(x) - y).square().mean()), "error": float((model(x) - y).abs().sum() / 11)}
    assert left["metrics"] == right["metrics"] == pytest.approx(true, rel=1e-12)


def test_a_sampler_that_splits_the_rows_itself_is_taken_as_it_is() -> None:
    left, right = over_ranks(on_rank, "distributed sampler", 2)
    assert len(left["seen"]) == len(right["seen"]) == 24  # 12 each, twice: one row of the 23 is repeated
    assert left["clocks"] == right["clocks"] and left["clocks"]["windows"] == 4
    assert all(torch.equal(one, other) for one, other in zip(left["parameters"], right["parameters"], strict=True))


def stopped_and_resumed(rank, world, folder, kind, at):
    """A run with dropout, cut off after some steps and gone on with, beside one that was not."""

    def run(limits, where, resume="never"):
        torch.manual_seed(0)
        model = net(0.5).double()
        settings = {"batch_size": 3, "accumulation_steps": 1, "seed": 3, "distributed": "ddp", **SILENT, **limits}
        optimizer = adamw(model.parameters(), lr=1e-2 if resume == "never" else 5.0)
        trainer = Trainer(model, MSE, optimizer, data=data_of(kind), folder=f"{folder}/{where}", **settings)
        trainer.fit(resume)
        return [p.detach().clone() for p in model.parameters()], trainer.step.clocks.as_dict()

    whole = run({"steps": 9}, "whole")
    run({"steps": at}, "cut")
    rest = run({"steps": 9}, "cut", "auto")
    return whole, rest


@pytest.mark.parametrize("kind", ["tensors", "stream"])
def test_a_run_that_goes_on_is_bit_equal_on_every_rank(kind, tmp_path) -> None:
    for found in over_ranks(stopped_and_resumed, str(tmp_path), kind, 6):
        (whole, clocks), (rest, clocks_of_rest) = found
        assert clocks == clocks_of_rest
        assert all(torch.equal(one, other) for one, other in zip(whole, rest, strict=True))


def test_going_on_with_another_number_of_ranks_sees_each_row_once(tmp_path) -> None:
    """Six micro-batches of the epoch's eight on two ranks, the rest in one process."""
    found = over_ranks(on_rank, "tensors", 1, folder=str(tmp_path), limits={"steps": 3}, evaluate_every=None)
    rest = trained(
        False,
        "tensors",
        1,
        folder=str(tmp_path),
        limits={"epochs": 1},
        resume="auto",
        accept=["distributed"],
        evaluate_every=None,
    )
    once = sorted(rows(23, torch.float64)[0][:, 0].tolist())
    assert sorted(found[0]["seen"] + found[1]["seen"] + rest["seen"]) == once
    assert len(rest["seen"]) == 5


def hears(rank, world, folder):
    """What is written and said on each rank."""
    said, told = io.StringIO(), []

    class Listens:
        def step(self, report, seconds):
            told.append(report.clocks["windows"])

    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        model = model_of()
        trainer = Trainer(
            model, MSE, sgd(model.parameters(), lr=0.1), data=rows(16, torch.float64), folder=folder,
            loggers=[Listens()], distributed="ddp", epochs=2, batch_size=2, seed=1, log_every=1, tensorboard=False,
            console=True,
        )  # fmt: skip
        trainer.fit()
    return said.getvalue(), told


def test_only_the_first_rank_speaks_and_writes(tmp_path) -> None:
    left, right = over_ranks(hears, str(tmp_path))
    assert "window 2 ranks × 2 rows = 4 rows, divided by elements" in left[0]
    assert left[1] == [1, 2, 3, 4, 5, 6, 7, 8] and right == ("", [])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8


def asked(rank, world, folder, what):
    """Rank 1 gets a signal, or has no more time, in the middle of a window."""
    model = model_of()
    calls = []
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)

    def objective(m, b):
        calls.append(1)
        if rank == 1 and len(calls) == 4 and what != "time":
            os.kill(os.getpid(), getattr(signal, what))
        if what == "time":
            time.sleep(0.02 if rank else 0.001)
        return (m(b[0]) - b[1]).square().mean()

    limits = {"epochs": 50} if what != "time" else {"epochs": 5000, "time": 0.3 if rank else 300.0}
    trainer = Trainer(
        model, objective, sgd(model.parameters(), lr=0.01), data=rows(16, torch.float64), folder=folder,
        distributed="ddp", batch_size=1, accumulation_steps=2, seed=1, **limits, **SILENT,
    )  # fmt: skip
    if what == "time":
        trainer._ranks.start = lambda config, seed: seed  # the limits differ on purpose
    try:
        reason = trainer.fit().reason
    except Stopped as stop:
        reason = stop.reason
    finally:
        signal.signal(signal.SIGINT, ignored)
    return reason, trainer.step.clocks.as_dict()


@pytest.mark.parametrize(("what", "said"), [("SIGTERM", "SIGTERM"), ("SIGINT", "Ctrl-C")])
def test_a_stop_of_one_rank_is_a_stop_of_all_at_the_windows_end(what, said, tmp_path) -> None:
    left, right = over_ranks(asked, str(tmp_path), what)
    assert left == right and said in left[0]
    assert left[1]["windows"] == left[1]["steps"] == 2 and left[1]["micro_batches"] == 8
    assert list((tmp_path / "checkpoints").iterdir())


def test_time_that_is_over_on_one_rank_is_over_for_all(tmp_path) -> None:
    left, right = over_ranks(asked, str(tmp_path), "time")
    assert left[1] == right[1] and "seconds are over" in left[0] and "seconds are over" in right[0]


def drifts(rank, world, folder, **settings):
    """In the fourth window rank 1 changes one number of one parameter by hand."""
    model = model_of()
    calls = []

    def objective(m, b):
        calls.append(1)
        if rank == 1 and len(calls) == 4:
            with torch.no_grad():
                m[2].weight.view(-1)[1] += 1e-12
        return (m(b[0]) - b[1]).square().mean()

    trainer = Trainer(
        model, objective, sgd(model.parameters(), lr=0.01), data=rows(16, torch.float64), folder=folder, batch_size=1,
        distributed="ddp", seed=1, epochs=2, **SILENT, **settings,
    )  # fmt: skip
    trainer.fit()


def test_ranks_that_drift_apart_are_found_at_the_interval_and_before_a_save(tmp_path) -> None:
    for settings, step in (({"compare_every": 5}, 5), ({"compare_every": None}, 16)):
        folder = tmp_path / str(step)
        for kind, said in pool().outcomes(drifts, str(folder), **settings):
            assert kind == "failed" and said[0] == "DivergedError"
            assert f"the parameter '2.weight' of rank 1 is not what it is on the others, at step {step}" in said[1]
        assert not (folder / "checkpoints").exists() or not list((folder / "checkpoints").iterdir())
    for answer in pool().outcomes(drifts, str(tmp_path / "never"), compare_every=None, checkpoint_last=False,
                                  checkpoint_every=None):  # fmt: skip
        assert answer[0] == "done"  # the negative control: nobody looks


def begins(rank, world, what):
    model = model_of(seed=rank if what == "parameters" else 0)
    rate = 0.1 + (rank if what == "rate" else 0)
    Trainer(
        model, MSE, sgd(model.parameters(), lr=rate), data=rows(8, torch.float64), distributed="ddp", epochs=1,
        seed=rank if what == "seed" else 1, clip_norm=1.0 + (rank if what == "clip" else 0), **SILENT,
        config={"note": {"of": rank if what == "config" else 0}},
    ).fit()  # fmt: skip


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("seed", "the ranks are not alike: seed is 0 on rank 0, 1 on rank 1"),
        ("clip", "gradient.clip_norm is 1.0 on rank 0, 2.0 on rank 1"),
        ("rate", "optimizer 0, group 0.lr is 0.1 on rank 0, 1.1 on rank 1"),
        ("config", "note.of is 0 on rank 0, 1 on rank 1"),
        ("parameters", "the ranks begin with different parameters: '0.weight' on rank 1"),
    ],
)
def test_ranks_that_do_not_begin_alike_are_refused(what, words) -> None:
    for kind, said in pool().outcomes(begins, what):
        assert kind == "failed" and said[0] == "ConfigError" and words in said[1], said


def only_skips(rank, world):
    model = model_of()
    data = rows(8, torch.float64)
    if rank == 1:
        data = (data[0] * math.nan, data[1])
    Trainer(
        model, MSE, sgd(model.parameters(), lr=0.1), data=data, distributed="ddp", epochs=9, seed=1, batch_size=1,
        skips_in_a_row=3, **SILENT,
    ).fit()  # fmt: skip


def test_so_many_skips_in_a_row_stop_every_rank() -> None:
    for kind, said in pool().outcomes(only_skips):
        assert kind == "failed" and said[0] == "DivergedError"
        assert (
            "3 steps in a row were skipped, the last because on rank 1 the loss of micro-batch 1 of 1 is nan" in said[1]
        )


def evaluates_with(rank, world):
    """BatchNorm's statistics are each rank's own; all evaluate with those of the first."""
    torch.manual_seed(0)
    model = net(0.0).double()
    data = rows(16, torch.float64)
    trainer = Trainer(
        model, MSE, sgd(model.parameters(), lr=0.01), data=data, evaluation_data=rows(10, torch.float64, seed=4),
        distributed="ddp", epochs=1, seed=1, batch_size=4, **SILENT,
    )  # fmt: skip
    trainer.fit()
    return trainer.evaluate(), {name: value.clone() for name, value in model.state_dict().items()}


def test_all_ranks_evaluate_with_the_first_ranks_buffers() -> None:
    left, right = over_ranks(evaluates_with)
    assert left[0] == right[0]
    assert not torch.equal(left[1]["1.running_mean"], right[1]["1.running_mean"])
    model = net(0.0).double().eval()
    model.load_state_dict(left[1])
    x, y = rows(10, torch.float64, seed=4)
    with torch.no_grad():
        assert left[0]["loss"] == pytest.approx(float((model(x) - y).square().mean()), rel=1e-12)


def dies(rank, world, how):
    model = model_of()
    calls = []

    def objective(m, b):
        calls.append(1)
        if rank == 1 and len(calls) == 4:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(30)
        return (m(b[0]) - b[1]).square().mean()

    began = time.monotonic()
    try:
        Trainer(
            model, objective, sgd(model.parameters(), lr=0.01), data=rows(16, torch.float64), distributed="ddp", seed=1,
            batch_size=1, epochs=9, **SILENT,
        ).fit()  # fmt: skip
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", 0.0


@pytest.mark.parametrize(("how", "words"), [("killed", "rank 1 is gone"), ("hangs", "rank 1 did not answer in time")])
def test_a_rank_that_is_gone_ends_the_others_with_its_name(how, words) -> None:
    own = Pool(seconds=3.0)
    try:
        for pipe in own._pipes:
            pipe.send((__name__, "dies", (how,), {}))
        kind, (name, said, seconds) = own._answer(0)
        assert kind == "done" and name == "LostRankError" and words in said and seconds < 12
    finally:
        own.close()


def test_the_order_is_a_function_of_seed_epoch_rank_and_world_size() -> None:
    first = over_ranks(on_rank, "tensors", 1)
    again = over_ranks(on_rank, "tensors", 1)
    assert [one["seen"] for one in first] == [one["seen"] for one in again]
    x = rows(23, torch.float64)[0][:, 0]
    batches = x[order(7, 0, 0, 23)].split(3)
    for rank in (0, 1):
        mine = torch.cat(batches[rank::2]).tolist()
        assert first[rank]["seen"][: len(mine)] == mine


def draws(rank, world, folder):
    """The verb `graph` as torchrun has it run; XOR's four rows are one micro-batch, so the second rank has none."""
    under = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "-",
        "MASTER_PORT": "-",
    }
    before, said = os.getcwd(), io.StringIO()
    os.chdir(folder)
    os.environ |= under
    try:
        with contextlib.redirect_stdout(said):
            code = main(["graph", "recipe=xor_mlp", "distributed=ddp", "--out", "graph.svg"])
    finally:
        os.chdir(before)
        for name in under:
            del os.environ[name]
    return code, said.getvalue()


def test_a_graph_is_drawn_once(tmp_path) -> None:
    (code, said), other = over_ranks(draws, str(tmp_path))
    assert code == 0 and "MLP: 4 operations" in said and other == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.svg"]
