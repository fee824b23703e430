"""Activation checkpointing by segments (row 8): the same gradient, bit for bit, for less memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from trainer.activations.segments import Segments, segments_for
from trainer.errors import ConfigError, GradientError
from trainer.settings import ActivationCheckpointingSettings
from trainer.step import Step


class Block(nn.Module):
    """A transformer block with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.first(x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        return x + self.feed(self.second(x))


class Transformer(nn.Module):
    """Tied weights: the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(3)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp(layers: int, width: int = 16, *more: Callable[[], nn.Module]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(width, width), *(make() for make in more), nn.Tanh()]
    return nn.Sequential(*modules)


def tied() -> nn.Sequential:
    model = mlp(4)
    model[4].weight = model[0].weight
    model.append(model[2])
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "dropout": (lambda: mlp(4, 16, lambda: nn.Dropout(0.3)), 3),
    "batch norm": (lambda: mlp(4, 16, lambda: nn.BatchNorm1d(16)), 3),
    "both, by pattern": (lambda: mlp(3, 16, lambda: nn.BatchNorm1d(16), lambda: nn.Dropout(0.5)), ["1", "4", "6"]),
    "spectral norm": (lambda: nn.Sequential(*(parametrizations.spectral_norm(nn.Linear(16, 16)) for _ in range(3))), 2),
    "weight norm": (lambda: nn.Sequential(*(parametrizations.weight_norm(nn.Linear(16, 16)) for _ in range(3))), ["*"]),
    "tied": (tied, 3),
    "one segment": (lambda: mlp(3, 16, lambda: nn.Dropout(0.3)), 1),
    "each module": (lambda: mlp(3, 16, lambda: nn.BatchNorm1d(16)), 9),
    "instance norm": (
        lambda: mlp(
            2, 16, lambda: nn.Unflatten(1, (4, 4)), lambda: nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten
        ),
        2,
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.ReLU(inplace=True)),
        2,
    ),
}


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def trained(
    make: Callable[[], nn.Module],
    segments: Any,
    window: list[Any],
    objective: Callable[..., Any] = mean_square,
    steps: int = 3,
    **toggles: Any,
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Gradients of every step, the state at the end and the RNG's state at the end."""
    torch.manual_seed(0)
    model = make()
    step = Step(
        model,
        objective,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        activation_checkpointing=segments,
        **toggles,
    )
    gradients = []
    torch.manual_seed(1)
    for _ in range(steps):
        assert not step(window).skipped
        gradients += [parameter.grad.clone() for parameter in model.parameters()]
    return gradients, copy.deepcopy(model.state_dict()), torch.get_rng_state()


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    return torch.equal(left, right)


def window(micro_batches: int = 3, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(8, width, generator=generator) for _ in range(micro_batches)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradient_bit_for_bit(name: str, precision: Any) -> None:
    make, segments = MODELS[name]
    with_segments = trained(make, segments, window(), precision=precision)
    without = trained(make, None, window(), precision=precision)
    for mine, theirs in zip(with_segments, without, strict=True):
        assert same(mine, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("segments", ["blocks.*", ["blocks.0", "blocks.2"], ["blocks.*.feed", "blocks.*.attention"], 2])
def test_a_transformer_with_tied_weights(segments: Any, precision: Any) -> None:
    tokens = [torch.arange(12).view(3, 4) % 11, torch.arange(8).view(2, 4) % 7]

    def objective(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    found = [trained(Transformer, one, tokens, objective, precision=precision) for one in (segments, None)]
    for mine, theirs in zip(*found, strict=True):
        assert same(mine, theirs)


def test_with_clip_and_never_and_two_terms() -> None:
    make, _ = MODELS["batch norm"]

    def terms(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        out = model(x)
        return {"square": out.square().mean(), "size": out.abs().mean()}

    toggles: dict[str, Any] = {"clip_norm": 0.05, "zero_grad": "never"}
    found = [trained(make, segments, window(), terms, **toggles) for segments in (4, None)]
    for mine, theirs in zip(*found, strict=True):
        assert same(mine, theirs)


def test_statistics_are_updated_once_a_micro_batch() -> None:
    _, state, _ = trained(MODELS["batch norm"][0], 3, window(5), steps=2)
    assert [int(value) for name, value in state.items() if name.endswith("num_batches_tracked")] == [10] * 4


# Memory


def kept_bytes(model: nn.Module, segments: Any, x: Tensor) -> int:
    """Bytes of distinct storages that forward leaves to backward, parameters and the input left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    cut = segments_for(model, segments)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if cut is None:
            loss = mean_square(model, x)
        else:
            with cut:
                loss = mean_square(model, x)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_at_most_half_the_bytes_on_a_twelve_layer_mlp() -> None:
    x = torch.randn(64, 32)
    model = mlp(12, 32)
    everything = kept_bytes(model, None, x)
    assert everything >= 12 * x.numel() * 4  # the output of each Tanh, which its backward and the next Linear need
    for segments in (ActivationCheckpointingSettings(mode="segments"), 3, 4, 6):
        assert x.numel() * 4 < kept_bytes(model, segments, x) <= everything / 2, segments


class Masked(nn.Module):
    """A layer with a mask that is larger than what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(200, 200), persistent=False)
        self.register_buffer("count", torch.zeros(()))
        self.turn_at = -1

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.turn_at >= 0 and int(self.count) >= self.turn_at:
            self.mask.mul_(0.5)
        return self.linear(x * self.count) * self.mask[0, :4]


def clones_held(buffer: Tensor) -> int:
    """How many other tensors of its shape are alive."""
    import gc

    return sum(type(t) is Tensor and t.shape == buffer.shape and t is not buffer for t in gc.get_objects())


def test_a_large_constant_buffer_is_not_kept() -> None:
    model = nn.Sequential(Masked(), Masked())
    with segments_for(model, 2):  # type: ignore[union-attr]
        loss = mean_square(model, torch.randn(3, 4))
    assert clones_held(model[0].mask) == 1  # the other layer's own
    loss.backward()


@pytest.mark.parametrize("turn_at", [-1, 0, 3, 5])
def test_a_large_buffer_that_changes_is_kept(turn_at: int) -> None:
    """Also where forward left it alone for a while."""

    def make() -> nn.Module:
        model = nn.Sequential(Masked(), Masked())
        for layer in model:
            layer.turn_at = turn_at
        return model

    found = [trained(make, segments, window(2, width=4)) for segments in (2, None)]
    for mine, theirs in zip(*found, strict=True):
        assert same(mine, theirs)


class OwnStatistics(nn.Module):
    """A normalisation of the user's own, whose kernel changes large buffers without raising their version."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, self.scale, training=True)


def test_a_large_buffer_that_changes_without_its_version_is_kept() -> None:
    width = 17_000
    found = [
        trained(lambda: nn.Sequential(OwnStatistics(width), nn.Tanh()), segments, window(2, width), steps=2)
        for segments in (1, None)
    ]
    for mine, theirs in zip(*found, strict=True):
        assert same(mine, theirs)


# Buffers of other kinds


class Replaces(nn.Module):
    """Its buffer is replaced, not changed; another appears in forward; the two layers share a third."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("late", None)
        self.register_buffer("shared", shared)
        self.register_buffer("again", shared)

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        self.late = x.detach().mean(0) if self.late is None else self.late + 1
        self.shared.add_(1)
        return self.linear(x - self.average) * self.again.clone() + self.late


def test_buffers_that_are_replaced_that_appear_and_that_are_shared() -> None:
    def make() -> nn.Module:
        shared = torch.ones(4)
        return nn.Sequential(Replaces(shared), nn.Tanh(), Replaces(shared))

    found = [trained(make, segments, window(2, width=4), nonfinite="allow") for segments in (1, None)]
    for mine, theirs in zip(*found, strict=True):
        assert same(mine, theirs)


def test_shared_buffers_are_one_again_after_the_recompute() -> None:
    model = nn.Sequential(Replaces(torch.ones(4)))
    with segments_for(model, 1):  # type: ignore[union-attr]
        loss = mean_square(model, torch.randn(3, 4))
    average = model[0].average
    loss.backward()
    assert model[0].shared is model[0].again
    assert model[0].average is average
    assert model[0].shared.tolist() == [2.0] * 4


# A parameter that was changed in between


def changing(index: int = 0) -> Callable[..., Tensor]:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        loss = mean_square(model, x)
        with torch.no_grad():
            model[index].weight.mul_(2.0)
        return loss

    return objective


@pytest.mark.parametrize("segments", [2, ["0", "2"], ["2"]])
def test_a_changed_parameter_is_refused(segments: Any) -> None:
    """What the user sees is one sentence that names it, not torch's and not a wrong gradient."""
    model = mlp(2)
    step = Step(model, changing(2), torch.optim.SGD(model.parameters(), lr=0.1), activation_checkpointing=segments)
    with pytest.raises(
        GradientError, match=r"^the parameter '2\.weight' was changed between forward and the recompute"
    ):
        step(window(1))
    assert all(parameter.grad is None for parameter in model.parameters())  # the window was cancelled
    step.objective = mean_square
    assert not step(window(1)).skipped


def test_a_changed_parameter_is_named_as_the_model_names_it() -> None:
    model = nn.ModuleDict({"net": mlp(2)})

    def objective(outer: Any, x: Tensor) -> Tensor:
        return changing(2)(outer["net"], x)

    for segments in (2, "net.*", "net"):
        step = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.1), activation_checkpointing=segments)
        with pytest.raises(GradientError, match=r"'net\.2\.weight'.*set activation_checkpointing=none\."):
            step(window(1))


def test_a_fused_step_in_between_is_seen_too() -> None:
    """Torch's fused kernels do not count their changes; a step of the trainer's own does."""
    model = mlp(2)
    inner = Step(model, mean_square, torch.optim.SGD(model.parameters(), lr=0.1, fused=True))

    def objective(outer: nn.Module, x: Tensor) -> Tensor:
        loss = mean_square(outer, x)
        inner([x])
        outer.zero_grad()  # what it left would be refused by itself
        return loss

    step = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.1), activation_checkpointing=2)
    with pytest.raises(GradientError, match=r"the parameter '2\.weight' was changed"):
        step(window(1))


