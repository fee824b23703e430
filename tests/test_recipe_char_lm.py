"""The recipe char_lm: ragged windows of real text, each character weighed once however the windows are cut."""

import itertools
import math
import sysconfig
from collections import Counter, defaultdict

import pytest
import torch
from torch.nn import functional
from trainer.recipes import char_lm
from trainer.recipes.char_lm import ALPHABET, PADDING, START, NextCharacter, Text, Transformer

from tests.test_recipes import trainer_of
from trainer.errors import ConfigError, DataError

SMALL = [
    *("data.source.length=32", "data.source.characters=30000", "data.source.held_out=3"),
    *("data.source.largest=8000", "data.batch_size=8", "data.evaluation_batch_size=200"),
    *("model.width=16", "model.depth=2", "model.heads=2", "schedule.warmup=2", "evaluation.every=null"),
]


def short(*words, folder=None):
    return trainer_of("recipe=char_lm", *SMALL, *words, folder=folder)


def parameters(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def furthest(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def letters(symbols):
    return "".join(ALPHABET[symbol] for symbol in symbols)


# Text.


def test_every_character_is_the_target_of_one_window_of_whole_lines():
    files = ["import os\n\nprint(os)\n", "x" * 25 + "\ny\n", "no end"]
    text = Text(files, 12)
    said = [letters(text[row][1]) for row in range(len(text))]
    assert said == ["import os\n\n", "print(os)\n", "x" * 12, "x" * 12, "x\ny\n", "no end"]
    for row, (file, start, _) in enumerate(text.windows):
        inputs, targets = text[row]
        assert inputs[0] == (START if start == 0 else ALPHABET.index(files[file][start - 1]))
        assert torch.equal(inputs[1:], targets[:-1])


def test_the_library_is_bounded_ordered_and_divided_by_file():
    split = char_lm.library(64, 100_000, 5, 20_000)
    first, second = ([letters(file[1:]) for file in side.files] for side in split)
    assert len(second) == (len(first) + len(second)) // 5 and not set(first) & set(second)
    assert 100_000 <= sum(map(len, first + second)) < 120_000 and max(map(len, first + second)) <= 20_000
    assert any("\ndef " in file for file in first) and any("\ndef " in file for file in second)
    sizes = {len(split.train[row][1]) for row in range(len(split.train))}
    assert max(sizes) == 64 and len(sizes) > 20  # ragged
    char_lm.library.cache_clear()
    again = char_lm.library(64, 100_000, 5, 20_000).train.files
    assert all(torch.equal(a, b) for a, b in zip(again, split.train.files, strict=True))


def test_a_python_without_its_source_and_a_division_of_nothing_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="held_out 2 or more"):
        char_lm.library(held_out=1)
    with pytest.raises(ConfigError, match="model.width=10 is not possible with model.heads=4"):
        Transformer(8, width=10)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "one.py").write_text("pass\n")
    (tmp_path / "other.py").write_text("# é\n", encoding="utf-8")
    with pytest.raises(DataError, match="not enough of it: 1 files"):
        char_lm.library(33)


# The n-gram.


def by_hand(train: str, held_out: str) -> float:
    """The same model with dictionaries, a character at a time."""
    after = defaultdict(Counter)
    for a, b, c in triples(train):
        for context in ("", b, a + b):
            after[context][c] += 1

    def likely(context: str, c: str) -> float:
        seen = after[context]
        shorter = likely(context[1:], c) if context else 1 / len(ALPHABET)
        kinds = len(seen)
        return (seen[c] + kinds * shorter) / (seen.total() + kinds) if kinds else shorter

    bits = [-math.log2(likely(a + b, c)) for a, b, c in triples(held_out)]
    return sum(bits) / len(bits)


def triples(text: str):
    return zip("^^" + text, "^" + text, text, strict=False)


def test_the_ngram_agrees_with_one_made_by_hand():
    train, held_out = "def f(x):\n    return x\n" * 3, "def g(x):\n    pass\n"
    found = char_lm.ngram_bits(Text([train], 8), Text([held_out], 8))
    assert found == pytest.approx(by_hand(train, held_out), rel=1e-12)
    assert char_lm.ngram_bits(Text([train], 8), Text([train], 8)) < found < math.log2(len(ALPHABET))


# The model.


