"""Small runs of every kind, for the tests of the loop and of its checkpoints."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainer import Report, Step, Sum, Trainer, supervised
from trainer.checkpoint import manifest, store
from trainer.checkpoint.folder import found
from trainer.optim import Manual, adamw, cosine, sgd

QUIET = {"console": False, "tensorboard": False, "metrics_file": False}
MSE = supervised(nn.MSELoss())


def rows(count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), (inputs @ torch.tensor([[1.0], [-2.0], [0.5]]).double() + 0.3).to(dtype)


class Items(Dataset[Any]):
    """Rows with noise that comes from torch's and numpy's generators."""

    def __init__(self, count: int) -> None:
        self.tensors = rows(count)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.tensors[0][row] + 0.1 * torch.randn(3) + 0.1 * numpy.random.rand(), self.tensors[1][row]


class Line:
    """A plain object that holds tensors, and a module with statistics."""

    def __init__(self) -> None:
        self.w = torch.randn(3, 1, requires_grad=True)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.w


def net(dropout: float = 0.3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1))


def error(model: Any, batch: Any) -> dict[str, Sum]:
    wrong = ((model(batch[0]) if callable(model) else model.forward(batch[0])) - batch[1]).abs()
    return {"error": Sum(wrong.sum(), len(wrong))}


class Interrupted:
    """An objective that is stopped by Ctrl-C in its n-th forward of training, after all its draws."""

    def __init__(self, objective: Any, forwards: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self._objective = objective
        self.left = forwards
        self._error = error
        if hasattr(objective, "weight"):
            self.weight = objective.weight

    def __call__(self, model: Any, batch: Any) -> Any:
        answer = self._objective(model, batch)
        if torch.is_grad_enabled():
            self.left -= 1
            if self.left == 0:
                raise self._error("stopped")
        return answer


def kinds(kind: str, poison: float) -> tuple[Any, Any, dict[str, Any]]:
    """A model, its optimizer (its rates spoiled by a factor) and what else a Trainer is given."""
    model: Any = Line() if kind == "plain" else net()
    more: dict[str, Any] = {"data": rows(23), "batch_size": 3, "accumulation_steps": 3}
    if kind == "adamw":
        return (
            model,
            adamw(model.parameters(), lr=0.01 * poison),
            more | {"schedule": cosine(12, warmup=2), "clip_norm": 0.5},
        )
    if kind == "momentum":
        return model, sgd(model.parameters(), lr=0.01 * poison, momentum=0.9), more | {"zero_grad": "zeros"}
    if kind == "items":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * poison, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return model, optimizer, more | {"data": Items(23), "schedule": schedule}
    if kind == "loader":
        loader = DataLoader(TensorDataset(*rows(23)), batch_size=3, shuffle=True)
        return model, adamw(model.parameters(), lr=0.01 * poison), more | {"data": loader}
    if kind == "plain":
        return model, Manual([model.w, *model.norm.parameters()], lr=0.01 * poison), more
    if kind == "never":
        return model, sgd(model.parameters(), lr=0.002 * poison), more | {"zero_grad": "never"}
    if kind == "tensor_rate":
        return model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01 * poison), fused=True), more
    if kind == "factored":
        return model, torch.optim.Adafactor(model.parameters(), lr=0.01 * poison), more
    parameters = list(model.parameters())
    two = [adamw(parameters[:2], lr=0.01 * poison), sgd(parameters[2:], lr=0.01 * poison, momentum=0.5)]
    return model, two, more | {"reduction": "micro_batches"}


KINDS = ["adamw", "momentum", "items", "loader", "plain", "never", "tensor_rate", "factored", "two"]


def trainer_of(kind: str, *, start: int = 0, poison: float = 1.0, objective: Any = MSE, **settings: Any) -> Trainer:
    """A run of a kind. `start` seeds the model's start, which a resumed run must not depend on."""
    torch.manual_seed(start)
    model, optimizer, more = kinds(kind, poison)
    wanted = {**QUIET, "seed": 3, "log_every": 1, **more, **settings}
    return Trainer(model, objective, optimizer, evaluation_data=rows(5, seed=2), metrics=error, **wanted)


def bits(value: Any) -> Any:
    """A nested state as something that compares bit for bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value.hex() if isinstance(value, float) else value


def saved(folder: Path, which: str = "last") -> dict[str, Any]:
    """The state in a run's last checkpoint, or in its best."""
    return store.load(found(folder / which))


def forged(path: Path, files: dict[str, bytes], names: dict[str, str] | None = None) -> None:
    """A checkpoint made by hand, with the right hashes; `names` are what the manifest calls its files."""
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    entries = {
        (names or {}).get(name, name): manifest.Entry(len(content), hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    }
    whole = manifest.Manifest(1, {"steps": 1}, None, entries)
    (path / manifest.NAME).write_bytes(whole.encoded())


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times, and without the name of the run's folder."""
    text = (folder / "metrics.jsonl").read_text().replace(str(folder), "RUN")
    return [{name: v for name, v in json.loads(line).items() if name != "seconds"} for line in text.splitlines()]


def taken(step: Step, window: list[Any], whole: bool) -> Report:
    """One step on a window: given whole, or micro-batch by micro-batch without telling what is to come."""
    if whole:
        return step(window)
    for micro_batch in window:
        step.accumulate(micro_batch)
    return step.finish()
