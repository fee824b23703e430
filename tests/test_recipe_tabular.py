"""The recipe tabular: a table of the user's own, and a sentence for all that may be wrong with it."""

import random
import sys

import numpy
import pytest
import torch
from trainer.recipes import tables, tabular

from tests.test_recipes import trainer_of
from trainer.cli import main
from trainer.errors import ConfigError, DataError


def houses(rows: int = 400) -> list[list]:
    """Size, town, year, price (out of the others, with noise of 5,000) and whether it is dear."""
    draw = random.Random(0)
    towns = {"Ulm": 50_000, "Kiel": 0, "Bonn": 90_000}
    table = []
    for _ in range(rows):
        size, town, year = round(draw.uniform(40, 200), 1), draw.choice(list(towns)), draw.randint(1950, 2020)
        price = round(1000 * size + towns[town] + 500 * (year - 1950) + draw.gauss(0, 5000), 2)
        table.append([size, town, year, price, "yes" if price > 200_000 else "no"])
    return table


NAMES = ["size", "town", "year", "price", "dear"]


def write(path, rows, names=NAMES, delimiter=","):
    path.write_text("\n".join(delimiter.join(str(cell) for cell in row) for row in [names, *rows]) + "\n")
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "houses.csv", houses())
    return tmp_path


PRICE = ["data.source.target=price", "data.source.categories=[town]", "data.source.leave_out=[dear]"]
DEAR = ["data.source.target=dear", "data.source.categories=[town]", "data.source.leave_out=[price]"]


def table_of(here, text: str, target: str = "y", **options):
    (here / "t.csv").write_text(text)
    return tabular.table("t.csv", target, **options)


# It learns.


def test_a_regression_reaches_the_noise_and_says_what_it_is(here, capsys):
    trainer = trainer_of("recipe=tabular", "data.source.path=houses.csv", *PRICE)
    stop = trainer.fit()
    assert stop.metrics["loss"] < 0.02  # the noise alone is 0.008 of the variance
    assert stop.metrics["absolute_error"] < 6500  # in the target's unit; the noise alone has 4,000
    said = capsys.readouterr().out
    assert "'price': regression (to change that: data.source.task=classification)" in said
    assert "5 inputs, 320 rows to train, 80 held out" in said  # size, three towns, year
    wide = trainer_of("recipe=tabular", "data.source.path=houses.csv", *PRICE, "precision=fp64", "debug=fast")
    assert wide.fit().clocks["steps"] == 3


def test_a_classification_learns_and_says_what_it_is(here, capsys):
    stop = trainer_of("recipe=tabular", "data.source.path=houses.csv", *DEAR, "limits.epochs=20").fit()
    assert stop.metrics["accuracy"] > 0.9
    assert "'dear': classification, 2 classes (its values are text). 5 inputs" in capsys.readouterr().out


def test_the_saved_model_takes_rows_as_they_stand_in_the_file(here, capsys):
    words = ["recipe=tabular", "data.source.path=houses.csv", *PRICE, "limits.epochs=5", "loggers.console=false"]
    assert main(["train", *words, "run=a"]) == 0
    capsys.readouterr()
    assert main(["eval", *words, "run=a"]) == 0
    said = capsys.readouterr().out
    from safetensors.torch import load_file

    table = tabular.table("houses.csv", "price", categories=["town"], leave_out=["dear"])
    model = tabular.TabularMLP(table)
    model.load_state_dict(load_file("outputs/tabular/a/model.safetensors"))
    rows, prices = table.evaluation
    with torch.no_grad():
        error = (model(rows) - prices).abs().mean().item()
    assert rows[:, table.inputs.index("year")].min() >= 1950  # not standardised: that is the model's to do
    assert f"absolute_error {error:.6g}"[:19] in said


# What is made of a file.


def test_means_and_deviations_are_those_of_the_training_rows_alone(here):
    table = tabular.table("houses.csv", "price", categories=["town"], leave_out=["dear"])
    model = tabular.TabularMLP(table, width=4, depth=1)
    rows, prices = table.train
    torch.testing.assert_close(model.centre, rows.double().mean(0).float())
    torch.testing.assert_close(model.scale, rows.double().std(0, correction=0).float())
    torch.testing.assert_close(model.target_scale, prices.double().std(correction=0).float())
    rows.zero_()  # what was kept is a copy
    assert (model.scale > 0).all()


