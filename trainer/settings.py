"""Every toggle once: its name, type, range, default and one line of help.

The command line, `Trainer(...)` and `Step(...)` all read these classes; none of them imports torch.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from trainer.errors import ConfigError, did_you_mean

Clock = Literal["micro_batches", "windows", "steps", "rows", "tokens", "epochs"]
Precision = Literal["fp32", "bf16", "bf16_true", "fp16", "fp64"]

CLIPS = ("clip_norm", "clip_value", "clip_adaptive")
"""The toggles that bound the gradient, one at a time; each may also be an option of a parameter group."""


def _infinite(value: Any) -> Any:
    """YAML reads `inf` as a word."""
    return math.inf if value in ("inf", ".inf") else value


Order = Annotated[float, Field(gt=0, allow_inf_nan=True), BeforeValidator(_infinite)]

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def setting(default: Any, help: str, *, flat: str | None = None, **limits: Any) -> Any:
    """A field with its line of help; `flat` is its keyword in `Trainer(...)` where its own name would be unclear."""
    extra: dict[str, Any] = {"json_schema_extra": {"flat": flat}} if flat else {}
    if isinstance(default, dict | list):
        copied = default
        return Field(default_factory=lambda: type(copied)(copied), description=help, **extra, **limits)
    return Field(default=default, description=help, **extra, **limits)


@dataclass(frozen=True, config=_STRICT)
class GradientSettings:
    """What is asked of the gradient of one window."""

    accumulation_steps: int = setting(1, "micro-batches in a window, that is in one optimizer step", ge=1)
    reduction: Literal["mean", "sum", "micro_batches"] = setting(
        "mean", "mean: by weight, however the window is cut; sum: not divided; micro_batches: the textbook loss / k"
    )
    zero_grad: Literal["set_to_none", "zeros", "never"] = setting(
        "set_to_none", "what happens to .grad before a window"
    )
    clip_norm: float | None = setting(None, "largest norm of the whole gradient", gt=0)
    clip_value: float | None = setting(None, "largest absolute value of each element of the gradient", gt=0)
    clip_adaptive: float | None = setting(
        None, "largest norm of each unit's gradient, as a ratio to the norm of its parameters", gt=0
    )
    norm_order: Order = setting(2.0, "order of the gradient norm: 2, any other above 0, or inf")
    nonfinite: Literal["skip", "raise", "allow"] = setting(
        "skip", "what an infinite or NaN loss or gradient does: skip the step, stop the run, or go into the parameters"
    )
    coefficients: dict[str, float] = setting({}, "factor of each named term of the objective (1 where not named)")
    accumulate_in: Literal["float32", "parameter"] = setting(
        "float32",
        "dtype of the gradient of bfloat16 parameters while a window adds up: float32, or the parameter's own",
    )
    master_parameters: bool = setting(
        False,
        "let the optimizer move float32 masters of bfloat16 and float16 parameters, rounded into them after each step",
    )
    loss_scale: float = setting(
        65536.0, "fp16: what backward's seeds are multiplied with at first, a power of two", ge=1, le=2**64
    )
    loss_scale_interval: int = setting(2000, "fp16: steps without an overflow after which the loss scale doubles", ge=1)

    def __post_init__(self) -> None:
        chosen = [name for name in CLIPS if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]} and {chosen[1]} are both set: choose one and set the other to null.")
        if self.master_parameters and self.accumulate_in == "parameter":
            raise ValueError(
                "accumulate_in=parameter and master_parameters=true are both set, and a master takes its gradient in "
                "float32: leave accumulate_in at float32."
            )
        if math.frexp(self.loss_scale)[0] != 0.5:
            raise ValueError(
                f"loss_scale={self.loss_scale:g} is no power of two, so that taking it out again would round: "
                f"set {2.0 ** round(math.log2(self.loss_scale)):g}."
            )


@dataclass(frozen=True, config=_STRICT)
class ActivationCheckpointingSettings:
    """Which activations are computed again in backward instead of being kept."""

    mode: Literal["none", "segments"] = setting(
        "none", "none, or segments: keep only what enters each segment", flat="activation_checkpointing"
    )
    segments: int | None = setting(None, "cut a Sequential into this many segments of consecutive modules", ge=1)
    modules: list[str] = setting(
        [], "patterns of module names, each matching module a segment (blocks.*)", flat="segment_modules"
    )
    verify: bool = setting(
        False, "compare what is computed again with what forward computed, bit for bit", flat="verify_recompute"
    )

    def __post_init__(self) -> None:
        if self.mode == "segments" and self.segments is not None and self.modules:
            raise ValueError("segments and modules are both set: cut by number or by module name, not by both.")
        if self.mode == "none" and (self.segments is not None or self.modules):
            raise ValueError("segments or modules is set while mode is none: set mode to segments.")


@dataclass(frozen=True, config=_STRICT)
class DataSettings:
    """How tensors and datasets are cut into micro-batches; a DataLoader is iterated as it is."""

    batch_size: int = setting(32, "rows of a micro-batch", ge=1)
    evaluation_batch_size: int | None = setting(None, "rows of a micro-batch in evaluation (null: batch_size)", ge=1)
    shuffle: bool = setting(True, "draw a new order for every epoch")
    drop_last: bool = setting(False, "leave out an epoch's last micro-batch where it is shorter")
    workers: int = setting(0, "processes that load a dataset's items", ge=0)
    timeout: float | None = setting(
        600.0, "seconds without a micro-batch from the workers after which the run ends (null: never)", gt=0
    )


@dataclass(frozen=True, config=_STRICT)
class EvaluationSettings:
    """When and how the model is evaluated on held-out data."""

    grad_mode: Literal["no_grad", "inference_mode", "enabled"] = setting("no_grad", "gradient mode during evaluation")
    every: int | None = setting(
        1, "evaluate every so many ticks of the clock (null: only at the end)", flat="evaluate_every", ge=1
    )
    clock: Clock = setting("epochs", "the clock that evaluation follows", flat="evaluate_clock")


@dataclass(frozen=True, config=_STRICT)
class LimitSettings:
    """When a run ends: at the first of these that is reached."""

    epochs: int | None = setting(None, "passes over the training data", ge=0)
    steps: int | None = setting(None, "optimizer steps taken", ge=0)
    rows: int | None = setting(None, "rows that went into steps", ge=0)
    time: float | None = setting(None, "seconds of training in this process", gt=0)
    patience: int | None = setting(None, "evaluations without a new best", ge=1)
    skips_in_a_row: int | None = setting(
        100, "skipped steps in a row after which the run has diverged (exit code 4)", ge=1
    )


@dataclass(frozen=True, config=_STRICT)
class BestSettings:
    """Which metric of the evaluation makes a checkpoint the best one."""

    metric: str = setting("loss", "name of the metric", flat="best_metric")
    mode: Literal["min", "max"] = setting("min", "whether less or more is better", flat="best_mode")


@dataclass(frozen=True, config=_STRICT)
class LoggerSettings:
    """What is written about the run, where, and how often."""

    every: int = setting(50, "write a report every so many ticks of the clock", flat="log_every", ge=1)
    clock: Clock = setting("steps", "the clock that logging follows", flat="log_clock")
    console: bool = setting(True, "a bar on a terminal, sparse lines on a pipe")
    tensorboard: bool = setting(True, "TensorBoard events in the run's folder")
    metrics: bool = setting(True, "metrics.jsonl in the run's folder", flat="metrics_file")
    axis: Clock = setting("steps", "the clock on TensorBoard's axis", flat="log_axis")
    heat_map: bool = setting(
        True,
        "gradient norm of each layer over the run as an image in TensorBoard, at the end as gradient_norms.png too",
    )
    layer_norms: int | None = setting(
        None, "norm of each parameter and its gradient in TensorBoard, every so many ticks (null: none)", ge=1
    )
    histograms: int | None = setting(
        None, "histograms of parameters and gradients in TensorBoard, every so many ticks (null: none)", ge=1
    )


@dataclass(frozen=True, config=_STRICT)
class DiagnoseSettings:
    """What is looked at of the gradient beside training with it."""

    audit: bool = setting(
        True, "name parameters that get no gradient or do not move, gradients that vanish or explode, graphs kept alive"
    )
    update_ratio: int | None = setting(
        None, "how far a step moves each parameter, over its norm, in one of so many windows (null: not at all)", ge=1
    )
    noise_scale: int | None = setting(
        None, "estimate the gradient noise scale from one of so many windows (null: not at all)", ge=1
    )
    term_gradients: int | None = setting(
        None, "norm of each named term's gradient and their cosines, in one of so many windows (null: not at all)", ge=1
    )
    source_gradients: int | None = setting(
        None, "the same of each source of the rows, which the micro-batches name (null: not at all)", ge=1
    )
    capture: Literal["none", "nonfinite", "all"] = setting(
        "nonfinite",
        "windows captured for trainer replay: none; nonfinite: skipped because loss or gradient are not finite; all: "
        "also where only fp16's loss scale overflowed",
    )
    capture_at: int | None = setting(None, "capture the window of this step as well (null: of none)", ge=1)
    capture_most: int = setting(3, "windows that are captured in one run, the first ones", ge=1)
    capture_mib: float = setting(512.0, "MiB that one captured window may take on the disk", gt=0)


@dataclass(frozen=True, config=_STRICT)
class CheckpointSettings:
    """When the state of the run is saved."""

    every: int | None = setting(
        None, "save every so many ticks of the clock (null: only at the end)", flat="checkpoint_every", ge=1
    )
    clock: Clock = setting("epochs", "the clock that saving follows", flat="checkpoint_clock")
    last: bool = setting(True, "save when the run ends", flat="checkpoint_last")
    best: bool = setting(True, "save when evaluation finds a new best", flat="checkpoint_best")
    keep_last: int | None = setting(
        2, "checkpoints that stay, of the newest (null: all)", flat="checkpoint_keep_last", ge=1
    )
    keep_best: int = setting(
        1, "checkpoints that stay, of those that were the best when saved", flat="checkpoint_keep_best", ge=0
    )
    keep_every: int | None = setting(
        None, "of each so many ticks of checkpoint.clock one stays for good", flat="checkpoint_keep_every", ge=1
    )
    background: bool = setting(True, "write on a thread while training goes on", flat="checkpoint_background")
    on_error: Literal["stop", "warn"] = setting(
        "stop",
        "what a save or a log that cannot be written does: stop the run, or warn and train on",
        flat="checkpoint_on_error",
    )
    grace: float = setting(
        20.0, "seconds that a stop by a signal waits for the micro-batch to end before the window is given up", gt=0
    )


@dataclass(frozen=True, config=_STRICT)
class RanksSettings:
    """What holds with several ranks (distributed=ddp)."""

    timeout: float = setting(
        600.0, "seconds that a rank waits for the others before it ends", flat="distributed_timeout", gt=0
    )
    compare_every: int | None = setting(
        1000, "compare the parameters over ranks every so many ticks of the clock (null: at saves only)", ge=1
    )
    compare_clock: Clock = setting("steps", "the clock that comparing follows")


@dataclass(frozen=True, config=_STRICT)
class Settings:
    """All toggles of a run, by the sections that the config shows."""

    seed: int | None = setting(
        None, "seed of the order and of all that is drawn (null: the global RNG is left alone)", ge=0
    )
    device: str = setting("auto", "auto (cuda, mps, cpu: the first that is there) or a torch device")
    precision: Precision = setting(
        "fp32",
        "fp32; bf16 and fp16 (autocast, parameters stay float32); bf16_true and fp64 (everything in that dtype)",
    )
    distributed: Literal["none", "ddp"] = setting(
        "none", "none, or ddp: every rank that torchrun starts has the whole model and a part of the data"
    )
    tf32: bool = setting(False, "let CUDA multiply float32 matrices in TF32")
    check: Literal["first_step"] | None = setting(
        None, "first_step: before the first step, certify its gradient against a plain reference; exit code 6 if wrong"
    )
    gradient: GradientSettings = Field(default_factory=GradientSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    activation_checkpointing: ActivationCheckpointingSettings = Field(default_factory=ActivationCheckpointingSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    best: BestSettings = Field(default_factory=BestSettings)
    loggers: LoggerSettings = Field(default_factory=LoggerSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    diagnose: DiagnoseSettings = Field(default_factory=DiagnoseSettings)
    ranks: RanksSettings = Field(default_factory=RanksSettings)


T = TypeVar("T")


def validated(settings: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of a settings class out of plain values; `where` is the section to name in an error.

    Raises ConfigError with one sentence for the first value that does not fit.
    """
    filled = dict(values)
    for name in filled:
        section = section_of(settings, name) if name in fields_of(settings) else None
        if section is not None and isinstance(filled[name], Mapping):
            filled[name] = validated(section, filled[name], f"{where}.{name}" if where else name)
    try:
        return settings(**filled)
    except ValidationError as error:
        raise ConfigError(_sentence(settings, error, where)) from None


