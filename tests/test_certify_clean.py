"""The certificate on models whose gradient is right: none may raise a false alarm, whatever they are made of.

Most need torch alone; those of transformers come from tiny configs, with no download.
"""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from trainer import Sum, certify, supervised


class Task(NamedTuple):
    """A model, its objective, a window of three micro-batches of unequal lengths, and modules that make segments."""

    model: nn.Module
    objective: Any
    window: list[Any]
    segments: list[str]


SIZES = (3, 3, 2)
MSE = supervised(nn.MSELoss())
CLASSES = supervised(nn.CrossEntropyLoss())


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def numbers(*shape: int, out: int = 2) -> list[tuple[Tensor, Tensor]]:
    g = drawn()
    return [(torch.randn(n, *shape, generator=g), torch.randn(n, out, generator=g)) for n in SIZES]


def tokens(length: int = 6, count: int = 13, classes: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Rows of tokens; targets are tokens too, or one class a row."""
    g = drawn()

    def targets(n: int) -> Tensor:
        return torch.randint(classes, (n,), generator=g) if classes else torch.randint(count, (n, length), generator=g)

    return [(torch.randint(count, (n, length), generator=g), targets(n)) for n in SIZES]


class Body(nn.Module):
    """A module between two layers, with what is done to its input and output."""

    def __init__(
        self,
        inner: nn.Module,
        wide: int = 6,
        after: Callable[[Any], Tensor] = lambda y: y,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        out: int = 2,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.enter = enter or nn.Linear(6, wide)
        self.inner = inner
        self.leave = nn.Linear(wide, out)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.after(self.inner(self.before(self.enter(x)))))


def flat(inner: nn.Module, **keywords: Any) -> Task:
    """On rows of six numbers."""
    return Task(Body(inner, **keywords), MSE, numbers(6), ["inner"])


def sequence(inner: nn.Module, wide: int = 8, **keywords: Any) -> Task:
    """On rows of six tokens, one class a row."""
    keywords.setdefault("after", lambda y: y.mean(1))
    return Task(
        Body(inner, wide=wide, out=3, enter=nn.Embedding(13, 8), **keywords), CLASSES, tokens(classes=3), ["inner"]
    )


def image(inner: nn.Module, **keywords: Any) -> Task:
    keywords.setdefault("after", lambda y: y.mean((2, 3)))
    return Task(Body(inner, wide=4, enter=nn.Conv2d(2, 4, 3, padding=1), **keywords), MSE, numbers(2, 6, 6), ["inner"])


def first(y: Any) -> Tensor:
    return y[0].mean(1)


class Acts(nn.Module):
    """A function of (module, x), with a square matrix and a vector to use."""

    def __init__(self, function: Callable[["Acts", Tensor], Tensor], wide: int = 6) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.randn(wide, wide) / wide**0.5)
        self.v = nn.Parameter(torch.randn(wide))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def mlp() -> Task:
    return flat(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 6), nn.Tanh()))


def group_norm() -> Task:
    return image(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout2d(0.2)))


def instance_norm() -> Task:
    return image(nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2)))


def frozen_batch_norm() -> Task:
    norm = nn.BatchNorm2d(4).eval()
    return image(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), norm, nn.SiLU(), nn.AvgPool2d(2)))


def transposed_convolution() -> Task:
    return image(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2), nn.LocalResponseNorm(2), nn.PReLU(4)))


def rms_norm(acts: Acts, x: Tensor) -> Tensor:
    return F.rms_norm(x.to(acts.v.dtype), (6,), acts.v)


def layer_norm() -> Task:
    return flat(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), Acts(rms_norm)))


def transformer_encoder() -> Task:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    return sequence(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


class WholeTransformer(nn.Module):
    """torch's encoder and decoder; the embedding is the output's matrix as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.core = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)
        self.leave = nn.Linear(8, 13, bias=False)
        self.leave.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        inside = self.embedding(x) * math.sqrt(8)
        outputs = self.core(inside, inside, tgt_mask=mask.to(inside), tgt_is_causal=True)
        return self.leave(outputs).transpose(1, 2)


