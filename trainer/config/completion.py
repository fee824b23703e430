"""Tab completion: the scripts of three shells, and the words that may come next. Hydra is imported only for keys."""

import argparse
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config import catalogue, help, schema
from trainer.errors import ConfigError, TrainerError
from trainer.settings import Settings, fields_of, section_of

Word = tuple[str, str]
"""A whole word, and a line about it. One that ends in = . or / is not at its end yet."""

_BASH = r"""# eval "$(trainer --completion bash)", or put that line into ~/.bashrc
_trainer() {
    local line=${COMP_LINE:0:COMP_POINT} choice kept="" IFS=$' \t\n'
    local -a words
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local last=${words[${#words[@]}-1]}
    # Readline replaces what follows the last = or : of a word, if it breaks words there.
    [[ $last == *=* && $COMP_WORDBREAKS == *=* ]] && kept=${last%=*}=
    [[ $last == *:* && $COMP_WORDBREAKS == *:* && ${#last} -gt ${#kept} ]] && kept=${last%:*}:
    COMPREPLY=()
    while IFS= read -r choice; do
        choice=${choice%%$'\t'*}
        [[ $choice == *[=./] ]] || choice+=" "
        COMPREPLY+=("${choice#"$kept"}")
    done < <("${words[0]/#\~/$HOME}" --complete "${words[@]:1}" 2>/dev/null)
}
complete -o default -o nospace -F _trainer trainer
"""

_ZSH = r"""#compdef trainer
# eval "$(trainer --completion zsh)" after compinit, or this text as a file _trainer in a folder of $fpath
_trainer() {
    local -a before lines open opened whole told
    local line word
    before=("${(@Q)words[2,CURRENT-1]}")
    lines=("${(@f)$("${(e)words[1]}" --complete "${before[@]}" "${(Q)PREFIX}" 2>/dev/null)}")
    for line in $lines; do
        word=${line%%$'\t'*}
        if [[ $word == *[=./] ]]; then
            open+=("$word") opened+=("${line/$'\t'/  -- }")
        else
            whole+=("$word") told+=("${line/$'\t'/  -- }")
        fi
    done
    if (( $#open + $#whole )); then
        (( $#open )) && compadd -Q -l -S '' -d opened -a open
        (( $#whole )) && compadd -Q -l -d told -a whole
        return 0
    fi
    compset -P '*='
    _files
}
compdef _trainer trainer
"""