def test_held_out_rows_follow_from_the_seed_and_none_is_on_both_sides(here):
    first = tabular.table("houses.csv", "price", leave_out=["town", "dear"])
    torch.manual_seed(5)
    second = tabular.table("houses.csv", "price", leave_out=["town", "dear"])
    other = tabular.table("houses.csv", "price", leave_out=["town", "dear"], seed=1, held_out=0.5)
    assert torch.equal(first.evaluation[0], second.evaluation[0])
    assert [len(part[0]) for part in (*first, *other)] == [320, 80, 200, 200]
    assert not torch.equal(first.evaluation[1], other.evaluation[1][:80])
    rows = sorted((row[0], row[2], row[3]) for row in houses())
    found = torch.cat([torch.column_stack((part[0], part[1])) for part in first])
    torch.testing.assert_close(torch.tensor(sorted(map(tuple, found.tolist()))), torch.tensor(rows))


def test_each_value_of_the_training_rows_is_an_input_and_others_are_none(here):
    text = "kind,y\n" + "".join(f"{kind},{index}.5\n" for index, kind in enumerate("ab" * 10 + "c"))
    for seed in range(20):
        table = table_of(here, text, categories=["kind"], seed=seed)
        rare = table.evaluation[0][table.evaluation[1] == 20.5]
        if len(rare):
            break
    assert table.inputs == ["kind=a", "kind=b"] and rare.tolist() == [[0.0, 0.0]]
    assert (table.train[0].sum(1) == 1).all()
    numbers = table_of(here, "zip,y\n" + "\n".join(f"{70 + i % 3},{i}.5" for i in range(9)), categories="zip", seed=1)
    assert numbers.inputs == ["zip=70", "zip=71", "zip=72"]


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["yes", "no"], None, ["no", "yes"]),
        ([3, 1, 20], None, ["1", "3", "20"]),
        ([0.5, 1.5], None, None),
        ([3, 1, 20], "regression", None),
        (list(range(11)), None, None),
        (list(range(11)), "classification", [str(n) for n in range(11)]),
    ],
)
def test_the_task_is_told_or_inferred_from_the_target(here, values, task, classes):
    text = "x,y\n" + "".join(f"{row},{values[row % len(values)]}\n" for row in range(66))
    table = table_of(here, text, task=task)
    assert table.classes == classes
    targets = torch.cat((table.train[1], table.evaluation[1]))
    assert targets.dtype is (torch.float32 if classes is None else torch.int64)
    if classes is not None:
        assert targets.unique().tolist() == list(range(len(classes)))
    assert ("(" in table.story) == (task is None)
    assert tabular.TabularMLP(table, width=3)(table.train[0]).shape == (
        (len(table.train[0]), len(classes)) if classes else (len(table.train[0]),)
    )


def test_a_constant_column_is_no_division_by_zero(here):
    table = table_of(here, "x,one,y\n" + "".join(f"{i},1,{i}.5\n" for i in range(20)))
    answers = tabular.TabularMLP(table)(table.train[0])
    assert answers.isfinite().all()


# Files.

GOOD = "a,b,y\n" + "".join(f"{i},{i * i % 7},{2 * i + 0.5}\n" for i in range(40))


def test_csv_with_a_mark_in_front_other_delimiters_quotes_and_blank_lines(here):
    wanted = tables.read(here / "houses.csv")
    assert list(wanted) == NAMES and wanted["size"].dtype == float and wanted["town"].dtype == object
    (here / "other.csv").write_text("\ufeff" + (here / "houses.csv").read_text().replace(",", ";") + "\n\n")
    other = tables.read("other.csv", "semicolon")
    assert all(numpy.array_equal(wanted[name], other[name]) for name in NAMES)
    (here / "quoted.csv").write_text('"a, b",y\n" 1 ","x\ny"\n2,z\n')
    quoted = tables.read("quoted.csv")
    assert quoted["a, b"].tolist() == [1.0, 2.0] and quoted["y"].tolist() == ["x\ny", "z"]


def test_a_file_that_changed_is_read_again(here):
    assert tables.read(write(here / "c.csv", [[1]], ["x"]))["x"].tolist() == [1.0]
    assert tables.read(write(here / "c.csv", [[1], [2]], ["x"]))["x"].tolist() == [1.0, 2.0]