def whole_transformer_with_tied_weights() -> Task:
    window = tokens()
    for _, targets in window:
        targets[0, 2:] = -100
    return Task(WholeTransformer(), CLASSES, window, ["core.encoder.layers.*", "core.decoder.layers.*"])


def attention_of_torch() -> Task:
    attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
    task = sequence(attention)
    task.model.inner = Acts(lambda acts, x: attention(x, x, x, need_weights=True)[0])
    task.model.inner.attention = attention
    return task


def lstm() -> Task:
    return sequence(nn.LSTM(8, 8, num_layers=2, dropout=0.2, batch_first=True), after=first)


def gru() -> Task:
    return sequence(nn.GRU(8, 4, bidirectional=True, batch_first=True), after=first)


def rnn() -> Task:
    return sequence(nn.RNN(8, 8, nonlinearity="relu", batch_first=True), after=first)


def convolution_over_time() -> Task:
    inner = nn.Sequential(nn.Conv1d(8, 8, 3, padding=2, dilation=2), nn.ELU(), nn.AdaptiveMaxPool1d(2))
    return sequence(inner, before=lambda x: x.transpose(1, 2), after=lambda y: y.mean(2))


def complex_parameters() -> Task:
    matrix = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64) / 3)

    def function(acts: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(x) if x.dtype is not torch.bfloat16 else torch.fft.fft(x.float())
        return torch.fft.ifft(spectrum @ acts.c.to(spectrum.dtype)).real.to(x.dtype)

    acts = Acts(function)
    acts.c = matrix
    return flat(acts)


def sparse_embedding() -> Task:
    model = nn.Sequential(nn.Embedding(13, 6, sparse=True), nn.Flatten(), nn.Linear(36, 3))
    return Task(model, CLASSES, tokens(classes=3), ["2"])


def embedding_bag() -> Task:
    model = nn.Sequential(nn.EmbeddingBag(13, 6, mode="mean"), nn.Tanh(), nn.Linear(6, 3))
    return Task(model, CLASSES, tokens(classes=3), ["2"])


def weight_norm() -> Task:
    return flat(nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh()))


def orthogonal() -> Task:
    return flat(nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh()))


def spectral_norm_that_has_settled() -> Task:
    """Its vectors move with every forward, by then no more than rounding does."""
    linear = nn.Linear(6, 6)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(linear.weight)
        linear.weight.copy_(u @ torch.diag(torch.tensor([3.0, 1.0, 0.8, 0.5, 0.3, 0.1])) @ v)
    normed = parametrizations.spectral_norm(linear)
    for _ in range(60):
        normed(torch.zeros(1, 6))
    return flat(nn.Sequential(normed, nn.Tanh()))


def bilinear() -> Task:
    inner = nn.Bilinear(6, 6, 6)
    acts = Acts(lambda acts, x: acts.inner(x.to(acts.v.dtype), x.cos().to(acts.v.dtype)))
    acts.inner = inner
    return flat(acts)


def experts() -> Task:
    """Each token goes to the one expert that it scores highest, whatever the others do."""

    def function(acts: Any, x: Tensor) -> Tensor:
        gate = acts.gate(x).softmax(-1)
        best = gate.argmax(-1, keepdim=True)
        each = torch.stack([expert(x) for expert in acts.experts], -2)
        chosen = each.gather(-2, best[..., None].expand(*best.shape, x.shape[-1])).squeeze(-2)
        return chosen * gate.gather(-1, best)

    acts = Acts(function, wide=8)
    acts.gate = nn.Linear(8, 3)
    acts.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
    return sequence(acts)