def test_a_large_buffer_that_is_changed_in_between_is_refused() -> None:
    model = nn.Sequential(Masked())

    def objective(outer: Any, x: Tensor) -> Tensor:
        loss = mean_square(outer, x)
        outer[0].mask.mul_(2.0)
        return loss

    step = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.1), activation_checkpointing=1)
    with pytest.raises(GradientError, match=r"the buffer '0\.mask' was changed between forward and the recompute"):
        step(window(1, width=4))


# The model is as its owner made it


def has_own_forward(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("segments", ["blocks.*", ["blocks.1.feed"], 2])
def test_outside_of_forward_the_model_is_untouched(segments: Any) -> None:
    model = Transformer()
    names = list(model.state_dict())
    cut = segments_for(model, segments)
    assert cut is not None
    assert has_own_forward(model) == []
    with cut:
        assert has_own_forward(model)
        model(torch.zeros(1, 3, dtype=torch.long)).sum()
    assert has_own_forward(model) == []
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model)
    assert list(copied.state_dict()) == names
    assert type(copied.blocks[0]) is Block


def test_also_after_an_exception() -> None:
    model = mlp(3)
    cut = segments_for(model, 2)
    assert cut is not None
    with pytest.raises(KeyError, match="mine"), cut:
        raise KeyError("mine")
    assert has_own_forward(model) == []
    step = Step(model, mean_square, torch.optim.SGD(model.parameters(), lr=0.1), activation_checkpointing=2)
    with pytest.raises(Exception, match="shapes cannot be multiplied"):
        step([torch.ones(2, 5)])
    assert has_own_forward(model) == []
    assert not step(window(1)).skipped


