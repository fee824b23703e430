"""What forward draws, held apart from what is compared.

Two ways, both by looking at every operation that draws, whoever calls it:

- `equal`: everything is drawn in float32 and then cast, so that a float64 run from the same state of the generators
  draws the same numbers as a float32 one.
- `neutral`: every draw is replaced by its mean (dropout keeps everything, noise is zero), so that each row gets the
  same whatever else is in its micro-batch.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["equal", "neutral"]


class Draws(TorchDispatchMode):
    """Inside, operations that draw do it as `kind` says; `seen` has the names of those that came."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()
        self._neutral = kind == "neutral"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, for seconds, to keep it out of here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._draw(func, args, kwargs)
        return func(*args, **kwargs)

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        named = {**dict(zip((one.name for one in func._schema.arguments), args, strict=False)), **kwargs}
        if not _draws(name, named):
            return func(*args, **kwargs)
        self.seen.add(name)
        if self._neutral:
            made = _neutral(name, named, func, args, kwargs)
            if made is not None:
                return made
        return _in_float32(name, named, func, args, kwargs)


def _draws(name: str, named: dict[str, Any]) -> bool:
    """Whether a call of an operation that can draw does so: attention without dropout, rrelu in eval do not."""
    for option in ("dropout_p", "dropout"):
        if isinstance(named.get(option), float | int):
            return bool(named[option])
    if name.startswith("rrelu_with_noise"):
        return bool(named.get("training", False))
    if name == "native_dropout":
        return named.get("train") is not False and bool(named.get("p", 0.0))
    return True


def _in_float32(name: str, named: dict[str, Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target = args[0] if args and isinstance(args[0], Tensor) else None
    if name.startswith("rrelu_with_noise") and target is not None and target.dtype is not torch.float32:
        noise = named["noise"]
        drawn = noise.float()
        func(target.float(), drawn, *args[2:], **kwargs)
        noise.copy_(drawn)
        return target * noise
    if target is not None and name.endswith("_"):
        if not _is_other(target.dtype):
            return func(*args, **kwargs)
        drawn = torch.empty_like(target, dtype=torch.float32)
        func(drawn, *args[1:], **kwargs)
        return target.copy_(drawn)
    if name == "native_dropout" and target is not None and _is_other(target.dtype):
        _, mask = func(target.float(), *args[1:], **kwargs)
        return target * mask * _scale(float(named["p"])), mask
    if (name == "normal" and target is not None) or isinstance(named.get("std"), Tensor):
        mean, deviation = named["mean"], named["std"]
        like = mean if isinstance(mean, Tensor) else deviation
        if _is_other(like.dtype):
            drawn = torch.empty_like(like, dtype=torch.float32).normal_(generator=named.get("generator"))
            return mean + deviation * drawn.to(like.dtype)
        return func(*args, **kwargs)
    if any(one.name == "dtype" for one in func._schema.arguments):
        wanted = named.get("dtype")
        if wanted is None:
            wanted = target.dtype if target is not None else torch.get_default_dtype()
            if name == "randperm" or (name.startswith("randint") and not name.endswith("like")):
                wanted = torch.int64
        if _is_other(wanted):
            drawn = func(*args, **{**kwargs, "dtype": torch.float32})
            return drawn.to(wanted)
        return func(*args, **kwargs)
    if target is not None and _is_other(target.dtype) and not name.startswith("_scaled_dot_product"):
        made = func(target.float(), *args[1:], **kwargs)
        return made.to(target.dtype) if isinstance(made, Tensor) and made.is_floating_point() else made
    return func(*args, **kwargs)


def _is_other(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype is not torch.float32


def _scale(p: float) -> float:
    return 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def _neutral(name: str, named: dict[str, Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mean of what would be drawn; None where there is none that can be said."""
    target = args[0] if args and isinstance(args[0], Tensor) else None
    if name == "native_dropout" and target is not None:
        # Backward multiplies by the same scale, so that it stays the derivative of this.
        return target * _scale(float(named["p"])), torch.ones_like(target, dtype=torch.bool)
    if name.startswith("rrelu_with_noise") and target is not None:
        slope = (float(named.get("lower", 1 / 8)) + float(named.get("upper", 1 / 3))) / 2
        named["noise"].copy_(torch.where(target <= 0, slope, 1.0))
        return target * named["noise"]
    for option in ("dropout_p", "dropout"):
        if option in named:
            position = [one.name for one in func._schema.arguments].index(option)
            if position < len(args):
                return func(*args[:position], 0.0, *args[position + 1 :], **kwargs)
            return func(*args, **{**kwargs, option: 0.0})
    if target is not None and name.endswith("_"):
        mean = _MEANS.get(name[:-1])
        value = None if mean is None else mean(named)
        if value is None:
            return None
        return target.copy_(value) if isinstance(value, Tensor) else target.fill_(value)
    if name in ("bernoulli", "poisson", "_standard_gamma") and target is not None:
        return torch.full_like(target, float(named["p"])) if isinstance(named.get("p"), float) else target.clone()
    if name == "normal" and (isinstance(named.get("mean"), Tensor) or isinstance(named.get("std"), Tensor)):
        return named["mean"] + 0 * named["std"]
    base = name.removesuffix("_like")
    if base in ("rand", "randn"):
        made = func(*args, **kwargs)
        return made.fill_(0.5 if base == "rand" else 0.0)
    if base == "randint":
        made = func(*args, **kwargs)
        return made.fill_(int(named.get("low", 0)))
    if name == "randperm":
        made = func(*args, **kwargs)
        # No mean, but the same for every length, and not in place: rows that are mixed by it must show.
        return made.copy_(torch.arange(made.numel(), device=made.device).roll(1))
    if name == "multinomial" and target is not None:
        return target.topk(int(named["num_samples"]), dim=-1).indices if not named.get("replacement") else None
    return None


def _uniform(named: dict[str, Any]) -> float:
    return (float(named.get("from", 0.0)) + float(named.get("to", 1.0))) / 2


_MEANS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bernoulli": lambda named: named.get("p", 0.5),
    "uniform": _uniform,
    "normal": lambda named: float(named.get("mean", 0.0)),
    "exponential": lambda named: 1.0 / float(named.get("lambd", 1.0)),
    "log_normal": lambda named: 2.718281828459045 ** float(named.get("mean", 1.0)),
    "geometric": lambda named: 1.0 / float(named["p"]),
    "cauchy": lambda named: float(named.get("median", 0.0)),
}
