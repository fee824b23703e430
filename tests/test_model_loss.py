"""A model's own mean loss, weighed by what it is a mean of: found by measurement, or refused."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from ranks import over_ranks
from reference import farthest
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import Step, Sum, Trainer, model_loss
from trainer.distributed import ManyProcesses
from trainer.errors import ConfigError, ObjectiveError
from trainer.gradient.report import FREE_READS

SYMBOLS = 7


class Tagger(nn.Module):
    """Logits of shape (rows, length, SYMBOLS), and the loss that `way` says."""

    def __init__(self, way: str, zero: bool = False) -> None:
        super().__init__()
        self.way = way
        self.table = nn.Embedding(SYMBOLS, 5)
        self.last = nn.Linear(5, SYMBOLS)
        if zero:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> dict:
        logits = self.last(self.table(input_ids).cumsum(1))
        if labels is None:
            return {"loss": None, "logits": logits}
        if self.way == "shifted":
            loss = mean(logits[:, :-1], labels[:, 1:])
        elif self.way == "labels":
            loss = mean(logits, labels)
        elif self.way == "narrow":
            loss = mean(logits[:, :-1].float(), labels[:, 1:])
        elif self.way == "masked":  # leaves out what the mask leaves out, beside the labels that say so
            loss = mean(logits, labels.where(attention_mask == 1, -100))
        else:
            loss = mean(logits, labels) + 0.1 * logits.var()
        return {"loss": loss, "logits": logits}


def mean(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batch(rows: int, length: int, seed: int, ignored: float = 0.4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SYMBOLS, (rows, length), generator=draw)
    labels = ids.masked_fill(torch.rand(rows, length, generator=draw) < ignored, -100)
    labels[0, 1] = ids[0, 1]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


WINDOW = [batch(2, 5, 1), batch(3, 9, 2), batch(1, 4, 3)]


def step_of(model: nn.Module, **options) -> Step:
    return Step(model, model_loss(**options), torch.optim.SGD(model.parameters(), lr=0.0))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: nn.Module, window: list, shift: int) -> dict[str, Tensor]:
    """Σ of every label's cross-entropy, in one sum, over their number."""
    model = copy.deepcopy(model)
    logits = [_logits(model, one) for one in window]
    kept = [one["labels"][:, shift:] for one in window]
    flat = torch.cat([row[:, : row.shape[1] - shift].flatten(0, 1) for row in logits])
    labels = torch.cat([one.flatten() for one in kept])
    total = functional.cross_entropy(flat, labels, reduction="sum")
    (total / (labels != -100).sum()).backward()
    return gradients(model)


def _logits(model: nn.Module, micro_batch: dict) -> Tensor:
    output = model(**micro_batch)
    return output["logits"]


@pytest.mark.parametrize(("way", "shift"), [("shifted", 1), ("labels", 0), ("narrow", 1)])
@pytest.mark.parametrize("zero", [False, True])
def test_ragged_windows_have_the_gradient_of_all_their_labels_at_once(way, shift, zero):
    torch.manual_seed(0)
    model = Tagger(way, zero).double()  # zero: logits that are all equal give every reading the same number
    step = step_of(model)
    report = step(WINDOW)
    assert report.weight == sum(int((one["labels"][:, shift:] != -100).sum()) for one in WINDOW)
    assert farthest(gradients(model), by_hand(model, WINDOW, shift)) < 1e-12
    assert step.objective.what.startswith("labels after" if shift else "labels that")


def test_rows_and_tokens_are_counted_in_mappings():
    model = Tagger("shifted")
    report = step_of(model)(WINDOW)
    assert report.clocks["rows"] == 6 and report.clocks["tokens"] == 2 * 5 + 3 * 9 + 4


def test_a_micro_batch_without_a_label_counts_nothing_wherever_it_stands():
    torch.manual_seed(0)
    model = Tagger("shifted").double()
    empty = batch(2, 5, 4)
    empty["labels"] = torch.full_like(empty["labels"], -100)
    step_of(model)([WINDOW[0], empty])
    alone = gradients(model)
    step_of(model)([WINDOW[0]])
    assert farthest(gradients(model), alone) < 1e-15
    with pytest.raises(ObjectiveError, match=r"the first loss of Tagger is a mean over nothing.*count="):
        step_of(model)([empty, WINDOW[0]])
    assert step_of(model, count="shifted")([empty, WINDOW[0]]).skipped is False
    assert farthest(gradients(model), alone) < 1e-15