_FISH = r"""# trainer --completion fish | source, or put that line into ~/.config/fish/config.fish
function __trainer_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l command $words[1]
    set -e words[1]
    set -l choices ($command --complete $words "$current" 2>/dev/null)
    if test (count $choices) -gt 0
        printf '%s\n' $choices
    else
        set -l key (string match -r '^[^=]*=' -- $current)
        for path in (__fish_complete_path (string replace -r '^[^=]*=' '' -- $current))
            printf '%s%s\n' "$key" $path
        end
    end
end
complete -c trainer -f -a '(__trainer_complete)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_FILES = ("--config-dir", "-cd")
_TAKE_ONE = (*_FILES, "--config-name", "-cn", "--package", "-p")
_CHOICES = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all")}
_FIRST = (
    *help.VERBS.items(),
    ("--help", "verbs, recipes and settings"),
    ("--version", "the version"),
    ("--completion", "the script of tab completion for a shell"),
)


def script(shell: str) -> str:
    """What the shell is to read. Raises ConfigError for a shell that there is none for."""
    if shell not in SCRIPTS:
        raise ConfigError(f"--completion {shell}: choose one of: {', '.join(SCRIPTS)}.")
    return SCRIPTS[shell]


def lines(words: Sequence[str]) -> list[str]:
    """One line for each word that may stand in place of the last of `words`: the word, a tab, and what it is.

    None where only the user knows, or where it is the name of a file: the shell then offers files.
    """
    *before, current = words or [""]
    found = _candidates(before, current)
    return [f"{word}\t{said}".rstrip() for word, said in found if word.startswith(current)]


def _candidates(before: Sequence[str], current: str) -> list[Word]:
    if not before:
        return list(_FIRST)
    verb, last = before[0], before[-1]
    if verb == "--completion":
        return [(shell, "") for shell in SCRIPTS]
    if verb not in help.VERBS or last in _FILES:
        return []
    if last in _CHOICES:
        return [(choice, "") for choice in _CHOICES[last]]
    if last in _TAKE_ONE[2:]:
        return []
    if current.startswith("-"):
        return [(flag, str(action.help)) for action in help.parser(verb)._actions for flag in action.option_strings]
    if verb in ("recipes", "state"):
        return []
    caught = _caught(before, current) if verb == "replay" else []
    folder, overrides = _read(before[1:])
    key, equals, _ = current.partition("=")
    if equals:
        return [(f"{key}={value}", said) for value, said in _values(key, overrides, folder)]
    return [*caught, *(() if caught and current else _keys(key, overrides, folder))]


def _caught(before: Sequence[str], current: str) -> list[Word]:
    """The windows that the runs below here have caught: the first word of `replay`, where it is no setting."""
    if len(before) > 1 or "=" in current:
        return []
    found = sorted(Path("outputs").glob("*/*/captured/window-*"))
    return [(path.as_posix(), "a captured window") for path in found if path.as_posix().startswith(current)]


def _read(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder of --config-dir, and the overrides, out of words that may be wrong or not whole."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    for flag in _TAKE_ONE[2:]:
        parser.add_argument(flag, dest="other")
    try:
        options, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        return None, []
    folder = options.config_dir if options.config_dir and options.config_dir.is_dir() else None
    return folder, [word for word in rest if "=" in word and not word.startswith("-")]


def _values(key: str, overrides: Sequence[str], folder: Path | None) -> list[Word]:
    """The values that a group or a setting may have, where they can be listed."""
    plain = key.lstrip("+")
    if plain == "recipe":
        return help.recipe_lines(folder)
    if options := catalogue.options(plain, folder):
        return [(name, "") for name in options]
    if plain in ("init", "resume"):
        return []
    if plain == "run":
        recipe = next((word.partition("=")[2] for word in overrides if word.startswith("recipe=")), "run")
        runs = (path for path in (Path("outputs") / recipe).glob("*/") if not path.name.startswith("sweep-"))
        return [(path.name, "") for path in sorted(runs)]
    settings: Any = Settings
    *sections, name = plain.split(".")
    for section in sections:
        if settings is None or section not in fields_of(settings):
            return []
        settings = section_of(settings, section)
    fields = {**(fields_of(schema.Words) if not sections else {}), **(fields_of(settings) if settings else {})}
    return [(value, "") for value in _listed(fields[name].annotation)] if name in fields else []


def _listed(hint: Any) -> list[str]:
    parts = [hint, *typing.get_args(hint)]
    words = [str(inner) for part in parts for inner in typing.get_args(part) if isinstance(inner, str)]
    words += [part for part in parts if isinstance(part, str)]
    if bool in parts:
        words += ["true", "false"]
    if type(None) in parts:
        words.append("null")
    return list(dict.fromkeys(words))


def _keys(start: str, overrides: Sequence[str], folder: Path | None) -> Iterator[Word]:
    """The groups and the keys, one level at a time: `gradient.` first, and what is in it behind the dot."""
    prefix = start[: len(start) - len(start.lstrip("+~"))]
    *sections, _ = start.lstrip("+~").split(".")
    tree: Any = _composed(overrides, folder)
    for section in sections:
        tree = tree.get(section) if isinstance(tree, Mapping) else None
    where = prefix + "".join(f"{section}." for section in sections)
    groups = [name for name in catalogue.groups(folder) if name != "local"] if not sections else []
    for name in groups:
        yield f"{prefix}{name}=", "a group of values"
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping) and value:
            yield f"{where}{name}.", "settings"
        elif name not in groups and not (not sections and name == "description"):
            yield f"{where}{name}=", f"now {value!r}"[:60] if value is not None else ""


def _composed(overrides: Sequence[str], folder: Path | None) -> Mapping[str, Any]:
    """The config as far as it can be made; where the words make none, that of the recipe, or the bare settings."""
    from omegaconf import OmegaConf

    from trainer.config import hydra_app

    with hydra_app.opened(folder) as (_, loader):
        for words in (list(overrides), [word for word in overrides if word.startswith("recipe=")], []):
            try:
                config = hydra_app.compose(loader, "train", words)
            except TrainerError:
                continue
            plain = OmegaConf.to_container(config)
            return {str(key): value for key, value in dict(plain).items() if key != "hydra"}  # type: ignore[arg-type]
    return {}
