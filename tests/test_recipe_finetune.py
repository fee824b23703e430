"""The recipe finetune, and what its models count: shifted labels or not, held against every label in one sum."""

import copy
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.reference import farthest
from tests.test_recipes import trainer_of
from trainer import Step, model_loss
from trainer.cli import main
from trainer.errors import ConfigError, DataError, ObjectiveError

transformers = pytest.importorskip("transformers")

from trainer.recipes import finetune  # noqa: E402

SMALL = [
    "model.config.hidden_size=16", "model.config.intermediate_size=16", "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2", "data.source.characters=20000", "data.source.length=32", "limits.steps=3",
]  # fmt: skip
SYMBOLS = 11


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The models, in float64, where transformers takes its losses in float32.


def gpt2(**more):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    none = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=SYMBOLS, bos_token_id=0, eos_token_id=0, **sizes, **none, **more)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return finetune.language_model(config={
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    })  # fmt: skip


def bert(kind: str, **more):
    config = transformers.BertConfig(
        vocab_size=SYMBOLS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{kind}")(config)


def t5():
    config = transformers.T5Config(
        vocab_size=SYMBOLS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


MODELS = {
    "gpt2": (gpt2, 1),
    "llama": (llama, 1),
    "masked": (lambda: bert("MaskedLM"), 0),
    "tokens": (lambda: bert("TokenClassification", num_labels=SYMBOLS), 0),
    "sequence to sequence": (t5, 0),
}


def batch(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SYMBOLS, (rows, length), generator=draw)
    labels = ids.masked_fill(torch.rand(rows, length, generator=draw) < 0.4, -100)
    labels[:, 1] = ids[:, 1]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


WINDOW = [batch(2, 5, 1), batch(3, 9, 2), batch(1, 4, 3)]


def taken(model, window, objective=None) -> tuple[dict[str, Tensor], float]:
    """A window's gradient as the step leaves it, and what it weighed."""
    step = Step(model, objective or model_loss(), torch.optim.SGD(model.parameters(), lr=0.0))
    weight = step(window).weight
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, weight


@pytest.mark.parametrize("kind", MODELS)
def test_a_ragged_window_has_the_gradient_of_all_its_labels_at_once(kind):
    make, shift = MODELS[kind]
    torch.manual_seed(0)
    model = make().double().train()
    found, weight = taken(model, WINDOW)
    other = copy.deepcopy(model)
    other.zero_grad()
    flat, labels = [], []
    for one in WINDOW:
        logits = other(**one).logits
        flat.append(logits[:, : logits.shape[1] - shift].flatten(0, 1))
        labels.append(one["labels"][:, shift:].flatten())
    total = functional.cross_entropy(torch.cat(flat), torch.cat(labels), reduction="sum")
    (total / weight).backward()
    assert weight == (torch.cat(labels) != -100).sum()
    true = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    largest = max(float(one.abs().max()) for one in true.values())
    alive = {name for name, one in true.items() if one.abs().max() > 1e-12 * largest}  # a key's bias has none
    assert farthest({n: found[n] for n in alive}, {n: true[n] for n in alive}) < 1e-12


def test_gpt2_is_weighed_after_the_shift_where_its_own_trainer_counts_before_it():
    """transformers 5.23 tells the shift by the class's name, which GPT2LMHeadModel's does not say: 22/29 here."""
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in (torch.randint(1, SYMBOLS, (1, n)) for n in [5] + [4] * 6)]
    model = gpt2().double().train()
    found, weight = taken(model, rows)
    assert weight == 22.0
    model.zero_grad()
    before = sum(int((one["labels"] != -100).sum()) for one in rows)
    for one in rows:  # as its Trainer does it: the whole window's count goes into every forward
        model(**one, num_items_in_batch=before).loss.backward()
    theirs = {name: p.grad * (29 / 22) for name, p in model.named_parameters()}
    assert before == 29 and farthest(theirs, found) < 1e-4


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_rows_with_one_label_each(problem):
    torch.manual_seed(0)
    outputs = 1 if problem == "regression" else 3
    model = bert("SequenceClassification", num_labels=outputs, problem_type=problem).double().train()
    labels = {1: torch.rand(6).double(), 3: torch.randint(0, 3, (6,))}[outputs]
    if problem.startswith("multi"):
        labels = torch.randint(0, 2, (6, 3)).double()
    ids = torch.randint(1, SYMBOLS, (6, 5))
    cut = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in (slice(0, 4), slice(4, 6))]
    pieces, _ = taken(model, cut)
    whole, _ = taken(model, [{"input_ids": ids, "labels": labels}])
    whole = {name: one for name, one in whole.items() if one.abs().max() > 1e-15}
    assert farthest({name: pieces[name] for name in whole}, whole) < 1e-12


def test_a_loss_with_a_term_that_is_no_mean_over_labels_is_refused():
    config = transformers.MixtralConfig(
        vocab_size=SYMBOLS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).train()
    with pytest.raises(ObjectiveError, match="what the loss of MixtralForCausalLM .* cannot be told"):
        taken(model, WINDOW)


