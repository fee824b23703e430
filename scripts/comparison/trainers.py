"""The trainers, each as its documentation shows it, and other documented ways where such a way changes a figure."""

import contextlib
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from comparison.problem import Problem


def lightning(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return problem.mean(self.net, *batch)

        def configure_optimizers(self) -> Any:
            if problem.factor is None:
                return optimizer
            scheduler = {"scheduler": problem.schedule(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    saves: list[Any] = []
    if problem.folder is not None:
        saves = [ModelCheckpoint(problem.folder, every_n_train_steps=1, save_last=True)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=problem.epochs,
        accumulate_grad_batches=problem.accumulation,
        gradient_clip_val=problem.clip,
        logger=False,
        callbacks=saves,
        enable_checkpointing=bool(saves),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), problem.loader(), ckpt_path="last" if problem.resume else None)


def fabric(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The loop of its guide to gradient accumulation, with the two things set right that the guide leaves out: the
    loss is divided, and the first step comes after k micro-batches (`guide` has it as it is written)."""
    from lightning.fabric import Fabric

    if problem.folder is not None:
        raise NotImplementedError("by hand")
    of = Fabric(accelerator="cpu")
    model, optimizer = of.setup(net, optimizer)
    scheduler = problem.schedule(optimizer.optimizer)
    loader = of.setup_dataloaders(problem.loader())
    for _ in range(problem.epochs):
        model.train()
        for iteration, batch in enumerate(loader):
            is_accumulating = (iteration + 1) % problem.accumulation != 0
            with of.no_backward_sync(model, enabled=is_accumulating):
                of.backward(problem.mean(model, *batch) / problem.accumulation)
            if not is_accumulating:
                if problem.clip is not None:
                    of.clip_gradients(model, optimizer, max_norm=problem.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


def accelerate(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    of = Accelerator(cpu=True, gradient_accumulation_steps=problem.accumulation)
    model, optimizer, loader, scheduler = of.prepare(net, optimizer, problem.loader(), problem.schedule(optimizer))
    done, epoch_of_save = 0, 0
    if problem.resume and problem.folder is not None:
        saved = max(problem.folder.iterdir(), key=lambda path: int(path.name))
        of.load_state(saved)
        epoch_of_save, done = divmod(int(saved.name), len(loader))
    for epoch in range(epoch_of_save, problem.epochs):
        model.train()
        batches = of.skip_first_batches(loader, done) if done and epoch == epoch_of_save else loader
        for index, batch in enumerate(batches, start=done if epoch == epoch_of_save else 0):
            with of.accumulate(model):
                of.backward(problem.mean(model, *batch))
                if of.sync_gradients and problem.clip is not None:
                    of.clip_grad_norm_(model.parameters(), problem.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if problem.folder is not None and of.sync_gradients:
                of.save_state(problem.folder / str(epoch * len(loader) + index + 1))


class Items(Dataset):
    """Rows as the mappings that transformers wants."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __len__(self) -> int:
        return len(self.problem.inputs)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        inputs = "input_ids" if self.problem.own_loss else "inputs"
        return {inputs: self.problem.inputs[row], "labels": self.problem.targets[row]}


class WithLoss(nn.Module):
    """A model of one's own as transformers' trainer takes it: it returns the loss where it is given labels."""

    def __init__(self, problem: Problem, net: nn.Module) -> None:
        super().__init__()
        self.problem, self.net = problem, net

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = self.net(inputs)
        return {"logits": outputs} | ({} if labels is None else {"loss": self.problem.loss(outputs, labels)})


def transformers(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=str(problem.folder or folder),
            use_cpu=True,
            per_device_train_batch_size=problem.batch_size,
            gradient_accumulation_steps=problem.accumulation,
            num_train_epochs=problem.epochs,
            max_grad_norm=problem.clip or 0.0,
            train_sampling_strategy="sequential",
            save_strategy="no" if problem.folder is None else "steps",
            save_steps=1,
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(
            model=net if problem.own_loss else WithLoss(problem, net),
            args=arguments,
            train_dataset=Items(problem),
            optimizers=(optimizer, problem.schedule(optimizer)),
            **options,
        ).train(resume_from_checkpoint=problem.resume or None)


def ignite(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.handlers.param_scheduler import LRScheduler

    engine = create_supervised_trainer(
        net,
        optimizer,
        (lambda outputs, targets: outputs.loss) if problem.own_loss else problem.loss,
        prepare_batch=(lambda batch, **_: (batch, batch[1])) if problem.own_loss else (lambda batch, **_: batch),
        model_fn=lambda model, x: model(input_ids=x[0], labels=x[1]) if problem.own_loss else model(x),
        gradient_accumulation_steps=problem.accumulation,
        deterministic=options.get("deterministic", False),
    )
    when = options.get("schedule_when", Events.ITERATION_STARTED)
    engine.add_event_handler(when, LRScheduler(problem.schedule(optimizer)))
    if problem.clip is not None:
        raise NotImplementedError("its trainer has no clip")
    if problem.folder is not None:
        parts = {"trainer": engine, "model": net, "optimizer": optimizer}
        if problem.resume:
            saved = max(problem.folder.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
            Checkpoint.load_objects(parts, torch.load(saved, weights_only=False))
        saves = Checkpoint(parts, DiskSaver(str(problem.folder), require_empty=False), n_saved=None)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=problem.accumulation), saves)
    engine.run(problem.loader(), max_epochs=problem.epochs)


def this(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    from trainer import Trainer, model_loss, supervised
    from trainer.optim import Schedule

    Trainer(
        net,
        model_loss() if problem.own_loss else supervised(problem.loss),
        optimizer,
        data=Items(problem) if problem.own_loss else (problem.inputs, problem.targets),
        schedule=None if problem.factor is None else Schedule(problem.factor),
        batch_size=problem.batch_size,
        shuffle=False,
        accumulation_steps=problem.accumulation,
        clip_norm=problem.clip,
        epochs=problem.epochs,
        precision="fp64" if next(net.parameters()).dtype == torch.float64 else "fp32",
        device="cpu",
        folder=problem.folder,
        checkpoint_every=1,
        checkpoint_clock="steps",
    ).fit(resume="auto" if problem.resume else "never")


TRAINERS: dict[str, tuple[str, Callable[..., None]]] = {
    "Lightning": ("lightning", lightning),
    "Fabric": ("lightning", fabric),
    "Accelerate": ("accelerate", accelerate),
    "HF Trainer": ("transformers", transformers),
    "Ignite": ("pytorch-ignite", ignite),
    "this": ("gradtrainer", this),
}


# Other ways that they document, where such a way changes a figure above.


def tokens_by_hand(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Accelerate's guide to samples of variable size: the window is drawn first, its targets are counted."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    of = Accelerator(cpu=True, gradient_accumulation_steps=problem.accumulation)
    model, optimizer, loader = of.prepare(net, optimizer, problem.loader())
    batches = iter(loader)
    while window := list(itertools.islice(batches, problem.accumulation)):
        count = sum(int((targets != -100).sum()) for _, targets in window)
        for index, (inputs, targets) in enumerate(window):
            last = index == len(window) - 1
            with contextlib.nullcontext() if last else of.no_sync(model):
                loss = F.cross_entropy(model(inputs), targets, reduction="sum") * problem.accumulation / count
                of.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def loss_function(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """HF Trainer with `compute_loss_func`, which is told how many targets the window has."""

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    transformers(problem, net, optimizer, compute_loss_func=compute)


def counted_schedule(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Ignite with the schedule attached to every k-th iteration."""
    from ignite.engine import Events

    # It steps before it acts, so the first event only sets the rate that the optimizer has already.
    ignite(
        problem,
        net,
        optimizer,
        schedule_when=Events.ITERATION_STARTED(event_filter=lambda engine, at: (at - 1) % problem.accumulation == 0),
    )


def deterministic(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Ignite's DeterministicEngine, which walks the loader up to where the run was."""
    ignite(problem, net, optimizer, deterministic=True)


def guide(problem: Problem, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The loop of Fabric's guide to gradient accumulation as it is written."""
    from lightning.fabric import Fabric

    of = Fabric(accelerator="cpu")
    model, optimizer = of.setup(net, optimizer)
    loader = of.setup_dataloaders(problem.loader())
    for iteration, batch in enumerate(loader):
        is_accumulating = iteration % problem.accumulation != 0
        with of.no_backward_sync(model, enabled=is_accumulating):
            of.backward(problem.mean(model, *batch))
        if not is_accumulating:
            optimizer.step()
            optimizer.zero_grad()


OTHER_WAYS = [
    ("HF Trainer", "token weights", "`compute_loss_func` that divides by `num_items_in_batch`", loss_function),
    ("Accelerate", "token weights", "its guide's loop for samples of variable size", tokens_by_hand),
    ("Ignite", "schedule", "the handler on every k-th iteration", counted_schedule),
    ("Ignite", "resume", "`deterministic=True`", deterministic),
    ("Fabric", "ragged batch", "its guide's accumulation loop word for word: no division, first step after one", guide),
]
