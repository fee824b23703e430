"""The certificate on loops that somebody else wrote: by hand, with Accelerate, with Lightning."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from trainer import certify, supervised
from trainer.certificate import Certificate

K = 4
LR = 2.0**-4
Pair = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def window(*sizes: int) -> list[Pair]:
    drawn = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=drawn), torch.randn(n, 2, generator=drawn)) for n in sizes]


def certified(loop: Any, *sizes: int, lr: float | None = None, model: nn.Module | None = None) -> Certificate:
    return certify(model or net(), supervised(nn.MSELoss()), data=window(*sizes), loop=loop, lr=lr)


def textbook(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
    """Each loss over K, however many there are."""
    for inputs, targets in micro_batches:
        (F.mse_loss(model(inputs), targets) / K).backward()


def right(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
    rows = sum(len(inputs) for inputs, _ in micro_batches)
    for inputs, targets in micro_batches:
        (F.mse_loss(model(inputs), targets) * (len(inputs) / rows)).backward()


def stepping(loop: Any) -> Any:
    """The loop with its own SGD step."""

    def stepped(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        loop(model, micro_batches)
        optimizer.step()
        optimizer.zero_grad()

    return stepped


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (4, 4, 4, 2), (3,), (5, 1)])
def test_a_right_loop_passes(sizes: tuple[int, ...]) -> None:
    assert certified(right, *sizes).passed
    assert certified(stepping(right), *sizes, lr=LR).passed


def test_a_textbook_loop_passes_on_a_full_even_window() -> None:
    assert certified(textbook, 4, 4, 4, 4).passed


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    ("sizes", "error", "says"),
    [
        ((4, 4), 0.5, "0.5"),  # the tail: two micro-batches over four
        (
            (4, 4, 4, 1),
            None,
            "counts 0.25; by their weights they count 0.3077",
        ),  # a ragged last batch counts as much as the others
    ],
)
def test_a_textbook_loop_is_told_what_it_gets_wrong(
    sizes: tuple[int, ...], error: float | None, says: str, stepped: bool
) -> None:
    loop = stepping(textbook) if stepped else textbook
    certificate = certified(loop, *sizes, lr=LR if stepped else None)
    assert not certificate.passed
    assert certificate.findings[0].kind == "weights", str(certificate)
    assert says in certificate.findings[0].reason, str(certificate)
    if error is not None:
        assert certificate.error == pytest.approx(error, abs=1e-4)


def test_a_loop_that_forgets_a_micro_batch() -> None:
    certificate = certified(lambda model, batches: right(model, batches[:-1]), 4, 4, 4)
    assert not certificate.passed
    assert certificate.findings[0].kind == "weights", str(certificate)


def test_a_loop_that_forgets_to_zero() -> None:
    def loop(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
        right(model, micro_batches)
        right(model, micro_batches)

    certificate = certified(loop, 4, 4)
    assert not certificate.passed and certificate.error == pytest.approx(1.0, abs=1e-4)


def test_a_loop_that_clips_is_not_the_gradient() -> None:
    def loop(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
        right(model, micro_batches)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    certificate = certified(loop, 4, 4)
    assert not certificate.passed


def test_a_loop_that_leaves_a_parameter_out() -> None:
    def loop(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
        right(model, micro_batches)
        model[0].bias.grad = None

    certificate = certified(loop, 4, 4)
    assert not certificate.passed
    assert "0.bias" in str(certificate), str(certificate)


def test_a_loop_that_flips_the_sign_of_one_parameter() -> None:
    def loop(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
        right(model, micro_batches)
        model[2].weight.grad.neg_()

    certificate = certified(loop, 4, 4)
    assert not certificate.passed
    assert certificate.path[0].name == "2.weight" and certificate.path[0].cosine == pytest.approx(-1)


def test_a_loop_that_puts_a_frozen_norm_back_to_train() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model[1].eval()

    def loop(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
        model.train()
        right(model, micro_batches)

    certificate = certified(loop, 4, 4, model=model)
    assert not certificate.passed
    assert not model[1].training, "the model is as it was"


@pytest.mark.parametrize(("sizes", "passes"), [((4, 4, 4, 4), True), ((4, 4), False), ((4, 4, 4, 1), False)])
def test_accelerate(sizes: tuple[int, ...], passes: bool) -> None:
    accelerate = pytest.importorskip("accelerate")

    def loop(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=K)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        loader = DataLoader(Drawn(micro_batches), batch_size=None)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()

    certificate = certified(loop, *sizes, lr=LR)
    assert certificate.passed is passes, str(certificate)
    assert passes or certificate.findings[0].kind == "weights", str(certificate)


class Drawn(Dataset):  # type: ignore[type-arg]
    """Micro-batches that are there already."""

    def __init__(self, micro_batches: Sequence[Pair]) -> None:
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __getitem__(self, index: int) -> Pair:
        return self.micro_batches[index]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sizes", "passes"), [((4, 4, 4, 4), True), ((4, 4), False), ((4, 4, 4, 1), False)])
def test_lightning(sizes: tuple[int, ...], passes: bool) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Pair, index: int) -> Tensor:
            return F.mse_loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    def loop(model: nn.Module, micro_batches: Sequence[Pair]) -> None:
        lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=K,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Module(model), DataLoader(Drawn(micro_batches), batch_size=None))

    certificate = certified(loop, *sizes, lr=LR)
    assert certificate.passed is passes, str(certificate)
    assert passes or certificate.findings[0].kind == "weights", str(certificate)