def test_npz(here):
    numpy.savez(
        "t.npz", X=numpy.ones((4, 2), numpy.int8), y=numpy.array(["a", "b", "a", "c"]), z=numpy.array([True] * 4)
    )
    columns = tables.read("t.npz")
    assert list(columns) == ["X.0", "X.1", "y", "z"]
    assert columns["X.1"].tolist() == [1] * 4 and columns["y"].tolist() == ["a", "b", "a", "c"]
    rows = houses()
    numpy.savez("h.npz", size=[row[0] for row in rows], price=[row[3] for row in rows])
    stop = trainer_of("recipe=tabular", "data.source.path=h.npz", "data.source.target=price", "debug=fast").fit()
    assert stop.clocks["steps"] == 3


def test_parquet(here):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    day = numpy.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]")
    names = pyarrow.array(["x", None]).dictionary_encode()
    values = {
        "whole": [1, None],
        "part": [0.5, 1.5],
        "text": ["a", "b"],
        "names": names,
        "day": day,
        "list": [[1], [2]],
    }
    parquet.write_table(pyarrow.table(values), "t.parquet")
    columns = tables.read("t.parquet")
    assert columns["whole"].tolist()[0] == 1.0 and numpy.isnan(columns["whole"][1])
    assert columns["part"].tolist() == [0.5, 1.5] and columns["text"].tolist() == ["a", "b"]
    assert columns["names"].tolist() == ["x", ""] and columns["day"].tolist() == ["2020-01-01", "2020-01-02"]
    assert columns["list"].dtype == object
    (here / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="bad.parquet: this is no Parquet file: "):
        tables.read("bad.parquet")


def test_parquet_without_pyarrow(here, monkeypatch):
    (here / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "gradtrainer\[tabular\]"'):
        tables.read("t.parquet")


# What is wrong with a file.

WRONG = {
    "": "t.csv: the file is empty.",
    "a,b,y\n": "t.csv: the table has no row.",
    "\n\n": "t.csv: the table has no row.",
    GOOD.replace(",", ";"): "one column only, named 'a;b;y': write data.source.delimiter=semicolon.",
    GOOD + "1,2\n": "t.csv, line 42: 2 cells, but there are 3 columns.",
    GOOD
    + "7,oops,3\n": "t.csv, row 41 of the data: the column 'b' holds 'oops', which is no number: mend it, or write "
    "data.source.categories=[b]",
    GOOD + "7,,3\n": "row 41 of the data: the column 'b' is empty: mend it, or write data.source.leave_out=[b].",
    GOOD + "7,1_0,3\n": "holds '1_0', which is no number",
    GOOD + "7,nan,3\n": "row 41 of the data: the column 'b' holds nan",
    GOOD + "7,-inf,3\n": "row 41 of the data: the column 'b' holds -inf",
    GOOD + "7,1e300,3\n": "row 41 of the data: the column 'b' holds 1e+300",
    GOOD + "7,1,\n": "row 41 of the data: the target 'y' is empty",
    GOOD + "7,1,nan\n": "row 41 of the data: the column 'y' holds nan: mend it, or take the row out.",
    GOOD + "7,1,n/a\n": "too many for classes (the first that is no number is 'n/a' in row 41)",
    GOOD.replace("a,b,y", "a,a,y"): "two columns are named 'a': rename one.",
    GOOD.replace("a,b,y", "a,,y"): "column 2 has no name",
    'a,y\n"1,2\n': "line 2: this is no CSV: unexpected end of data.",
    "a,y\n" + "".join(f"{i},k\n" for i in range(9)): "the target 'y' has one value in all training rows",
    "a,y\n" + "".join(f"{i},3.5\n" for i in range(9)): "the target 'y' has one value in all training rows",
    "a,y\n1,2.5\n2,3.5\n": "2 rows are too few",
    "y\n" + "".join(f"{i}.5\n" for i in range(9)): "no column is left to learn from.",
    "a,y\n" + "".join(f"{2**53 + 2 * i},{i}.5\n" for i in range(9)): "lie too close together for their size",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_each_thing_that_is_wrong_has_its_sentence(here, text):
    with pytest.raises(DataError) as caught:
        table_of(here, text)
    assert WRONG[text] in str(caught.value) and str(caught.value).startswith("t.csv")


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"target": "yy"}, DataError, "t.csv has no column 'yy' (data.source.target): did you mean 'y'?"),
        ({"categories": ["c"]}, DataError, "has no column 'c' (data.source.categories): choose one of: a, b, y."),
        ({"leave_out": "c"}, DataError, "has no column 'c' (data.source.leave_out)"),
        ({"task": "classification"}, DataError, "values with a fraction, which are no classes"),
        ({"held_out": 0.99}, DataError, "40 rows are too few to hold 0.99 of them out"),
        (
            {"task": "regresion"},
            ConfigError,
            "data.source.task='regresion' is not possible: did you mean 'regression'?",
        ),
        ({"held_out": 1.5}, ConfigError, "data.source.held_out=1.5 is not possible"),
        ({"delimiter": "semi"}, ConfigError, "data.source.delimiter='semi' is not possible: did you mean 'semicolon'?"),
    ],
)
def test_settings_that_do_not_fit_the_file_or_themselves(here, options, error, sentence):
    with pytest.raises(error) as caught:
        table_of(here, GOOD, **options)
    assert type(caught.value) is error and sentence in str(caught.value)


