"""What each toggle costs, as ratios on this machine, in a minute or two. python docs/toggles/cost.py

Two things that differ in one toggle take turns, 15 times each, on one thread; what is printed is the median CPU time of
the second over that of the first (of a checkpoint: milliseconds of the step's thread and of the processor). `digits`
is that recipe's model on 32 of its images; `deep` has 12 layers of 512 and 256 rows, so that there the arithmetic is
what takes the time.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from time import process_time, thread_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from trainer.recipes import char_lm, custom_relu, digits, xor

from trainer import Step, Trainer, certify, per_sample, supervised
from trainer.checkpoint.run_state import LAST
from trainer.data import source_of
from trainer.diagnose.sources import SourceGradients
from trainer.diagnose.terms import TermGradients
from trainer.evaluate import Evaluation
from trainer.gradient.precision import width
from trainer.gradient.transforms import centralise, clip_by_norm, freeze, noise
from trainer.optim import Manual, adamw, cosine, sgd
from trainer.settings import DataSettings

TURNS = 15
LOSS = supervised(nn.CrossEntropyLoss())
DATA = digits.images()


class Items(Dataset[Any]):
    """The training rows, one by one."""

    def __len__(self) -> int:
        return len(DATA.train[0])

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return DATA.train[0][row], DATA.train[1][row]


def compare(
    name: str, first: Callable[[], Any], second: Callable[[], Any], clock: Callable[[], float] = process_time
) -> None:
    """Write median over median of the turns that the two take."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + 2):
        for index, run in enumerate((first, second)):
            began = clock()
            run()
            if turn > 1:
                times[index].append(clock() - began)
    sys.stdout.write(f"{name:55} {statistics.median(times[1]) / statistics.median(times[0]):.2f}\n")
    sys.stdout.flush()


def deep() -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(512, 512), nn.ReLU())))


def steps(
    count: int = 60,
    size: int = 32,
    parts: int = 1,
    model: Callable[[], nn.Module] = digits.mlp,
    make: Callable[..., Any] = adamw,
    wide: bool = False,
    objective: Any = LOSS,
    watch: Callable[[Step], Any] = id,
    **settings: Any,
) -> Callable[[], None]:
    """A run of `count` steps on the same window of `parts` micro-batches, `size` rows in all; `watch` gets the step."""
    torch.manual_seed(0)
    net = model()
    inputs, classes = (torch.randn(size, 512), torch.arange(size)) if wide else (part[:size] for part in DATA.train)
    dtype = width(settings.get("precision", "fp32"))
    net, inputs = net.to(dtype), inputs.to(dtype)
    window = tuple(zip(inputs.chunk(parts), classes.chunk(parts), strict=True))
    step = Step(net, objective, make(net.parameters()), **settings)
    watch(step)

    def run() -> None:
        for _ in range(count):
            step(window)

    return run


def two_groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    first, *others = parameters
    return adamw([{"params": [first], "clip_norm": 1.0}, {"params": others, "clip_norm": 1.0}])


def wide(**settings: Any) -> Callable[[], None]:
    return steps(count=1, size=256, model=deep, wide=True, **settings)