def masked_experts() -> Task:
    """Rows are chosen by a mask and written back: the module never sees the same number of rows twice."""

    def function(acts: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        right = x[:, 0] > 0
        y[right] = (x[right] @ acts.m.to(x.dtype)).to(y.dtype)
        y[~right] = x[~right] * acts.v.to(x.dtype)
        return y

    return flat(Acts(function))


def noise() -> Task:
    """The sampling of a variational autoencoder."""

    def function(acts: Any, x: Tensor) -> Tensor:
        mean, deviation = acts.two(x).chunk(2, -1)
        return mean + torch.randn_like(mean) * F.softplus(deviation)

    acts = Acts(function)
    acts.two = nn.Linear(6, 12)
    return flat(acts)


def gumbel() -> Task:
    return flat(Acts(lambda acts, x: F.gumbel_softmax(x @ acts.m.to(x.dtype), tau=0.7) * acts.v.to(x.dtype)))


def rounding_straight_through() -> Task:
    """Quantised row by row."""

    def function(acts: Any, x: Tensor) -> Tensor:
        scale = x.detach().abs().amax(1, keepdim=True) / 7
        return x + ((x / scale).round() * scale - x).detach()

    return flat(Acts(function))


def recurrent_by_hand() -> Task:
    def function(acts: Any, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for at in range(x.shape[1]):
            state = torch.tanh(state @ acts.m.to(x.dtype) + x[:, at] * acts.v.to(x.dtype))
        return state

    return sequence(Acts(function, wide=8), after=lambda y: y)


def attention_by_hand() -> Task:
    def function(acts: Any, x: Tensor) -> Tensor:
        scores = (x @ acts.m.to(x.dtype) @ x.transpose(1, 2)).masked_fill(acts.mask, -math.inf)
        return F.dropout(scores.softmax(-1), 0.1, acts.training) @ x

    acts = Acts(function, wide=8)
    acts.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool).triu(1))
    return sequence(acts)


def fused_attention() -> Task:
    def function(acts: Any, x: Tensor) -> Tensor:
        x = x.to(acts.m.dtype)
        heads = (x @ acts.m).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)

    return sequence(Acts(function, wide=8))


def sines() -> Task:
    inner = nn.Sequential(nn.Linear(6, 6), *[Acts(lambda acts, x: (5 * x).sin()) for _ in range(2)], nn.Linear(6, 6))
    for acts in (inner[1], inner[2]):
        del acts.m, acts.v
    return flat(inner)


def checkpoint_of_ones_own() -> Task:
    part = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.Tanh())
    acts = Acts(lambda acts, x: checkpoint(acts.part, x, use_reentrant=False))
    acts.part = part
    return flat(acts)


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


def function_of_ones_own() -> Task:
    return flat(Acts(lambda acts, x: Tanh.apply(x @ acts.m.to(x.dtype))))


def counts_its_calls() -> Task:
    """It keeps statistics that it does not use, as a logger would."""

    def function(acts: Any, x: Tensor) -> Tensor:
        acts.calls += 1
        acts.seen.append(float(x.detach().mean()))
        return x * acts.v.to(x.dtype)

    acts = Acts(function)
    acts.calls, acts.seen = 0, []
    return flat(acts)


def a_table_that_is_made_at_the_first_call() -> Task:
    def function(acts: Any, x: Tensor) -> Tensor:
        if acts.table is None:
            acts.table = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        return x * acts.table.to(x.dtype) + acts.v.to(x.dtype)

    acts = Acts(function)
    acts.table = None
    return flat(acts)


def gradient_penalty() -> Task:
    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs = batch[0].detach().clone().requires_grad_(True)
        outputs = model(inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        return F.mse_loss(outputs, batch[1]) + 0.1 * slope.square().sum(1).mean()

    return Task(Body(nn.Tanh()), objective, numbers(6), ["inner"])


def token_sums() -> Task:
    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Sum]:
        scores = model(batch[0])
        keep = batch[1] != 0
        total = F.cross_entropy(scores, batch[1], reduction="none")[keep].sum()
        return {"loss": Sum(total, keep.sum()), "size": Sum(scores.square().sum(), scores.numel())}

    return Task(WholeTransformer(), objective, tokens(), ["core.encoder.layers.*"])


def unused_and_frozen_parameters() -> Task:
    task = mlp()
    task.model.unused = nn.Linear(3, 3)
    task.model.enter.requires_grad_(False)
    return task


