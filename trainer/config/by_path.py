"""The verbs that are given a path in place of a config: they look into what a run has written."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from trainer.config.door import Door, folders_of
from trainer.config.traceback import print_users
from trainer.errors import CheckpointError, ConfigError, TrainerError

DIFFERENT = 1
USERS_OWN = 1


def state(words: list[str], as_json: bool) -> int:
    """Look into one checkpoint, or compare two: 0 whole or equal, 1 they differ, 5 something is damaged."""
    if len(words) not in (1, 2):
        raise ConfigError("state looks into one checkpoint or compares two: give it one path or two.")
    from trainer.checkpoint import compare, look

    if len(words) == 2:
        found = compare.compare(Path(words[0]), Path(words[1]))
        apart = found.difference
        if as_json:
            print(json.dumps({"equal": apart is None, "difference": apart and dataclasses.asdict(apart)}))
        else:
            print(f"{found.what}: {apart}" if apart else f"{found.what}: equal, bit for bit")
        return 0 if apart is None else DIFFERENT
    seen = look.look(Path(words[0]))
    print(json.dumps(seen.values) if as_json else "\n".join(seen.lines), end="\n" if as_json or seen.lines else "")
    for sentence in seen.errors:
        print(sentence, file=sys.stderr)
    return CheckpointError.exit_code if seen.errors else 0


def replay(options: Any) -> int:
    """Run a captured window again: 0 where all of it is finite, 4 where something is not."""
    path, *overrides = options.overrides
    if options.cfg or options.multirun or options.config_name or options.info:
        raise ConfigError(f"replay {path} takes key=value, --config-dir and --json beside the path, and no other flag.")
    from trainer.config import again
    from trainer.diagnose import capture

    caught = capture.load(Path(path))
    config = again.config_of(caught.config, overrides, caught.path or Path(path))
    door = Door(config.words.trust, folders_of(options.config_dir))
    from trainer import verbs

    try:
        return verbs.again(caught, config, door, options.json)
    except (TrainerError, BrokenPipeError):
        raise
    except Exception as error:
        print_users(error)
        return USERS_OWN