def test_what_no_reading_explains_is_refused_with_the_readings_that_were_tried():
    with pytest.raises(ObjectiveError, match=r"what the loss of Tagger \(.*\) is a mean of cannot be told.*count="):
        step_of(Tagger("with a term of its own"))(WINDOW)


def test_what_shows_only_later_is_seen_later():
    torch.manual_seed(0)
    step = step_of(Tagger("masked"))
    step(WINDOW)
    padded = batch(2, 5, 5, ignored=0.0)
    padded["attention_mask"][:, 3:] = 0
    with pytest.raises(ObjectiveError, match="micro-batch 4: the loss of Tagger is .* no longer the mean over labels"):
        step([padded])


def test_a_first_loss_that_is_not_finite_is_a_skip_and_measured_at_the_next():
    torch.manual_seed(0)
    model = Tagger("shifted").double()
    step = step_of(model)
    kept = model.last.bias.data.clone()
    model.last.bias.data[0] = math.inf
    assert step(WINDOW).skipped is True
    model.last.bias.data.copy_(kept)
    assert step(WINDOW).skipped is False
    assert farthest(gradients(model), by_hand(model, WINDOW, 1)) < 1e-12


@pytest.mark.parametrize("kind", ["squares", "one output", "binary", "classes"])
def test_rows_of_numbers_and_classes(kind):
    torch.manual_seed(0)
    losses = {"binary": functional.binary_cross_entropy_with_logits, "classes": functional.cross_entropy}

    class Head(nn.Linear):
        def forward(self, x, labels):
            logits = super().forward(x)
            inner = logits.squeeze(1) if kind == "one output" else logits
            return SimpleNamespace(loss=losses.get(kind, functional.mse_loss)(inner, labels), logits=logits)

    model = Head(4, 1 if kind == "one output" else 3).double()
    labels = torch.rand(7, 3, dtype=torch.float64)
    labels = {"one output": labels[:, 0], "classes": torch.arange(7) % 3}.get(kind, labels)
    x = torch.randn(7, 4, dtype=torch.float64)
    step_of(model)([{"x": x[:5], "labels": labels[:5]}, {"x": x[5:], "labels": labels[5:]}])
    found = gradients(model)
    model.zero_grad()
    model(x, labels).loss.backward()
    assert farthest(found, gradients(model)) < 1e-14


def test_a_tuple_in_and_a_tuple_out():
    torch.manual_seed(0)

    class Pair(Tagger):
        def forward(self, ids, targets):
            logits = self.last(self.table(ids))
            return logits, mean(logits, targets)

    model = Pair("").double()
    pairs = [(one["input_ids"], one["labels"]) for one in WINDOW]
    report = step_of(model)(pairs)
    assert report.weight == sum(int((labels != -100).sum()) for _, labels in pairs)


def test_what_is_told_is_taken_as_told():
    torch.manual_seed(0)
    model = Tagger("with a term of its own").double()
    weights = {}
    for count in ("shifted", "labels", "rows", lambda micro_batch: len(micro_batch["labels"]) * 2):
        weights[str(count)[:7]] = step_of(model, count=count)(WINDOW).weight
    kept = [one["labels"] for one in WINDOW]
    assert list(weights.values()) == [
        sum(int((one[:, 1:] != -100).sum()) for one in kept), sum(int((one != -100).sum()) for one in kept), 6.0, 12.0,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="count='shiftd' is not possible: did you mean 'shifted'"):
        model_loss(count="shiftd")


def test_a_model_without_a_loss_and_a_micro_batch_of_another_kind():
    no_labels = {name: one for name, one in WINDOW[0].items() if name != "labels"}
    with pytest.raises(ObjectiveError, match="without a loss: models of transformers return one where .* 'labels'"):
        step_of(Tagger("shifted"))([no_labels])
    with pytest.raises(ObjectiveError, match="not Tensor"):
        step_of(Tagger("shifted"))([torch.zeros(3)])
    with pytest.raises(ObjectiveError, match="before the model's first forward"):
        model_loss().weight(WINDOW[0])


