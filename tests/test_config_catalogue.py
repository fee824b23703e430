"""Recipes and group options, read from the folders alone."""

from trainer.config import catalogue


def test_ones_own_folder_adds_to_what_is_shipped_and_wins(tmp_path):
    (tmp_path / "recipe" / "deep").mkdir(parents=True)
    (tmp_path / "recipe" / "deep" / "mine.yaml").write_text("description: my own\n")
    (tmp_path / "recipe" / "xor.yaml").write_text("seed: 1\n")
    (tmp_path / "colour").mkdir()
    (tmp_path / "colour" / "red.yaml").write_text("")
    found = catalogue.options("recipe", tmp_path)
    assert {"digits", "xor_mlp", "deep/mine"} <= set(found)
    assert found["xor"] == tmp_path / "recipe" / "xor.yaml"
    assert catalogue.described(found["deep/mine"]) == "my own" and catalogue.described(found["xor"]) == ""
    assert "colour" in catalogue.groups(tmp_path) and "colour" not in catalogue.groups()
    assert catalogue.options("no_such_group") == {}


def test_a_file_that_cannot_be_read_is_listed_and_says_so(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert catalogue.described(tmp_path / "broken.yaml") == "(this file cannot be read)"


def test_every_shipped_recipe_has_a_line_and_every_config_its_command_on_top():
    for path in catalogue.options("recipe").values():
        assert catalogue.described(path)
    for path in catalogue.shipped().glob("**/*.yaml"):
        first, second, *_ = path.read_text(encoding="utf-8").splitlines()
        assert (second if first.startswith("# @package") else first).startswith("# trainer "), path
