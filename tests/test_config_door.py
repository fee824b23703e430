"""The door: whose code a config may call, judged before it is imported, and of which kind, before it is called."""

import sys
import textwrap

import pytest
import torch
from torch.utils.data import Dataset

from trainer.config.door import ROOMS, Door
from trainer.errors import ConfigError

HOSTILE = [
    "os.system", "os.popen", "posix.system", "subprocess.run", "subprocess.Popen", "builtins.eval", "builtins.exec",
    "builtins.open", "builtins.__import__", "pickle.loads", "pickle.load", "marshal.loads", "shelve.open",
    "importlib.import_module", "runpy.run_path", "ctypes.CDLL", "shutil.rmtree", "pathlib.Path.unlink", "code.interact",
    "webbrowser.open", "urllib.request.urlopen", "hydra.utils.instantiate", "hydra.utils.call",
    "omegaconf.OmegaConf.save", "numpy.load", "torch.load", "torch.hub.load", "torch.jit.load", "torch.save",
    "torch.utils.cpp_extension.load",
    "torch.optim.optimizer.torch.load", "torch.nn.modules.module.torch.load", "torch.multiprocessing.spawn",
    "torch.utils.data.dataset.warnings.warn", "torch.nn.functional.relu", "torch.nn.modules.module.functools.partial",
    "torch.distributed.launcher.elastic_launch", "torch.utils.data.graph.io.open", "trainer.cli.main",
    "trainer.verbs.train", "trainer.config.door.importlib.import_module", "trainer.recipes.xor.sys.exit",
    "trainer.recipes.xor.torch.load", "trainer.optim.builders.torch.load",
    "trainer.recipes.digits.Split.__init__.__globals__",
    "trainer.optim.update.torch.hub.load", "trainer.loop.Trainer", "trainer.errors.difflib.SequenceMatcher",
]  # fmt: skip
PLACES = ["model", "objective", "optimizer", "schedule", "source", "argument", "other"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_targets_are_refused_in_every_place(name, tmp_path):
    for place in PLACES:
        with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
            Door(folders=[tmp_path]).make({"_target_": name, "_args_": ["touch canary"]}, place, place)
        assert caught.value.exit_code == 2 and place in str(caught.value)


def test_a_refusal_says_the_words_that_would_allow_it():
    for name, trust in (
        ("json.JSONEncoder", ["json"]),
        ("torch.get_num_threads", ["torch"]),
        ("os.getcwd", ["os", "posix"]),
    ):
        for number, package in enumerate(trust):
            with pytest.raises(ConfigError) as caught:
                Door(trust=trust[:number]).make({"_target_": name}, "model", "model")
            assert f"trust=[{','.join(trust[: number + 1])}]" in str(caught.value), package
        assert Door(trust=trust).make({"_target_": name}, "model", "model")


def test_naming_a_module_does_not_import_it(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="trust=\\[hostile\\]"):
        Door().make({"_target_": "hostile.Net"}, "model", "model")
    with pytest.raises(ConfigError, match="is refused"):
        Door().make({"_target_": "torch.nn.Linear", "in_features": {"_target_": "hostile.Net"}}, "model", "model")
    assert "hostile" not in sys.modules


@pytest.mark.parametrize(
    ("place", "name", "keywords", "first", "kind"),
    [
        ("model", "torch.nn.Linear", {"in_features": 2, "out_features": 1}, (), torch.nn.Linear),
        ("objective", "torch.nn.CrossEntropyLoss", {"label_smoothing": 0.1}, (), torch.nn.CrossEntropyLoss),
        (
            "optimizer",
            "torch.optim.RMSprop",
            {"lr": 0.1},
            ([torch.nn.Parameter(torch.ones(1))],),
            torch.optim.Optimizer,
        ),
        ("source", "torch.utils.data.TensorDataset", {}, (torch.ones(2),), Dataset),
    ],
)
def test_of_torch_each_place_takes_its_kind_and_no_other(place, name, keywords, first, kind):
    node = {"_target_": name, **keywords}
    assert isinstance(Door().make(node, place, place, *first), kind)
    for other in ("model", "optimizer", "source"):
        if other != place and (other, place) != ("model", "objective"):
            with pytest.raises(ConfigError, match="of torch, this place takes"):
                Door().make(node, other, other, *first)


def test_a_loss_function_becomes_the_function_with_its_arguments():
    loss = Door().make(
        {"_target_": "torch.nn.functional.cross_entropy", "label_smoothing": 0.1}, "objective", "objective"
    )
    assert loss.func is torch.nn.functional.cross_entropy and loss.keywords == {"label_smoothing": 0.1}
    plain = Door().make({"_target_": "torch.nn.functional.mse_loss"}, "objective", "objective")
    assert plain is torch.nn.functional.mse_loss


def test_nodes_in_arguments_are_made_and_judged():
    node = {
        "_target_": "torch.nn.Sequential",
        "_args_": [{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}],
    }
    assert isinstance(Door().make(node, "model", "model")[0], torch.nn.Linear)
    for nested in ({"x": [{"deep": {"_target_": "os.system"}}]}, {"_args_": [[{"_target_": "os.system"}]]}):
        with pytest.raises(ConfigError, match=r"_target_=os\.system is refused"):
            Door().judge({"_target_": "torch.nn.Sequential", **nested}, "model", "model")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A recipe's folder with code of the user's own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "door_model.py").write_text(
        textwrap.dedent(
            """
            import os, functools
            from os import system
            from torch.nn import Linear
            import torch.nn.functional as F

            class Net:
                def __init__(self, width: int = 3):
                    self.width = width
                    if width == 13:
                        raise TypeError("an error of the user's own")

                @classmethod
                def wide(cls):
                    return cls(100)

            smooth = functools.partial(F.cross_entropy, label_smoothing=0.1)
            shell = functools.partial(system, "touch canary")
            number = 3
            """
        )
    )
    (tmp_path / "door_broken.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "os.py").write_text("raise SystemExit")
    yield Door(folders=[tmp_path])
    sys.modules.pop("door_model", None)


def test_code_beside_the_recipe_is_trusted(own):
    assert own.make({"_target_": "door_model.Net", "width": 5}, "model", "model").width == 5
    assert own.make({"_target_": "door_model.Net.wide"}, "model", "model").width == 100
    assert own.make({"_target_": "door_model.Net", "_partial_": True}, "model", "model")().width == 3
    assert isinstance(own.make({"_target_": "door_model.Linear", "_args_": [1, 2]}, "model", "model"), torch.nn.Linear)
    assert own.find("door_model.smooth", "objective", "objective").keywords == {"label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("door_model.os.system", "door_model has no 'os'"),
        ("door_model.system", "is refused, as it comes from (posix|nt)"),
        ("door_model.shell", "is refused, as it comes from (posix|nt)"),
        ("os.system", "would run code of the package 'os'"),
    ],
)
def test_what_that_code_imported_itself_is_not(own, name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        own.make({"_target_": name, "_args_": ["touch canary"]}, "model", "model")


def test_a_module_of_the_same_name_from_elsewhere_is_not_taken_for_the_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "pytest.py").write_text("")
    with pytest.raises(ConfigError, match="imported already from elsewhere"):
        Door(folders=[tmp_path]).make({"_target_": "pytest.raises"}, "model", "model")


