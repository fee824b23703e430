"""What --help and `trainer recipes` say, made from the settings and the config files alone."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any, NoReturn

from trainer.config import catalogue, schema
from trainer.errors import ConfigError, did_you_mean
from trainer.settings import Settings, fields_of, section_of

VERBS = {
    "train": "train a recipe",
    "eval": "evaluate a checkpoint (init=PATH or run=NAME) or a fresh model",
    "check": "certify the gradient of one window before a run: what breaks it is named (exit code 6)",
    "graph": "draw the autograd graph of one forward: modules, shapes, bytes kept for backward, cuts",
    "rows": "list the training rows with the largest gradients, where wrong labels gather (run=NAME or init=PATH)",
    "replay": "run a captured window again (replay PATH), or the next one: what made a number not finite (exit code 4)",
    "state": "look into a checkpoint and verify it (state PATH), or compare two bit for bit (state A B)",
    "recipes": "list the recipes with a line each",
}

FLAGS = {
    "check": ("json", "gradcheck", "meant"),
    "replay": ("json",),
    "graph": ("out", "all"),
    "rows": ("most", "json"),
}
"""The words of a verb's own, beside those of Hydra."""

_WORDS = {"state": "PATH [PATH]", "replay": "[PATH] [overrides]"}

_EXAMPLES = {
    "train": (
        "trainer train recipe=digits",
        "trainer train recipe=digits data.batch_size=16 gradient.accumulation_steps=4 gradient.clip_norm=1.0",
        "trainer train recipe=digits optimizer=sgd optimizer.lr=0.1 run=mine     # again: goes on",
        "trainer train recipe=digits -m optimizer.lr=1e-3,1e-2 seed=0,1          # a sweep of four",
        "trainer train recipe=mine --config-dir .                                # ./recipe/mine.yaml and its .py",
        "trainer train recipe=digits --cfg job                                   # only shows the config",
    ),
    "eval": ("trainer eval recipe=digits run=mine", "trainer eval recipe=digits init=model.safetensors"),
    "check": (
        "trainer check recipe=digits",
        "trainer check recipe=conv gradient.accumulation_steps=4",
        "trainer check recipe=digits --gradcheck 2",
        "trainer check recipe=digits activation_checkpointing=segments precision=bf16 --json",
    ),
    "graph": (
        "trainer graph recipe=xor_mlp                                            # into outputs/xor_mlp/graph/",
        "trainer graph recipe=char_lm --out char_lm.dot",
    ),
    "rows": ("trainer rows recipe=digits run=mine", "trainer rows recipe=digits init=model.safetensors --most 50"),
    "replay": (
        "trainer replay outputs/digits/mine/captured/window-000018               # one that a run has kept",
        "trainer replay outputs/digits/mine                                      # the first that it has kept",
        "trainer replay outputs/digits/mine precision=fp32                       # would it be finite so?",
        "trainer replay recipe=digits optimizer.lr=1e3                           # the run's first window",
    ),
    "state": (
        "trainer state outputs/digits/mine                                       # all checkpoints of a run",
        "trainer state outputs/digits/mine/best                                  # one: its clocks, sizes, every byte",
        "trainer state outputs/digits/mine outputs/digits/other                  # where they part; 0: nowhere",
    ),
    "recipes": ("trainer recipes", "trainer recipes --config-dir ."),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        unknown, _, rest = message.partition(": ")
        if unknown == "unrecognized arguments":
            raise ConfigError(f"there is no flag '{rest.split()[0]}': {did_you_mean(rest.split()[0], flags)}")
        raise ConfigError(f"{message}.")


def parser(verb: str | None) -> Parser:
    """The flags of Hydra's command line, in our words: Hydra's own parser cannot be built on Python 3.14."""
    made = Parser(prog=f"trainer {verb}" if verb else "trainer", add_help=False, allow_abbrev=False)
    made.add_argument("overrides", nargs="*", help="key=value, +key=value, ~key or group=option")
    made.add_argument("--help", "-h", action="store_true", help="this text")
    if verb == "state":
        made.set_defaults(config_dir=None)
        made.add_argument("--json", action="store_true", help="for machines: one JSON object in place of the lines")
        return made
    made.add_argument(
        "--config-dir", "-cd", type=Path, metavar="DIR", help="a folder with recipes and groups of your own"
    )
    if verb == "recipes":
        return made
    if verb in ("check", "replay"):
        what = "the certificate" if verb == "check" else "what was found"
        made.add_argument("--json", action="store_true", help=f"{what} for machines, in one line")
    if verb == "check":
        made.add_argument(
            "--gradcheck",
            action="append",
            metavar="MODULE",
            help="also hold this module against difference quotients, as custom Functions are (may be repeated)",
        )
        made.add_argument(
            "--meant",
            action="append",
            metavar="FUNCTION",
            help="a custom Function whose backward is another than the derivative on purpose (may be repeated)",
        )
    if verb == "rows":
        made.add_argument("--most", type=int, default=20, metavar="N", help="so many rows (20)")
        made.add_argument("--json", action="store_true", help="for machines, in one line")
    if verb == "graph":
        made.add_argument("--out", type=Path, metavar="PATH", help="where to draw it: a name that ends in .svg or .dot")
        made.add_argument("--all", action="store_true", help="every node of the graph, and each repeat of a module")
    made.add_argument("--config-name", "-cn", metavar="NAME", help="another root config than train.yaml")
    made.add_argument("--multirun", "-m", action="store_true", help="run each combination of key=a,b key=c,d")
    made.add_argument("--cfg", "-c", choices=["job", "hydra", "all"], help="show the config and stop")
    made.add_argument("--resolve", action="store_true", help="with --cfg: interpolations replaced by their values")
    made.add_argument("--package", "-p", metavar="KEY", help="with --cfg: this part only")
    made.add_argument(
        "--info",
        "-i",
        nargs="?",
        const="all",
        choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"],
        help="show what Hydra makes of the command",
    )
    made.add_argument("--run", "-r", action="store_true", help="run one job (this is what happens without a flag)")
    made.add_argument(
        "--shell-completion",
        "-sc",
        action="store_true",
        help="Hydra's own tab completion (trainer's is in trainer --help)",
    )
    made.add_argument("--hydra-help", action="store_true", help="what Hydra says of itself")
    return made


def overview() -> str:
    """`trainer --help`."""
    return "\n".join(
        (
            "usage: trainer VERB [overrides]      flags and examples: trainer VERB --help",
            'tab completion: eval "$(trainer --completion bash)" (or zsh; fish: trainer --completion fish | source)',
            "",
            *_section("verbs", VERBS.items()),
            *_section("recipes (recipe=NAME)", recipe_lines(None)),
            *_keys(None),
        )
    )


def about(verb: str, config_dir: Path | None) -> str:
    """`trainer VERB --help`."""
    flags = [
        (", ".join(action.option_strings) + (f" {action.metavar}" if action.metavar else ""), str(action.help))
        for action in parser(verb)._actions
        if action.option_strings
    ]
    text = [
        f"trainer {verb}: {VERBS[verb]}",
        "",
        f"usage: trainer {verb} {_WORDS.get(verb, '[overrides]')} [flags]",
        *(f"  {example}" for example in _EXAMPLES[verb]),
        "",
        *_section("flags", flags),
    ]
    if verb not in ("recipes", "state"):
        text += [*_section("recipes (recipe=NAME)", recipe_lines(config_dir)), *_keys(config_dir)]
    return "\n".join(text)


def recipe_lines(config_dir: Path | None) -> list[tuple[str, str]]:
    """Each recipe with its description."""
    return [(name, catalogue.described(path)) for name, path in sorted(catalogue.options("recipe", config_dir).items())]


def table(rows: list[tuple[str, str]]) -> list[str]:
    """Two columns; the second begins where the longest of the first ends, at most at column 44."""
    width = min(42, max((len(name) for name, _ in rows), default=0))
    return [f"  {name:<{width}}  {line}".rstrip() for name, line in rows]


def _section(title: str, rows: Any) -> list[str]:
    return [f"{title}:", *table(list(rows)), ""]


def _keys(config_dir: Path | None) -> list[str]:
    groups = [
        (f"{name}=", " | ".join(sorted(catalogue.options(name, config_dir))))
        for name in catalogue.groups(config_dir)
        if name not in ("recipe", "local")
    ]
    nodes = [*schema.NODES.items(), ("optimizer.groups", schema.GROUPS), ("data.source", schema.SOURCE)]
    nodes += [("gradient_transforms", schema.TRANSFORMS), ("loggers.others", schema.OTHERS)]
    return [
        *_section("groups (whole sets of values)", groups),
        *_section("what is built (a _target_ and its arguments)", nodes),
        *_section("settings (name=default)", [*_settings(schema.Words, ""), *_settings(Settings, "")]),
    ]


def _settings(settings: type, where: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    values = dataclasses.asdict(settings())
    for name, field in fields_of(settings).items():
        section = section_of(settings, name)
        if section is not None:
            rows += _settings(section, f"{name}.")
        elif not (settings is schema.Words and name in ("recipe", "description")):
            options = [str(option) for option in typing.get_args(field.annotation) if isinstance(option, str)]
            listed = f" [{', '.join(options)}]" if options and not any(o in field.description for o in options) else ""
            rows.append((f"{where}{name}={_shown(values[name])}", f"{field.description}{listed}"))
    return rows


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