def test_what_a_tokenizer_returns_is_a_micro_batch_as_it_stands():
    torch.manual_seed(0)
    model, words = llama().train(), finetune.tokenizer()
    rows = words(["abc", "xyz"], return_tensors="pt")
    rows["labels"] = rows["input_ids"]
    assert type(rows) is transformers.BatchEncoding
    assert taken(model, [rows])[1] == 4.0


# The recipe.


def test_it_learns_and_what_it_saves_goes_on_from_there(here, capsys):
    words = ["recipe=finetune", *SMALL, "limits.steps=12", "optimizer.lr=0.02", "loggers.console=false"]
    assert main(["train", *words, "run=a"]) == 0
    assert "for from_pretrained, and for model.path: outputs/finetune/a/pretrained" in capsys.readouterr().out
    folder = str(here / "outputs/finetune/a/pretrained")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    again = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert again.decode(again("def f(x):\n  return 'é'")["input_ids"]) == "def f(x):\n  return 'é'"
    trained = trainer_of("recipe=finetune", *SMALL, f"model.path={folder}")
    fresh = trainer_of("recipe=finetune", *SMALL)
    assert type(trained.model).__name__ == "LlamaForCausalLM" and trained.model.config.use_cache is False
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained.model.get_parameter(name)), name
    assert trained.evaluate()["loss"] < fresh.evaluate()["loss"] - 1


def test_pieces_and_segments_give_the_gradient_of_the_whole_window():
    reports = {}
    for words in (
        ["data.batch_size=8"],
        ["data.batch_size=4", "gradient.accumulation_steps=2"],
        ["data.batch_size=8", "activation_checkpointing=segments", "activation_checkpointing.modules=[model.layers.*]"],
    ):
        trainer = trainer_of(
            "recipe=finetune", *SMALL, "precision=fp64", "data.shuffle=false", "limits.steps=1", *words
        )
        trainer.fit()
        report = trainer.last_report
        gradient = {name: p.grad for name, p in trainer.model.named_parameters()}
        reports[words[-1]] = (report.loss, report.weight, gradient)
    (loss, weight, gradient), *others = reports.values()
    for other_loss, other_weight, other in others:
        assert other_weight == weight and other_loss == pytest.approx(loss, rel=1e-12)
        assert farthest(other, gradient) < 1e-11


def test_the_certificate_says_that_its_gradient_is_the_one_asked_for(here, capsys):
    cut = ["data.batch_size=4", "gradient.accumulation_steps=3"]
    assert main(["check", "recipe=finetune", *SMALL, *cut]) == 0
    assert "the gradient is the one asked for" in capsys.readouterr().out


def test_the_rows_of_a_text_hold_each_token_as_a_label_once():
    words = finetune.tokenizer()
    text = finetune.Text(["abcdefgh\n", "xy"], words, 4)
    rows = text.collate_fn([text[index] for index in range(len(text))])
    labels = rows["labels"][:, 1:]
    end = words.eos_token_id
    assert labels[labels != -100].tolist() == [*words("abcdefgh\n")["input_ids"], end, *words("xy")["input_ids"], end]
    assert len(text) == 4 and rows["attention_mask"].sum() == (rows["labels"] != -100).sum()


def test_ones_own_files_and_what_may_be_wrong_with_them(here):
    (here / "a.txt").write_text("one two three four five six\n" * 20)
    split = finetune.text(files=["a.txt"], length=16, held_out=4)
    assert sum(len(row) - 1 for row in split.train.rows) == 3 * (20 * 28 // 4 + 1)
    (here / "b.txt").write_bytes(b"\xff\xfe\x00")
    (here / "c.txt").write_text(" \n")
    for file, says in (("b.txt", "is no text in UTF-8"), ("c.txt", "holds no text"), ("d.txt", "cannot be read")):
        with pytest.raises(DataError, match=f"{file} {says}"):
            finetune.text(files=[file])
    with pytest.raises(ConfigError, match="held_out 2 or more"):
        finetune.text(held_out=1)


def test_a_folder_that_is_not_there_and_one_without_a_model(here, capsys):
    assert main(["train", "recipe=finetune", "model.path=meta/llama"]) == 2
    assert "model.path=meta/llama: there is no such folder. Nothing is downloaded" in capsys.readouterr().err
    assert main(["train", "recipe=finetune", f"model.path='{here}'"]) == 2
    assert "holds no model that transformers can read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.kind=gpt3", "model.kind=gpt3: transformers has no causal language model of that name; it has "),
        ("model.config.num_attention_heads=5", "model.config makes no llama: "),
        ("model.config.hidden_size=many", "model.config makes no llama: "),
    ],
)
def test_a_model_that_cannot_be_made_is_a_sentence(here, capsys, word, says):
    assert main(["train", "recipe=finetune", word]) == 2
    said = capsys.readouterr().err
    assert said.startswith(says) and said.count("\n") == 1


def test_without_transformers_the_words_that_install_it(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["train", "recipe=finetune"]) == 2
    assert 'pip install "gradtrainer[huggingface]"' in capsys.readouterr().err
    assert main(["recipes"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("finetune"))
    assert 'pip install "gradtrainer[huggingface]"' in line