def test_wrong_names_and_arguments_are_sentences_and_the_users_errors_are_his(own):
    for node, sentence in (
        ({"_target_": "door_model.Nett"}, "door_model has no 'Nett': did you mean 'Net'?"),
        ({"_target_": "door_model.number"}, "door_model.number is int, which cannot be called"),
        (
            {"_target_": "door_model.Net", "widht": 3},
            "there is no 'model.widht': of what door_model.Net takes, did you mean 'width'?",
        ),
        ({"_target_": "door_model.Net", "width": "x"}, "model.width='x' is not possible: door_model.Net wants int."),
        ({"_target_": "door_model.Net", "_convert_": "all"}, "model._convert_ is not supported"),
        ({"_target_": "door_model.Net", "_partial_": 3}, "model._partial_=3 is not possible"),
        ({"_target_": "door_model.Net", "_args_": 3}, "model._args_=3 is not possible"),
        ({"_target_": "Net"}, "model._target_='Net' is not a name"),
        ({"_target_": "door_model.Net; import os"}, "is not a name"),
        ({"_target_": "trainer.optim.adam"}, "trainer.optim has no 'adam': did you mean 'adamw'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            own.make(node, "model", "model")
        assert sentence in str(caught.value)
    with pytest.raises(TypeError, match="an error of the user's own"):
        own.make({"_target_": "door_model.Net", "width": 13}, "model", "model")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        own.make({"_target_": "door_broken.Net"}, "model", "model")
    with pytest.raises(ConfigError, match="there is no package 'not_installed'"):
        Door(trust=["not_installed"]).make({"_target_": "not_installed.Net"}, "model", "model")


def test_what_our_own_and_torchs_builders_refuse_is_a_sentence():
    parameters = [torch.nn.Parameter(torch.ones(1))]
    for name in ("trainer.optim.adamw", "torch.optim.SGD"):
        with pytest.raises(ConfigError, match="optimizer: .*Invalid learning rate: -1"):
            Door().make({"_target_": name, "lr": -1.0}, "optimizer", "optimizer", parameters)


def test_the_rooms_of_trainer_are_those_that_hold_nothing_to_be_told_whom_to_trust():
    assert "trainer" not in ROOMS and not any(room.startswith(("trainer.config", "trainer.cli")) for room in ROOMS)