def test_the_model_sees_what_lies_behind_and_padding_changes_nothing():
    torch.manual_seed(0)
    model = Transformer(16, width=16, depth=2, heads=2)
    for block in model.blocks:
        torch.nn.init.normal_(block.joined.weight, std=0.2)
    symbols = torch.randint(0, len(ALPHABET), (1, 16))
    other = symbols.clone()
    other[0, 9] = (other[0, 9] + 1) % len(ALPHABET)
    before, after = model(symbols), model(other)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=-1).min() > 1e-4

    text = Text(["one\n", "number two\n"], 16)
    items = [text[0], text[1]]
    inputs, targets = text.collate_fn(items)
    assert inputs.shape == targets.shape == (2, 11) and (targets == PADDING).sum() == 7
    objective = NextCharacter()
    assert objective.weight((inputs, targets)) == objective.tokens((inputs, targets)) == 4 + 11
    alone = [functional.cross_entropy(model(a[None])[0], b, reduction="sum") for a, b in items]
    torch.testing.assert_close(objective(model, (inputs, targets)), sum(alone) / 15)


def test_norms_and_biases_do_not_decay_and_the_embedding_is_tied():
    trainer = short()
    decayed, kept = trainer.step.optimizers[0].param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    assert all("norm" in names[id(one)] or names[id(one)].endswith("bias") for one in kept["params"])
    assert all(one.dim() == 2 for one in decayed["params"]) and len(names) == len(decayed["params"] + kept["params"])
    assert not any("head" in name for name in names.values())


# Runs.


def test_it_learns_and_compares_at_the_end(capsys):
    stop = short("optimizer.lr=1e-2", "model.width=32", "model.depth=1", "limits.epochs=2").fit()
    held_out = char_lm.library(32, 30000, 3, 8000).evaluation
    alone = Counter(itertools.chain.from_iterable(file[1:].tolist() for file in held_out.files))
    entropy = -sum(count / alone.total() * math.log2(count / alone.total()) for count in alone.values())
    assert stop.metrics["bits"] < entropy - 0.3  # it makes use of what lies behind
    assert stop.metrics["bits"] == pytest.approx(stop.metrics["loss"] / math.log(2), rel=1e-6)
    ngram = char_lm.ngram_bits(char_lm.library(32, 30000, 3, 8000).train, held_out)
    said = capsys.readouterr().out
    assert f"order-2 n-gram {ngram:.3f}, transformer {stop.metrics['bits']:.3f}" in said


def test_the_tokens_clock_counts_characters_and_a_schedule_can_follow_it():
    trainer = short("schedule=linear", "schedule.clock=tokens", "schedule.total=100000", "schedule.warmup=0")
    stop = trainer.fit()
    train = char_lm.library(32, 30000, 3, 8000).train
    characters = sum(len(file) - 1 for file in train.files)
    assert stop.clocks["tokens"] == characters and stop.clocks["rows"] == len(train)
    last = stop.clocks["tokens"] - trainer.last_report.tokens
    assert trainer.last_report.lr == pytest.approx(4e-3 * (1 - last / 100000))


@pytest.mark.parametrize(
    "cut",
    [
        ["data.batch_size=2", "gradient.accumulation_steps=4"],
        ["data.batch_size=1", "gradient.accumulation_steps=8"],
        ["activation_checkpointing=segments", "activation_checkpointing.modules=[blocks.*]"],
        ["data.workers=1"],
    ],
)
def test_however_ragged_windows_are_cut_the_update_is_the_same(cut):
    words = ["precision=fp64", "limits.steps=4"]
    whole, other = short(*words), short(*words, *cut)
    whole.fit()
    assert other.fit().clocks["tokens"] == whole.step.clocks.tokens
    assert furthest(parameters(whole), parameters(other)) < 1e-9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stop_in_mid_epoch_changes_no_bit(tmp_path, precision):
    words = [f"precision={precision}", "schedule.total=6", "data.batch_size=3", "data.source.held_out=6"]
    whole = short(*words, "limits.steps=6")
    whole.fit()
    short(*words, "limits.steps=3", folder=tmp_path).fit()
    resumed = short(*words, "limits.steps=6")
    resumed.fit(resume=tmp_path)
    assert resumed.step.clocks.steps == 6 and furthest(parameters(whole), parameters(resumed)) == 0.0