def test_more_that_is_wrong(here, monkeypatch):
    many = "a,y\n" + "".join(f"k{i},{i}.5\n" for i in range(150))
    with pytest.raises(DataError, match=r"'a' has 120 values, more than the 100 .*data.source.leave_out=\[a\]"):
        table_of(here, many, categories=["a"])
    with pytest.raises(DataError, match="row 1 of the data: the column 'town' holds '(Bonn|Ulm|Kiel)'"):
        tabular.table("houses.csv", "price")
    (here / "latin.csv").write_bytes(GOOD.replace("b", "ü", 1).encode("latin-1"))
    with pytest.raises(DataError, match="is not text in UTF-8"):
        tables.read("latin.csv")
    (here / "folder.csv").mkdir()
    with pytest.raises(DataError, match="folder.csv: the file cannot be read"):
        tables.read("folder.csv")
    with pytest.raises(DataError, match="has the ending .csv, .npz or .parquet"):
        tables.read("houses.xls")
    with pytest.raises(ConfigError, match="model.width=0"):
        tabular.TabularMLP(tabular.table("houses.csv", "price", leave_out=["town", "dear"]), width=0)


def test_an_npz_with_objects_of_unequal_length_or_damaged(here):
    numpy.savez("objects.npz", y=numpy.array([1, "a", None], dtype=object))
    numpy.savez("lengths.npz", x=numpy.zeros(3), y=numpy.zeros(4))
    numpy.savez("deep.npz", x=numpy.zeros((3, 2, 2)))
    numpy.savez_compressed("good.npz", x=numpy.random.default_rng(0).random(500))
    whole = (here / "good.npz").read_bytes()
    for name, sentence in (("objects", "no NPZ file"), ("lengths", "x 3, y 4"), ("deep", r"shape \(3, 2, 2\)")):
        with pytest.raises(DataError, match=sentence):
            tables.read(f"{name}.npz")
    damaged = [whole[:200], b"nonsense", whole[:300] + bytes(64) + whole[364:], whole[: len(whole) // 2]]
    for number, content in enumerate(damaged):
        (here / f"damaged{number}.npz").write_bytes(content)
        with pytest.raises(DataError, match="this is no NPZ file of numbers and text"):
            tables.read(f"damaged{number}.npz")


# The command.


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "data.source.path has no value yet (???): write data.source.path=VALUE.\n"),
        (["data.source.path=house.csv", *PRICE], 3, "house.csv: there is no such file, did you mean 'houses.csv'?\n"),
        (["data.source.path=houses.csv", "data.source.target=prize"], 3, "no column 'prize' (data.source.target): did"),
        (["data.source.path=empty.csv", *PRICE], 3, "empty.csv: the file is empty.\n"),
        (["data.source.path=houses.csv", "data.source.taget=y"], 2, "did you mean 'data.source.target'?\n"),
    ],
)
def test_the_command_answers_with_a_sentence_and_a_code(here, capsys, words, code, sentence):
    (here / "empty.csv").touch()
    assert main(["train", "recipe=tabular", *words, "loggers.console=false"]) == code
    said = capsys.readouterr().err
    assert said.endswith(sentence) or sentence in said
    assert said.count("\n") == 1
