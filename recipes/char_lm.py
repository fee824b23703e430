"""The interpreter's own library source, character by character, by a small transformer. trainer train recipe=char_lm"""

import functools
import math
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from trainer.data import Split
from trainer.errors import ConfigError, DataError
from trainer.gradient.objective import Sum

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
START = len(ALPHABET)
"""The symbol that stands before a file's first character."""
SYMBOLS = len(ALPHABET) + 1
PADDING = -100
"""The target that is none: what cross_entropy ignores."""
_NUMBERS = torch.zeros(128, dtype=torch.int64)
_NUMBERS[list(ALPHABET.encode())] = torch.arange(len(ALPHABET))

Windows = tuple[Tensor, Tensor]


class Text(Dataset[Windows]):
    """Files as windows of whole lines, at most `length` characters each, so windows differ in length.

    An item is (inputs, targets), both int64 of shape (characters,): each target is the character after its input.
    """

    def __init__(self, files: Sequence[str], length: int) -> None:
        self.files = [torch.cat((torch.tensor([START]), _NUMBERS[list(file.encode())])) for file in files]
        self.windows: list[tuple[int, int, int]] = []
        for index, file in enumerate(files):
            start = 0
            while start < len(file):
                stop = start + length
                if stop < len(file):
                    stop = file.rfind("\n", start, stop) + 1 or stop  # a line that is longer is cut
                self.windows.append((index, start, min(stop, len(file))))
                start = stop

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, row: int) -> Windows:
        file, start, stop = self.windows[row]
        return self.files[file][start:stop], self.files[file][start + 1 : stop + 1]

    def collate_fn(self, items: list[Windows]) -> Windows:
        """Items as a micro-batch of shape (rows, longest): padded at the end, where a target is PADDING."""
        inputs, targets = ([item[side] for item in items] for side in (0, 1))
        return pad_sequence(inputs, True, START), pad_sequence(targets, True, PADDING)


@functools.lru_cache(maxsize=1)  # the data and the story ask for the same
def library(length: int = 128, characters: int = 900_000, held_out: int = 10, largest: int = 60_000) -> Split:
    """Source files of the running Python's standard library, in the order of their names, as windows of `length`.

    Files of at most `largest` characters are taken until there are about `characters`, every `held_out`th for
    evaluation. Modules with a leading underscore, and files with other characters than ASCII's printable ones, are not.
    """
    if length < 1 or held_out < 2:
        raise ConfigError("data.source: length must be 1 or more, and held_out 2 or more: every n-th file is held out.")
    taken = library_files(characters, largest)
    if len(taken) < held_out:
        raise DataError(
            f"{_folder()}: the source of Python's library is not there, or not enough of it: {len(taken)} files."
        )
    train = [text for index, text in enumerate(taken) if index % held_out != held_out - 1]
    return Split(train=Text(train, length), evaluation=Text(taken[held_out - 1 :: held_out], length))


def library_files(characters: int, largest: int) -> list[str]:
    """Source files of the running Python's standard library as texts; which ones, `library` says."""
    taken: list[str] = []
    for path in sorted(_folder().glob("[!_]*.py")):
        if sum(map(len, taken)) < characters and path.stat().st_size <= largest:
            text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
            if text and set(text) <= set(ALPHABET):
                taken.append(text)
    return taken


def _folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


class Block(nn.Module):
    """Causal attention, then a layer for each position, both added to what came in, of shape (rows, length, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.wider = nn.Linear(width, 4 * width)
        self.narrower = nn.Linear(4 * width, width)
        for last in (self.joined, self.narrower):
            nn.init.zeros_(last.weight)  # a block starts by adding nothing

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.attention(self.attention_norm(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.joined(seen.transpose(1, 2).reshape(rows, length, width))
        result: Tensor = x + self.narrower(functional.gelu(self.wider(self.norm(x))))
        return result


class Transformer(nn.Module):
    """Symbols of shape (rows, length) to logits of shape (rows, length, SYMBOLS). Its first layer is also its last.

    Each place starts from its symbol and, in tables of their own, the two before it: what the n-gram knows as well.
    """

    def __init__(self, length: int, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"model.width={width} is not possible with model.heads={heads}: it must be a multiple.")
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.before = nn.ModuleList(nn.Embedding(SYMBOLS, width) for _ in range(2))
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.symbols, *self.before, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.symbols(symbols) + self.positions.weight[: symbols.shape[1]]
        for distance, table in enumerate(self.before, start=1):
            x = x + table(functional.pad(symbols, (distance, 0), value=START)[:, :-distance])
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.symbols.weight)


class NextCharacter:
    """The objective: mean cross-entropy over the characters of a micro-batch, in nats. Padding weighs nothing."""

    def __call__(self, model: Any, micro_batch: Windows) -> Tensor:
        inputs, targets = micro_batch
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=PADDING)

    def weight(self, micro_batch: Windows) -> int:
        """How many characters the mean is of."""
        return int((micro_batch[1] != PADDING).sum())

    tokens = weight  # what the clock of that name counts


def bits(model: Any, micro_batch: Windows) -> dict[str, Sum]:
    """Bits that each character costs."""
    objective = NextCharacter()
    weight = objective.weight(micro_batch)
    return {"bits": Sum(objective(model, micro_batch) * (weight / math.log(2)), weight)}


def ngram_bits(train: Text, held_out: Text) -> float:
    """Bits per held-out character of an order-2 n-gram: each character given the two before it, also over windows.

    Interpolated with the shorter contexts (Witten and Bell 1991): a context that went on in many different ways says
    less, so more is left to the shorter one.
    """
    a, b, c = _after_two(train)
    counts = torch.bincount((a * SYMBOLS + b) * SYMBOLS + c, minlength=SYMBOLS**3).view(SYMBOLS, SYMBOLS, SYMBOLS)
    likely = torch.full((SYMBOLS,), 1 / len(ALPHABET), dtype=torch.float64)
    for seen in (counts.sum((0, 1)), counts.sum(0), counts):
        kinds = (seen > 0).sum(-1, keepdim=True).clamp(min=1)
        likely = (seen + kinds * likely) / (seen.sum(-1, keepdim=True) + kinds)
    return float(-likely[_after_two(held_out)].log2().mean())


def _after_two(text: Text) -> tuple[Tensor, Tensor, Tensor]:
    """Every character of the files behind the two before it, three tensors of shape (characters,)."""
    start = torch.tensor([START])
    files = [torch.cat((start, file)) for file in text.files]
    a, b, c = (torch.cat([file[skip : len(file) - 2 + skip] for file in files]) for skip in range(3))
    return a, b, c


class Compare:
    """A logger that says at the end what the n-gram and the model need on the same held-out characters."""

    def __init__(self, text: Split) -> None:
        self.text = text

    def stop(self, event: Any) -> None:
        ngram = ngram_bits(self.text.train, self.text.evaluation)
        sys.stdout.write(f"  bits per held-out character: order-2 n-gram {ngram:.3f}")
        if "bits" in event.metrics:
            found = event.metrics["bits"]
            sys.stdout.write(
                f", transformer {found:.3f}: {abs(ngram - found):.3f} {'less' if found < ngram else 'MORE'}"
            )
        sys.stdout.write("\n")