def test_a_forward_of_the_instance_stays() -> None:
    model = mlp(2)
    calls: list[int] = []
    before = model[0].forward

    def own(x: Tensor) -> Tensor:
        calls.append(1)
        return before(x) * 2

    model[0].forward = own
    theirs = mean_square(model, window(1)[0])
    theirs.backward()
    wanted = model[0].weight.grad.clone()
    model.zero_grad()
    with segments_for(model, ["0", "2"]):  # type: ignore[union-attr]
        loss = mean_square(model, window(1)[0])
    assert model[0].forward is own
    loss.backward()
    assert torch.equal(model[0].weight.grad, wanted)
    assert len(calls) == 3  # plain, forward, recompute


def test_hooks_of_modules_run_once_around_a_segment_that_is_one() -> None:
    model = mlp(2)
    calls: list[str] = []
    model[2].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[2].register_forward_hook(lambda *_: calls.append("post"))
    with segments_for(model, "2"):  # type: ignore[union-attr]
        loss = mean_square(model, window(1)[0])
    loss.backward()
    assert calls == ["pre", "post"]


class Rich(nn.Module):
    """Keyword arguments, and an output that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: Tensor, words: dict[str, Any]) -> dict[str, Any]:
        out = self.linear(x) * scale
        return {"out": out, "also": [out.tanh(), None], "words": words["name"], "number": 3}


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rich = Rich()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        found = self.rich(x, scale=self.scale, words={"name": "w"})
        assert (found["words"], found["number"], found["also"][1]) == ("w", 3, None)
        return found["out"] + found["also"][0]


def test_keyword_arguments_and_other_outputs() -> None:
    found = [trained(Outer, segments, window(2, width=4)) for segments in ("rich", None)]
    for mine, theirs in zip(*found, strict=True):
        assert same(mine, theirs)


def recomputes(model: nn.Module, segments: Any, run: Callable[[], Any]) -> int:
    """How often the first Linear of the model runs."""
    calls: list[int] = []
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    with segments_for(model, segments):  # type: ignore[union-attr]
        result = run()
    if isinstance(result, Tensor) and result.requires_grad:
        result.backward()
    handle.remove()
    return len(calls)


def test_evaluation_does_not_checkpoint() -> None:
    model = mlp(4)
    x = window(1)[0]

    def without_grad(context: Callable[[], Any]) -> Any:
        with context():
            return mean_square(model, x)

    assert recomputes(model, 2, lambda: mean_square(model, x)) == 2
    assert recomputes(model, 2, lambda: without_grad(torch.no_grad)) == 1
    assert recomputes(model, 2, lambda: without_grad(torch.inference_mode)) == 1
    step = Step(model, mean_square, torch.optim.SGD(model.parameters(), lr=0.1), activation_checkpointing=2)
    step([x])
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    mean_square(model, x).backward()  # a forward of one's own, beside the step
    assert len(calls) == 1


def test_a_nested_choice_runs_inside_what_is_recomputed() -> None:
    """A Sequential cut by number may hold others; each module belongs to one segment."""
    model = nn.Sequential(mlp(2), mlp(2), nn.Linear(16, 16))
    found = [trained(lambda: copy.deepcopy(model), segments, window(2)) for segments in (2, ["0.*", "1", "2"], None)]
    for mine, other, theirs in zip(*found, strict=True):
        assert same(mine, theirs)
        assert same(other, theirs)


def test_a_graph_that_is_walked_twice_is_recomputed_twice() -> None:
    model = mlp(3, 16, lambda: nn.BatchNorm1d(16), lambda: nn.Dropout(0.3))
    model.append(parametrizations.spectral_norm(nn.Linear(16, 16)))  # its buffers are in the gradient
    torch.manual_seed(0)
    with segments_for(model, 2):  # type: ignore[union-attr]
        loss = mean_square(model, window(1)[0])
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))
    assert int(model[1].num_batches_tracked) == 1


# What is chosen, and what is refused


def cut_of(model: nn.Module, wanted: Any) -> str:
    found = segments_for(model, wanted)
    assert isinstance(found, Segments)
    return repr(found)


def test_what_is_chosen() -> None:
    assert segments_for(mlp(2), None) is None
    assert segments_for(mlp(2), ActivationCheckpointingSettings()) is None
    assert cut_of(mlp(5), 3) == "the model in 3 segments"
    assert cut_of(mlp(8), ActivationCheckpointingSettings(mode="segments")) == "the model in 4 segments"
    assert cut_of(nn.ModuleDict({"net": mlp(4)}), 2) == "'net' in 2 segments"
    assert cut_of(nn.ModuleDict({"short": mlp(2), "long": mlp(4)}), 2) == "'long' in 2 segments"
    assert cut_of(Transformer(), "blocks.*") == "'blocks.0', 'blocks.1', 'blocks.2'"
    assert cut_of(Transformer(), ["blocks.[02]", "blocks.1.feed"]) == "'blocks.0', 'blocks.2', 'blocks.1.feed'"
    assert cut_of(Transformer(), ["*.feed.*"]).count("feed") == 12
    parts = segments_for(mlp(5), 4)
    assert parts is not None
    assert [len(part) for part in parts.cuts[0].parts or []] == [3, 3, 2, 2]


class Iterated(nn.Module):
    """It never calls its Sequential: it calls what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class NoChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()