def two_terms(model: Any, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    outputs = model(micro_batch[0])
    return {"class": nn.functional.cross_entropy(outputs, micro_batch[1]), "size": outputs.square().mean()}


def evaluation(grad_mode: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model, evaluate = digits.mlp(), Evaluation(LOSS, digits.accuracy, grad_mode)
    batches = source_of(DATA.evaluation, DataSettings(), evaluation=True)

    def run() -> None:
        for _ in range(5):
            evaluate(model, batches.micro_batches(0, 0, 0))

    return run


def epoch(data: Any) -> Callable[[], None]:
    source = source_of(data, DataSettings())
    return lambda: [None for _ in source.micro_batches(0, 0, 0)]


def fit(**settings: Any) -> Callable[[], None]:
    """Three epochs, 135 steps, with whatever is written."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = digits.mlp()
            quiet = {"console": False, "tensorboard": False, "metrics_file": False, "checkpoint_last": False}
            wanted = {**quiet, "epochs": 3, "folder": folder, **settings}
            Trainer(model, LOSS, adamw(model.parameters()), data=DATA.train, seed=0, **wanted).fit()

    return run


def save(name: str, model: nn.Module, objective: Any, batch: tuple[Tensor, Tensor]) -> None:
    """Write what a save takes of the step's thread, and of the processor until it is on the disk, beside a step."""
    with tempfile.TemporaryDirectory() as folder:
        optimizer = adamw(model.parameters())
        trainer = Trainer(model, objective, optimizer, data=batch, folder=folder, steps=1, console=False)
        times: tuple[list[float], list[float], list[float]] = ([], [], [])
        for turn in range(TURNS + 2):
            began = thread_time()
            trainer.step([batch])
            step = thread_time() - began
            with trainer.state.opened():
                began, all_began = thread_time(), process_time()
                trainer.state.save(LAST)
                own = thread_time() - began
            if turn > 1:
                for index, seconds in enumerate((step, own, process_time() - all_began)):
                    times[index].append(seconds)
    step, own, whole = (1000 * statistics.median(each) for each in times)
    figures = f"ms of a step {step:.1f}, of a save {own:.1f}, until it is written {whole:.1f}"
    sys.stdout.write(f"checkpoints: {name}, {figures}\n")
    sys.stdout.flush()


class SteadyState:
    """A logger that only looks at the clock: CPU seconds from the first tenth of the steps to the last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.count, self.began, self.seconds = steps, 0, 0.0, 0.0

    def tick(self) -> None:
        self.count += 1
        if self.count == self.steps // 10:
            self.began = process_time()
        elif self.count == self.steps:
            self.seconds = (process_time() - self.began) / (self.steps - self.steps // 10)


RECIPES: dict[str, tuple[Callable[[], Any], Any, Callable[[], Any], dict[str, Any]]] = {
    "xor": (lambda: xor.ManualLinear(2, 1), supervised(nn.MSELoss()), lambda: xor.table().train, {"steps": 3000}),
    "digits": (digits.mlp, LOSS, lambda: DATA.train, {"steps": 400}),
    "char_lm": (
        lambda: char_lm.Transformer(128, depth=2),
        char_lm.NextCharacter(),
        lambda: char_lm.library().train,
        {"steps": 40, "batch_size": 16},
    ),
}


def steady(recipe: str, **settings: Any) -> float:
    """CPU seconds of a step of a run with TensorBoard, every 50 steps, and no instrument but those asked for."""
    make, objective, data, usual = RECIPES[recipe]
    torch.manual_seed(0)
    model = make()
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else [model.w, model.b]
    quiet = {"console": False, "checkpoint_last": False, "log_every": 50, "seed": 0}
    wanted = {**quiet, "audit": False, "heat_map": False, "capture": "none", **usual, **settings}
    clock = SteadyState(wanted["steps"])
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model, objective, adamw(parameters), data=data(), folder=folder, loggers=[clock], **wanted).fit()
    return clock.seconds


def instrument(name: str, recipe: str, plain: dict[str, Any] | None = None, **settings: Any) -> None:
    """Write what an instrument adds to a step: the ratio of the medians, and their difference."""
    without, beside = plain or {}, {**(plain or {}), **settings}
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        times[0].append(steady(recipe, **without))
        times[1].append(steady(recipe, **beside))
    first, second = (statistics.median(each) for each in times)
    sys.stdout.write(f"{name:55} {second / first:.3f}, {1e6 * (second - first):+.1f} µs a step\n")
    sys.stdout.flush()


def instruments() -> None:
    for recipe in RECIPES:
        on = {"audit": True, "heat_map": True, "capture": "nonfinite"}
        instrument(f"diagnose: all that is on by default over none, {recipe}", recipe, **on)
    for every in (1, 50):
        instrument(f"diagnose: update_ratio={every} over none, digits", "digits", update_ratio=every)
    for every in (1, 10):
        four = {"accumulation_steps": 4, "batch_size": 8}
        instrument(f"diagnose: noise_scale={every} over none, digits", "digits", four, noise_scale=every)


def looking() -> None:
    """What it costs to look at the gradients of terms, sources and rows, and at custom Functions."""

    def terms(step: Step, every: int) -> None:
        TermGradients(step, every)

    def sources(step: Step, every: int) -> None:
        SourceGradients(step, every, lambda batch: [row % 2 for row in range(len(batch[0]))])

    for name, hang in (("term_gradients", terms), ("source_gradients", sources)):
        for every in (1, 50):
            watch = partial(hang, every=every)
            of_two = f"diagnose: {name} of two, one in {every}"
            compare(f"{of_two}, digits", steps(objective=two_terms), steps(objective=two_terms, watch=watch))
        watch = partial(hang, every=1)
        compare(f"{of_two[:-2]}1, deep", wide(objective=two_terms), wide(objective=two_terms, watch=watch))
    rows = tuple(tensor[:480] for tensor in DATA.train)
    of_rows = partial(per_sample, digits.mlp(), LOSS, rows)
    compare("diagnose: gradients of 480 rows over 15 steps on them", steps(count=15), of_rows)
    check = partial(certify, custom_relu.mlp(), LOSS, data=[tuple(tensor[:32] for tensor in rows)])
    compare("certificate: gradcheck over none, custom_relu", partial(check, gradcheck=None), check)


def main() -> None:
    torch.set_num_threads(1)
    instruments()
    compare("accumulation: 4 x 8 rows over 1 x 32, digits", steps(), steps(parts=4))
    compare("accumulation: 4 x 64 rows over 1 x 256, deep", wide(), wide(parts=4))
    for reduction in ("sum", "micro_batches"):
        compare(f"reduction: {reduction} over mean, 4 x 8", steps(parts=4), steps(parts=4, reduction=reduction))
    for how in ("zeros", "never"):
        compare(f"zero_grad: {how} over set_to_none", steps(), steps(zero_grad=how))
    compare("clipping: clip_norm over none", steps(), steps(clip_norm=1.0))
    compare("clipping: clip_value over none", steps(), steps(clip_value=1.0))
    compare("clipping: clip_adaptive over none", steps(), steps(clip_adaptive=0.01))
    compare("clipping: clip_adaptive over none, deep", wide(), wide(clip_adaptive=0.01))
    compare("clipping: two groups by norm over none", steps(), steps(make=two_groups))
    shaping = {
        "noise": noise(1e-3),
        "centralise": centralise(),
        "freeze": freeze("0.*"),
        "clip_by_norm": clip_by_norm(1),
    }
    for name, transform in shaping.items():
        compare(f"transforms: {name} over none", steps(), steps(transforms=[transform]))
        compare(f"transforms: {name} over none, deep", wide(), wide(transforms=[transform]))
    compare("nonfinite: skip_if over none", steps(), steps(skip_if=lambda report: report.grad_norm > 1e9))
    compare("nonfinite: allow over skip", steps(), steps(nonfinite="allow"))
    compare("nonfinite: raise over skip", steps(), steps(nonfinite="raise"))
    compare("activation checkpointing: 4 segments over none, digits", steps(), steps(activation_checkpointing=4))
    compare("activation checkpointing: 4 segments over none, deep", wide(), wide(activation_checkpointing=4))
    looking()
    for precision in ("bf16", "bf16_true", "fp16", "fp64"):
        compare(f"precision: {precision} over fp32, digits", steps(), steps(precision=precision))
        compare(f"precision: {precision} over fp32, deep", wide(), wide(precision=precision))
    true = {"precision": "bf16_true", "parts": 4}
    compare("precision: accumulate_in float32 over parameter", steps(**true, accumulate_in="parameter"), steps(**true))
    compare("precision: master_parameters over none", steps(**true), steps(**true, master_parameters=True))
    compare("schedules: cosine over none", steps(), steps(schedule=cosine(10**6)))
    compare("optimizers: sgd over adamw", steps(), steps(make=sgd))
    compare("optimizers: Manual over adamw", steps(), steps(make=Manual))
    compare("optimizers: torch's AdamW over adamw", steps(), steps(make=torch.optim.AdamW))
    for mode in ("inference_mode", "enabled"):
        compare(f"evaluation: {mode} over no_grad", evaluation("no_grad"), evaluation(mode))
    written = {"tensorboard": True, "metrics_file": True}
    compare("loggers: both files every 50 steps over none", fit(), fit(**written))
    compare("loggers: both files every step over none", fit(), fit(**written, log_every=1))
    save("digits", digits.mlp(), LOSS, (DATA.train[0][:32], DATA.train[1][:32]))
    symbols = torch.randint(0, char_lm.SYMBOLS, (16, 128))
    save("char_lm", char_lm.Transformer(length=128, depth=2), char_lm.NextCharacter(), (symbols, symbols))
    compare("data: a dataset of items over tensors", epoch(DATA.train), epoch(Items()))
    loader = DataLoader(TensorDataset(*DATA.train), batch_size=32, shuffle=True)
    compare("data: a DataLoader over tensors", epoch(DATA.train), epoch(loader))


if __name__ == "__main__":
    main()