def test_a_trainer_on_mappings_evaluates_by_the_same_count(capsys):
    torch.manual_seed(0)
    model = Tagger("shifted")
    trainer = Trainer(
        model, model_loss(), torch.optim.SGD(model.parameters(), lr=0.1), data=WINDOW, evaluation_data=WINDOW, epochs=2,
        accumulation_steps=2, precision="fp64",
    )  # fmt: skip
    found = trainer.fit().metrics["loss"]
    total = weight = 0.0
    for one in WINDOW:
        count = int((one["labels"][:, 1:] != -100).sum())
        total, weight = total + float(model(**one)["loss"].detach()) * count, weight + count
    assert found == pytest.approx(total / weight, rel=1e-12)
    assert "divided by what the model's loss is a mean of" in capsys.readouterr().out
    assert (
        repr(trainer.step.objective)
        == "model_loss(), weighed by labels after the first of each row that are not ignored"
    )


def test_the_total_is_taken_where_the_models_own_loss_is_narrower_than_its_logits():
    model = Tagger("narrow")
    objective = model_loss()
    assert isinstance(objective(model, WINDOW[0]), Tensor)
    assert isinstance(objective(model.double(), WINDOW[0]), Sum)


def test_a_weight_that_is_asked_for_before_the_first_forward_is_measured_without_a_trace():
    class Normed(Tagger):
        def __init__(self) -> None:
            super().__init__("shifted")
            self.norm = nn.BatchNorm1d(5)
            self.drop = nn.Dropout(0.5)

        def forward(self, input_ids, labels=None, attention_mask=None):
            self.norm(self.table(input_ids).flatten(0, 1))
            self.drop(torch.ones(3))
            return super().forward(input_ids, labels)

    torch.manual_seed(0)
    model = Normed()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    step = step_of(model)
    assert step.objective.weight(WINDOW[1]) == (WINDOW[1]["labels"][:, 1:] != -100).sum()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


# On a device, where nothing is read, and over ranks, where weights are summed before the first forward.


@pytest.fixture
def no_read_is_free():
    FREE_READS.discard("cpu")
    yield
    FREE_READS.add("cpu")


class Reads(TorchDispatchMode):
    """Counts what brings numbers to the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_on_a_device_an_empty_micro_batch_counts_nothing_and_a_step_reads_nothing(no_read_is_free):
    torch.manual_seed(0)
    model = Tagger("shifted")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    step = Step(model, model_loss(), optimizer)
    empty = batch(2, 5, 4)
    empty["labels"] = torch.full_like(empty["labels"], -100)
    step([WINDOW[0], empty])
    with torch.no_grad():
        before = {name: p.clone() for name, p in model.named_parameters()}
    report = step([*WINDOW, empty])  # micro-batches 3 to 6: the fourth is looked at
    assert report.skipped is False and report.weight == sum(int((one["labels"][:, 1:] != -100).sum()) for one in WINDOW)
    found = gradients(model)
    again = Tagger("shifted")
    again.load_state_dict(before)
    assert farthest(found, by_hand(again.double(), WINDOW, 1)) < 1e-5
    with Reads() as reads:
        step([WINDOW[0]])  # the seventh
    assert reads.count == 0


def one_rank(rank: int, world: int) -> tuple[dict[str, Tensor], float]:
    del world
    torch.manual_seed(0)
    model = Tagger("shifted").double()
    step = Step(model, model_loss(), torch.optim.SGD(model.parameters(), lr=0.0), ranks=ManyProcesses())
    report = step(WINDOW[:1] if rank else WINDOW[1:])
    return gradients(model), report.weight


def test_over_two_ranks_it_is_the_gradient_of_all_labels():
    torch.manual_seed(0)
    true = by_hand(Tagger("shifted").double(), WINDOW, 1)
    for found, weight in over_ranks(one_rank):
        assert weight == sum(int((one["labels"][:, 1:] != -100).sum()) for one in WINDOW)
        assert farthest(found, true) < 1e-12