@pytest.mark.parametrize("wanted", [2, "layers"])
def test_segments_that_forward_never_calls_are_refused(wanted: Any) -> None:
    model = Iterated()
    step = Step(model, mean_square, torch.optim.SGD(model.parameters(), lr=0.1), activation_checkpointing=wanted)
    with pytest.raises(ConfigError, match=r"forward never called 'layers'.*choose one of: layers\.\*\."):
        step(window(1))
    found = [trained(Iterated, segments, window(2)) for segments in ("layers.*", None)]
    for mine, theirs in zip(*found, strict=True):
        assert same(mine, theirs)


class PlainModel:
    def __init__(self) -> None:
        self.weight = torch.ones(1, requires_grad=True)


@pytest.mark.parametrize(
    ("model", "wanted", "words"),
    [
        (
            mlp(2),
            5,
            r"activation_checkpointing\.segments=5 is more than the 4 modules of the model: choose at most 4\.",
        ),
        (nn.ModuleDict({"net": mlp(1)}), 3, r"segments=3 is more than the 2 modules of 'net'"),
        (mlp(2), 0, r"activation_checkpointing\.segments=0 is not possible"),
        (mlp(2), -1, r"activation_checkpointing\.segments=-1 is not possible"),
        (NoChain(), 2, r"NoChain holds no nn\.Sequential .*choose one of: decoder, encoder\."),
        (
            nn.ModuleDict({"blocks": nn.ModuleList([Block(4), Block(4)])})["blocks"][0].attention,
            2,
            r"no nn\.Sequential",
        ),
        (Transformer(), "block.*", r"no module matches 'block\.\*': did you mean 'blocks\.\*'\?"),
        (
            Transformer(),
            ["blocks.*", "nothing"],
            r"no module matches 'nothing': choose one of: blocks\.\*, blocks\.0\.feed\.\*, ",
        ),
        (
            Transformer(),
            "blocks",
            r"'blocks' is a list that is never called itself: name what is in it, 'blocks\.\*'\.",
        ),
        (Transformer(), "*", r"'blocks' is a list that is never called itself"),
        (
            Transformer(),
            ["blocks.0", "blocks.0.feed"],
            r"'blocks\.0\.feed' lies inside 'blocks\.0': name one of them\.",
        ),
        (Transformer(), ["blocks.0.feed", "blocks.0"], r"'blocks\.0\.feed' lies inside 'blocks\.0'"),
        (PlainModel(), 2, r"needs an nn\.Module to cut; PlainModel is a plain object\."),
        (PlainModel(), "weight", r"PlainModel is a plain object\."),
    ],
)
def test_what_is_refused(model: Any, wanted: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        segments_for(model, wanted)


def test_a_plain_object_without_segments_is_fine() -> None:
    assert segments_for(PlainModel(), None) is None
    assert segments_for(PlainModel(), ActivationCheckpointingSettings()) is None
