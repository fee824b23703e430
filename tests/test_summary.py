"""What a run says of itself before it starts."""

import pytest
import torch
from runs import MSE, QUIET, rows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Step, Trainer, summary, supervised
from trainer.data import source_of
from trainer.gradient.report import FREE_READS
from trainer.gradient.transforms import centralise, noise
from trainer.optim import adamw, cosine, sgd
from trainer.settings import from_flat


def said(objective=MSE, data=None, optimizer=sgd, schedule=None, **flat):
    settings = from_flat({"batch_size": 16, **flat})
    model = nn.Linear(3, 1)
    made = optimizer(model.parameters(), lr=0.1)
    step = Step(model, objective, made, schedule=schedule and schedule(made), gradient=settings.gradient)
    return settings, source_of(rows(100) if data is None else data, settings.data), step


def mean(model, batch):
    return model(batch[0]).mean()


class Declared:
    def weight(self, batch):
        return 3.0

    __call__ = staticmethod(mean)


@pytest.mark.parametrize(
    ("objective", "flat", "equation"),
    [
        (MSE, {}, "window 16 rows, divided by elements"),
        (MSE, {"accumulation_steps": 4}, "window 4 × 16 rows = 64 rows, divided by elements"),
        (mean, {}, "window 16 rows, divided by rows"),
        (Declared(), {}, "window 16 rows, divided by what the objective's weight counts"),
        (
            supervised(nn.CrossEntropyLoss()),
            {},
            "window 16 rows, divided by targets that are not ignored",
        ),
        (mean, {"reduction": "sum", "accumulation_steps": 2}, "window 2 × 16 rows = 32 rows, not divided"),
        (
            mean,
            {"reduction": "micro_batches", "accumulation_steps": 2},
            "window 2 × 16 rows = 32 rows, each micro-batch divided by rows, their sum by 2",
        ),
    ],
)
def test_the_window_as_an_equation(objective, flat, equation) -> None:
    settings, source, step = said(objective, **flat)
    assert summary.window(settings, source, step) == equation


def test_micro_batches_of_somebody_elses_cut_have_no_rows_in_the_equation() -> None:
    settings, source, step = said(data=DataLoader(TensorDataset(*rows(10)), batch_size=3), accumulation_steps=2)
    assert summary.window(settings, source, step) == "window 2 micro-batches, divided by elements"


def test_a_dataset_is_cut_by_the_settings_also_in_float64() -> None:
    model = nn.Linear(3, 1).double()
    starts = []

    class Listens:
        start = staticmethod(starts.append)
        step = evaluate = skip = stop = staticmethod(lambda *_: None)

    data = torch.utils.data.Subset(TensorDataset(*rows(10)), range(10))
    Trainer(
        model, MSE, sgd(model.parameters(), lr=0.1), data=data, batch_size=5, steps=1, precision="fp64",
        loggers=[Listens()], **QUIET,
    ).fit()  # fmt: skip
    assert starts[0].window == "window 5 rows, divided by elements"


@pytest.mark.parametrize(
    ("flat", "total"),
    [
        ({"epochs": 2}, 14),
        ({"epochs": 2, "accumulation_steps": 3}, 6),
        ({"epochs": 2, "accumulation_steps": 3, "drop_last": True}, 4),
        ({"steps": 5}, 5),
        ({"steps": 5, "epochs": 1}, 5),
        ({"steps": 50, "epochs": 1}, 7),
        ({"time": 3.0}, None),
    ],
)
def test_how_many_windows_there_will_be(flat, total) -> None:
    settings, source, _ = said(**flat)
    assert summary.total_windows(settings, source) == total


def test_how_many_windows_there_will_be_is_not_known_for_a_stream() -> None:
    class Stream:
        def __iter__(self):
            return iter([])

    settings, source, _ = said(data=Stream(), epochs=3)
    assert summary.total_windows(settings, source) is None
    settings, source, _ = said(data=Stream(), epochs=3, steps=4)
    assert summary.total_windows(settings, source) == 4