def fields_of(settings: type) -> dict[str, Any]:
    """The pydantic fields of a settings class by name: their types, defaults and lines of help."""
    return dict(settings.__pydantic_fields__)  # type: ignore[attr-defined]


def section_of(settings: type, name: str) -> type | None:
    """The settings class of a section, or None where the field is a value."""
    annotation = fields_of(settings)[name].annotation
    return annotation if dataclasses.is_dataclass(annotation) and isinstance(annotation, type) else None


def flat_names() -> dict[str, tuple[str, ...]]:
    """The keyword of every toggle in `Trainer(...)` and where it lives: {"clip_norm": ("gradient", "clip_norm")}."""
    names: dict[str, tuple[str, ...]] = {}
    for name in fields_of(Settings):
        section = section_of(Settings, name)
        if section is None:
            names[name] = (name,)
            continue
        for leaf, field in fields_of(section).items():
            names[(field.json_schema_extra or {}).get("flat", leaf)] = (name, leaf)
    return names


def from_flat(keywords: Mapping[str, Any]) -> Settings:
    """Settings out of the flat keywords of `Trainer(...)`."""
    known = flat_names()
    nested: dict[str, Any] = {}
    for keyword, value in keywords.items():
        if keyword not in known:
            raise ConfigError(f"Trainer has no setting '{keyword}': {did_you_mean(keyword, known)}")
        *section, leaf = known[keyword]
        (nested.setdefault(section[0], {}) if section else nested)[leaf] = value
    return validated(Settings, nested)


def step_settings(gradient: GradientSettings | None, toggles: Mapping[str, Any]) -> GradientSettings:
    """The toggles of a `Step`: as settings, or by keyword, or the defaults; not both."""
    if gradient is not None and toggles:
        raise ConfigError(
            f"Step got gradient= and also {', '.join(toggles)}: give the settings or the toggles, not both."
        )
    for name in toggles:
        if name not in fields_of(GradientSettings):
            raise ConfigError(f"Step has no setting '{name}': {did_you_mean(name, fields_of(GradientSettings))}")
    return gradient or validated(GradientSettings, toggles)


def _sentence(settings: type, error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"] if part != "__dataclass__"]
    key = ".".join([where, *path] if where else path)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"there is no setting '{key}': {did_you_mean(path[-1], fields_of(settings))}"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}={first['input']!r} is not possible: {message}."
