"""A Hugging Face language model, from a folder or made small on the spot, on text. trainer train recipe=finetune"""

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from trainer.recipes.char_lm import library_files

from trainer.data import Split
from trainer.errors import ConfigError, DataError

IGNORED = -100
"""The label that the models of transformers leave out."""
END = "<|end|>"
"""The token before and after each file, where the tokenizer is made on the spot."""

Item = dict[str, Tensor]


def transformers() -> Any:
    """The package, loaded when it is first needed. Raises ConfigError where it is not installed."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ConfigError(
            'recipe=finetune needs transformers, which is not here: pip install "gradtrainer[huggingface]".'
        ) from None
    return transformers


def language_model(path: str | None = None, kind: str = "llama", config: Mapping[str, Any] | None = None) -> nn.Module:
    """The causal language model in a folder that `save_pretrained` wrote, or a new one. Nothing is downloaded.

    Args:
        path: the folder; None: a new model, its parameters drawn at random.
        kind: of the new model, as transformers names it: llama, gpt2, qwen3, …
        config: the new model's sizes, by the names that its config class has for them.
    """
    package = transformers()
    if path is not None:
        model = _from_folder(package.AutoModelForCausalLM, path, "model", dtype="auto")
    else:
        model = _new(package, kind, config or {})
    model.config.use_cache = False  # it is of use when text is made, and is in the way of activation checkpointing
    found: nn.Module = model
    return found


def _new(package: Any, kind: str, config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=3) or ["llama", "gpt2", "qwen3"]
        raise ConfigError(
            f"model.kind={kind}: transformers has no causal language model of that name; it has {', '.join(near)}, …"
        )
    words = tokenizer()
    ends = {"bos_token_id": words.eos_token_id, "eos_token_id": words.eos_token_id}
    try:
        made = package.AutoConfig.for_model(kind, vocab_size=len(words), **ends, **config)
        return package.AutoModelForCausalLM.from_config(made)
    except Exception as error:  # of several kinds, each a sentence about the config
        raise ConfigError(f"model.config makes no {kind}: {_first_line(error)}") from error


def tokenizer(path: str | None = None) -> Any:
    """The tokenizer in the model's folder, or, where there is no folder, a new one with a token for each byte."""
    package = transformers()
    if path is not None:
        return _from_folder(package.AutoTokenizer, path, "tokenizer")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate([*alphabet, END])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    return package.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=END)


def _from_folder(kind: Any, path: str, what: str, **options: Any) -> Any:
    if not Path(path).is_dir():
        raise ConfigError(
            f"model.path={path}: there is no such folder. Nothing is downloaded: name one that save_pretrained wrote."
        )
    try:
        return kind.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.path={path} holds no {what} that transformers can read: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


class Text(Dataset[Item]):
    """Files as rows of at most `length` tokens; a file's last row is shorter.

    An item has `input_ids` of shape (tokens,). The first token of a row is the last of the row before it, so that each
    token but a file's first is a label once.
    """

    def __init__(self, files: Sequence[str], words: Any, length: int) -> None:
        end = words.eos_token_id
        if end is None:
            raise ConfigError(f"the tokenizer ({type(words).__name__}) has no eos_token to part files by: give it one.")
        self.padding = end if words.pad_token_id is None else words.pad_token_id
        self.rows: list[Tensor] = []
        for ids in words(list(files), add_special_tokens=False, verbose=False)["input_ids"]:
            tokens = torch.tensor([end, *ids, end])
            self.rows += [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        return {"input_ids": self.rows[row]}

    def collate_fn(self, items: list[Item]) -> dict[str, Tensor]:
        """What the model takes as keywords, each of shape (rows, longest). What was padded is no label."""
        ids = [item["input_ids"] for item in items]
        mask = [torch.ones_like(one) for one in ids]
        return {
            "input_ids": pad_sequence(ids, True, self.padding),
            "attention_mask": pad_sequence(mask, True, 0),
            "labels": pad_sequence(ids, True, IGNORED),
        }


def text(
    path: str | None = None,
    files: Sequence[str] = (),
    length: int = 128,
    characters: int = 300_000,
    held_out: int = 10,
) -> Split:
    """Text files, or the source of Python's own library, as rows of tokens.

    Args:
        path: the model's folder, for its tokenizer.
        files: text files of your own, in UTF-8; none: about `characters` of the library's source.
        length: the most labels in a row.
        held_out: every n-th file is held out; of a single one its last n-th part.
    """
    if length < 1 or held_out < 2:
        raise ConfigError("data.source: length must be 1 or more, and held_out 2 or more: every n-th file is held out.")
    words = tokenizer(path)
    texts = [_read(file) for file in files] if files else library_files(characters, 60_000)
    if len(texts) < held_out:
        texts = _pieces("".join(texts), held_out)
    train = [one for index, one in enumerate(texts) if index % held_out != held_out - 1]
    return Split(train=Text(train, words, length), evaluation=Text(texts[held_out - 1 :: held_out], words, length))


def _read(file: str) -> str:
    try:
        read = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.source.files: {file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise DataError(f"data.source.files: {file} is no text in UTF-8.") from None
    if not read.strip():
        raise DataError(f"data.source.files: {file} holds no text.")
    return read


def _pieces(whole: str, count: int) -> list[str]:
    size = -(-len(whole) // count)
    return [whole[start : start + size] for start in range(0, len(whole), size)]


class SavePretrained:
    """A logger that writes the finished model and its tokenizer to `pretrained/` in the run's folder.

    `from_pretrained` reads it, and so does `model.path=`.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.folder: Path | None = None
        self.model: Any = None

    def start(self, event: Any) -> None:
        self.folder = event.folder

    def evaluate(self, event: Any, model: Any) -> None:
        del event
        self.model = model

    def stop(self, event: Any) -> None:
        del event
        if self.folder is None or self.model is None:
            return
        target = self.folder / "pretrained"
        bars = transformers().utils.logging
        shown = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
        try:
            self.model.save_pretrained(target)
        finally:
            if shown:
                bars.enable_progress_bar()
        tokenizer(self.path).save_pretrained(target)
        sys.stdout.write(f"  for from_pretrained, and for model.path: {target}\n")