def test_the_total_is_what_a_run_draws() -> None:
    for flat in ({"epochs": 3, "accumulation_steps": 4}, {"epochs": 2, "drop_last": True}, {"steps": 9}):
        settings, source, _ = said(**flat)
        model = nn.Linear(3, 1)
        trainer = Trainer(model, MSE, sgd(model.parameters(), lr=0.01), data=rows(100), batch_size=16, **flat, **QUIET)
        assert trainer.fit().clocks["windows"] == summary.total_windows(settings, source)


def test_nothing_is_said_where_nothing_was_assumed() -> None:
    settings, source, step = said()
    assert list(summary.notes(step, source, settings)) == []


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ({"objective": mean}, "a plain scalar of the objective counts as a mean over rows"),
        ({"data": DataLoader(TensorDataset(*rows(10)))}, "the data's order is its own"),
        ({"optimizer": torch.optim.AdamW}, "AdamW was made without fused=True: its step would cost less with it"),
        ({"activation_checkpointing": "segments"}, "activation checkpointing is on, and the model is small"),
        ({"schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 3)}, "the schedule is a torch LRScheduler"),
        (
            {"accumulation_steps": 4},
            "the last window of an epoch holds 3 micro-batches; it is divided by its own weight",
        ),
    ],
)
def test_what_was_assumed_is_said_in_a_sentence(what, sentence) -> None:
    settings, source, step = said(**what)
    notes = list(summary.notes(step, source, settings))
    assert len(notes) == 1
    assert notes[0].startswith(sentence)
    assert notes[0].endswith(".")


def test_what_is_not_assumed_is_not_said() -> None:
    settings, source, step = said(Declared(), optimizer=adamw, schedule=lambda _: cosine(10))
    assert list(summary.notes(step, source, settings)) == []


def test_the_parameters_that_are_moved_are_counted() -> None:
    model = nn.Linear(3, 2)
    frozen = nn.Linear(5, 5).requires_grad_(False)
    both = nn.ModuleList([model, frozen])
    step = Step(both, mean, [sgd([model.weight, *frozen.parameters()], lr=0.1), sgd([model.bias], lr=0.1)])
    assert summary.parameter_count(step) == 8


def test_narrow_parameters_without_masters_and_a_slow_precision_are_said(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    for flat, notes in (
        ({}, []),
        (
            {"precision": "fp16"},
            ["this CPU has no instructions for fp16: it is slower here than fp32, up to 17 times."],
        ),
        (
            {"precision": "bf16_true"},
            [
                "parameters are bfloat16, so that a step below about 1/512 of a parameter is lost: "
                "gradient.master_parameters=true keeps it.",
                "this CPU has no instructions for bf16_true: it is slower here than fp32, up to 9 times.",
            ],
        ),
        ({"precision": "bf16_true", "master_parameters": True}, ["up to 9 times."]),
    ):
        settings = from_flat({"batch_size": 16, **flat})
        model = nn.Linear(3, 1)
        step = Trainer(model, MSE, sgd(model.parameters()), data=rows(16), settings=settings).step
        found = summary.notes(step, source_of(rows(16), settings.data), settings)
        assert len(found) == len(notes)
        assert all(note.endswith(end) for note, end in zip(found, notes, strict=True))


def test_what_changes_the_gradient_is_named_and_that_a_device_waits_for_it() -> None:
    settings = from_flat({"batch_size": 16})
    for free in (True, False):
        model = nn.Linear(3, 1)
        step = Step(
            model, MSE, sgd(model.parameters()), transforms=[noise(0.1), centralise()], skip_if=lambda report: None
        )
        if not free:
            FREE_READS.discard("cpu")
        try:
            (note,) = summary.notes(step, source_of(rows(16), settings.data), settings)
        finally:
            FREE_READS.add("cpu")
        waits = "" if free else ": the host waits for the verdict once a step"
        assert note == f"the gradient goes through Noise, Centralise and skip_if may leave a step out{waits}."
