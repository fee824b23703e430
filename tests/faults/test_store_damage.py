"""A checkpoint damaged anywhere: one class of error that names the file, and the newest whole one is found instead."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tally import Tally, scratch, times
from test_store_operations import state, value_of

from trainer import CheckpointError
from trainer.checkpoint import manifest, store
from trainer.checkpoint.saving import Saving
from trainer.settings import CheckpointSettings

Files = dict[str, bytes]
EDITS = [(b"1", b"2"), (b"{", b"[", 1), (b'":', b'" :'), (b'"', b"'", 1), (b"3", b"NaN", 1), (b"}", b"", 1)]


def flipped(name: str, at: int, files: Files, rng: random.Random) -> None:
    content = bytearray(files[name])
    content[at] ^= 1 << rng.randrange(8)
    files[name] = bytes(content)


def truncated(name: str, at: int, files: Files, rng: random.Random) -> None:
    files[name] = files[name][:at]


def zeroed(name: str, at: int, files: Files, rng: random.Random) -> None:
    start = at // 512 * 512
    files[name] = files[name][:start] + bytes(len(files[name][start : start + 512])) + files[name][start + 512 :]


def appended(name: str, at: int, files: Files, rng: random.Random) -> None:
    files[name] += rng.randbytes(1 + at % 100)


def missing(name: str, at: int, files: Files, rng: random.Random) -> None:
    del files[name]


def of_another(name: str, at: int, files: Files, rng: random.Random) -> None:
    """The same file of an older checkpoint of the same run: whole, and wrong."""
    files[name] = files[f"older {name}"]


def changed_places(name: str, at: int, files: Files, rng: random.Random) -> None:
    other = rng.choice([one for one in files if one != name and not one.startswith("older ")])
    files[name], files[other] = files[other], files[name]


def bad_json(name: str, at: int, files: Files, rng: random.Random) -> None:
    """A number, a key or a bracket of the manifest or of state.json changed by an editor."""
    name = rng.choice([manifest.NAME, manifest.STATE])
    change = rng.choice(EDITS)
    files[name] = files[name].replace(*change)


KINDS: dict[Callable[..., None], int] = {
    flipped: 8, truncated: 3, zeroed: 4, appended: 1, missing: 1, of_another: 3, changed_places: 2, bad_json: 3,
}  # fmt: skip
"""Each kind of damage, and how often of the sum of these."""


def trials(count: int, seed: int) -> Tally:
    """Damage the newest of three checkpoints at a byte drawn from all of its bytes, the manifest's included."""
    tally, rng = Tally(), random.Random(seed)
    with scratch() as run:
        saving = Saving(run, CheckpointSettings(background=False, keep_last=None))
        for value in (1, 2, 3):
            saving.save(state(value), {"steps": value, "micro_batches": value})
        older, newest = (run / "checkpoints" / f"step-00000{value}" for value in (2, 3))
        whole = {path.name: path.read_bytes() for path in newest.iterdir()}
        before = {f"older {path.name}": path.read_bytes() for path in older.iterdir()}
        tally.sizes.update({name: len(content) for name, content in whole.items()})
        while tally.trials < count:
            (kind,) = rng.choices(list(KINDS), weights=list(KINDS.values()))
            name, at = drawn(rng, tally.sizes)
            files = {**whole, **before}
            kind(name, at, files, rng)
            files = {one: content for one, content in files.items() if not one.startswith("older ")}
            if files == whole:
                continue  # a page of zeros was zeroed, or both files are the same
            put(newest, files)
            if kind is not bad_json:  # that one chooses its file
                tally.instants[name] += 1
            told = f"{kind.__name__} in {name} at {at}"
            tally.note(*outcome(run, newest, older, {one for one in whole if files.get(one) != whole[one]}, told))
            put(newest, whole)
    return tally


def drawn(rng: random.Random, sizes: Counter[str]) -> tuple[str, int]:
    """A byte, each of all files as likely as another: its file and its place in it."""
    at = rng.randrange(sizes.total())
    for name, size in sizes.items():
        if at < size:
            return name, at
        at -= size
    raise AssertionError


def put(folder: Path, files: Files) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def files_of(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def outcome(run: Path, newest: Path, older: Path, changed: set[str], told: str) -> tuple[str, str | None]:
    try:
        store.load(newest)
    except CheckpointError as error:
        # A whole manifest of another checkpoint is no wrong file by itself: then it is one that it speaks of.
        named = set(files_of(newest)) if manifest.NAME in changed else changed
        if not any(f"{newest / name} " in str(error) for name in named) and "has no manifest.json" not in str(error):
            return "refused", f"{told}: the file is not named: {error}"
    except BaseException as error:
        return "another error", f"{told}: {type(error).__name__}: {error}"
    else:
        return "loaded silently", f"{told}: loaded"
    path, loaded, damaged = store.newest(run)
    if path != older or value_of(loaded) != 2 or len(damaged) != 1:
        return "no fallback", f"{told}: {path}, {damaged}"
    return "refused, the older one loaded", None


def test_damage_anywhere_is_refused_by_name_and_the_older_checkpoint_is_loaded() -> None:
    tally = trials(times(270), seed=1)
    assert not tally.broken, str(tally)
    assert set(tally.outcomes) == {"refused, the older one loaded"}
    # Uniform over all bytes, the manifest's included: each file is struck about as often as it is large.
    struck = tally.instants.total()
    for name, size in tally.sizes.items():
        expected = struck * size / tally.sizes.total()
        assert abs(tally.instants[name] - expected) < 4 * expected**0.5 + 4, (name, tally.instants, tally.sizes)


def test_without_the_hash_damage_is_loaded_silently(monkeypatch) -> None:
    monkeypatch.setattr(manifest, "_is_right", lambda found, written: True)
    tally = trials(times(60), seed=1)
    assert tally.outcomes["loaded silently"], str(tally)


def test_a_file_that_cannot_be_read_is_an_error_of_the_same_class(monkeypatch) -> None:
    with scratch() as run:
        Saving(run, CheckpointSettings(background=False)).save({"model": {"w": torch.ones(3)}}, {"steps": 1})
        path = run / "checkpoints" / "step-000001"
        read = manifest._Read.read

        class Broken:
            def __init__(self, file) -> None:
                self._file = file

            def fileno(self) -> int:
                return self._file.fileno()

            def close(self) -> None:
                self._file.close()

            def read(self, count: int) -> bytes:
                raise OSError(5, "Input/output error")

        def bad_sector(self, count: int) -> bytes:
            if self._path.name == "model.safetensors":
                self._file = Broken(self._file)
            return read(self, count)

        monkeypatch.setattr(manifest._Read, "read", bad_sector)
        try:
            store.load(path)
        except CheckpointError as error:
            assert str(error) == f"{path / 'model.safetensors'} cannot be read (Input/output error)."
        else:
            raise AssertionError("it was loaded")