BY_TORCH = [
    mlp,
    group_norm,
    instance_norm,
    frozen_batch_norm,
    transposed_convolution,
    layer_norm,
    transformer_encoder,
    whole_transformer_with_tied_weights,
    attention_of_torch,
    lstm,
    gru,
    rnn,
    convolution_over_time,
    complex_parameters,
    sparse_embedding,
    embedding_bag,
    weight_norm,
    orthogonal,
    spectral_norm_that_has_settled,
    bilinear,
    experts,
    masked_experts,
    noise,
    gumbel,
    rounding_straight_through,
    recurrent_by_hand,
    attention_by_hand,
    fused_attention,
    sines,
    checkpoint_of_ones_own,
    function_of_ones_own,
    counts_its_calls,
    a_table_that_is_made_at_the_first_call,
    gradient_penalty,
    token_sums,
    unused_and_frozen_parameters,
]


def passes(task: Task, **settings: Any) -> None:
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    gradients = {name: p.grad for name, p in task.model.named_parameters()}
    state = torch.get_rng_state()
    certificate = certify(task.model, task.objective, data=task.window, **settings)
    assert certificate.passed, str(certificate)
    after = task.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the model is as it was"
    assert all(gradients[name] is p.grad for name, p in task.model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("make", BY_TORCH)
def test_segments_raise_no_false_alarm(make: Callable[[], Task]) -> None:
    torch.manual_seed(0)
    task = make()
    passes(task, activation_checkpointing=task.segments)


# Where a narrow type does something of its own: routes, rounds, saturates, is left by autocast for float32.
NARROW = [
    mlp,
    group_norm,
    frozen_batch_norm,
    transformer_encoder,
    attention_of_torch,
    gru,
    complex_parameters,
    sparse_embedding,
    weight_norm,
    experts,
    masked_experts,
    noise,
    rounding_straight_through,
    attention_by_hand,
    fused_attention,
    token_sums,
]


@pytest.mark.parametrize("make", NARROW)
def test_bf16_raises_no_false_alarm(make: Callable[[], Task]) -> None:
    torch.manual_seed(0)
    passes(make(), precision="bf16")


def test_a_model_that_changes_its_input_in_place_raises_no_false_alarm() -> None:
    class Changes(Body):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    torch.manual_seed(0)
    task = Task(Changes(nn.Tanh()), MSE, numbers(6), [])
    before = [x.clone() for x, _ in task.window]
    passes(task)
    assert all(torch.equal(x, y) for (x, _), y in zip(task.window, before, strict=True)), "the data is as it was"


@pytest.mark.parametrize("drawn_by", [random, np.random, random.Random(3), np.random.default_rng(3)])
def test_draws_of_python_and_numpy_raise_no_false_alarm(drawn_by: Any) -> None:
    def function(acts: Any, x: Tensor) -> Tensor:
        keep = [[float(acts.drawn_by.random() < 0.5) for _ in row] for row in x]
        return x * acts.v * torch.tensor(keep, dtype=x.dtype)

    acts = Acts(function)
    acts.drawn_by = drawn_by
    torch.manual_seed(0)
    task = flat(acts)
    certificate = certify(task.model, task.objective, data=task.window, activation_checkpointing=["leave"])
    assert certificate.passed, str(certificate)
    assert certificate.draws == ["python or numpy"]


def test_a_transform_of_torch_func_inside_forward_raises_no_false_alarm() -> None:
    def function(acts: Acts, x: Tensor) -> Tensor:
        return x + torch.func.vmap(torch.func.grad(lambda row: (row * acts.v).sin().sum()))(x)

    torch.manual_seed(0)
    passes(flat(Acts(function)))


def test_a_model_of_two_types_raises_no_false_alarm() -> None:
    torch.manual_seed(0)
    task = flat(nn.Tanh(), after=lambda y: y.double())
    task.model.leave.double()
    passes(task._replace(objective=lambda model, batch: F.mse_loss(model(batch[0]).float(), batch[1])))


def test_a_model_that_insists_on_float32_is_held_against_float32() -> None:
    def function(acts: Acts, x: Tensor) -> Tensor:
        assert x.dtype is torch.float32
        return x * acts.v

    torch.manual_seed(0)
    task = flat(Acts(function))
    certificate = certify(task.model, task.objective, data=task.window)
    assert certificate.passed and certificate.reference == "float32", str(certificate)
    assert "float64 does not run here" in certificate.notes[0]


def test_micro_batches_that_do_not_run_put_together_leave_the_cut_open() -> None:
    """Each brings weights of the four classes, as many as it has rows."""
    g = drawn()
    window = [(torch.randn(4, 6, generator=g), torch.randint(4, (4,), generator=g), torch.ones(4)) for _ in range(2)]

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], weight=batch[2])

    torch.manual_seed(0)
    certificate = certify(Body(nn.Tanh(), out=4), objective, data=window)
    assert certificate.passed and "the cut is left open" in certificate.notes[0], str(certificate)


@pytest.mark.parametrize("seed", [3, 35])
def test_kinks_that_bf16_falls_on_the_other_side_of_raise_no_false_alarm(seed: int) -> None:
    torch.manual_seed(seed)
    task = rnn()
    g = torch.Generator().manual_seed(1000 + seed)
    window = [(torch.randint(13, (n, 6), generator=g), torch.randint(3, (n,), generator=g)) for n in SIZES]
    passes(task._replace(window=window), precision="bf16")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_of_torchscript_raises_no_false_alarm() -> None:
    torch.manual_seed(0)
    passes(flat(torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6).eval(), nn.ReLU()))))


# Models of transformers, from configs that make them tiny. Each returns its own loss, so the objective counts what it
# averaged: labels that are not ignored, less those that a causal model shifts away.

SMALL = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def of_transformers(name: str, config: str, shifts: bool, **values: Any) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**values)).train()

    def objective(model: Any, batch: dict[str, Tensor]) -> Sum:
        labels = batch["labels"][:, 1:] if shifts else batch["labels"]
        count = (labels != -100).sum()
        return Sum(model(**batch).loss * count, count)

    return model, objective


def texts(length: int = 6) -> list[dict[str, Tensor]]:
    window = []
    for inputs, labels in tokens(length, 19):
        labels[:, -2:][: len(labels) // 2] = -100
        window.append({"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels})
    return window


MODELS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "BertForMaskedLM": ("BertConfig", False, SMALL),
    "GPT2LMHeadModel": (
        "GPT2Config",
        True,
        {"vocab_size": 19, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8},
    ),
    "LlamaForCausalLM": ("LlamaConfig", True, SMALL),
    "T5ForConditionalGeneration": (
        "T5Config",
        False,
        {"vocab_size": 19, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
        | {"decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        True,
        {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "use_mambapy": False},
    ),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        False,
        {"vocab_size": 19, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12},
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", True, SMALL),
    "MistralForCausalLM": ("MistralConfig", True, SMALL | {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_language_models_of_transformers_raise_no_false_alarm(name: str) -> None:
    config, shifts, values = MODELS[name]
    model, objective = of_transformers(name, config, shifts, **values)
    window = texts()
    if name.startswith("T5"):
        for batch in window:
            del batch["attention_mask"]
    passes(Task(model, objective, window, []))


def test_segments_in_bf16_of_a_language_model_raise_no_false_alarm() -> None:
    model, objective = of_transformers("LlamaForCausalLM", "LlamaConfig", True, **SMALL)
    passes(Task(model, objective, texts(), []), activation_checkpointing=["model.layers.*"], precision="bf16")


def test_an_image_model_of_transformers_raises_no_false_alarm() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).train()
    g = drawn()
    window = [
        {"pixel_values": torch.randn(n, 3, 8, 8, generator=g), "labels": torch.randint(3, (n,), generator=g)}
        for n in SIZES
    ]
    passes(Task(model, lambda model, batch: model(**batch).loss, window, []))
