"""Which files are mutated, the tests that must kill their mutants, and the mutants that no test could kill, with why.

A mutant is known by its file, its function and what was changed; a line number would not last.
"""

_STORE = [
    "tests/test_store.py", "tests/faults/test_store_operations.py", "tests/test_disk.py", "tests/test_saving.py",
    "tests/faults/test_store_damage.py", "tests/test_manifest.py", "tests/test_init.py", "tests/test_finished.py",
]  # fmt: skip
_WINDOW = [
    "tests/test_open_window.py", "tests/test_step.py", "tests/test_step_state.py", "tests/test_weights.py",
    "tests/test_skips.py", "tests/test_apart.py", "tests/test_objective.py", "tests/test_two_paths.py",
]  # fmt: skip
_STEP = [
    "tests/test_step.py", "tests/test_step_state.py", "tests/test_skips.py", "tests/test_step_on_device.py",
    "tests/test_transforms.py", "tests/test_clipping.py", "tests/test_zeroing.py", "tests/test_apart.py",
    "tests/test_invariants.py", "tests/test_mistakes.py", "tests/test_precision.py", "tests/test_two_paths.py",
    "tests/test_saved.py", "tests/test_weights.py",
]  # fmt: skip
TARGETS = {
    "trainer/step.py": _STEP,
    "trainer/gradient/open_window.py": _WINDOW,
    "trainer/gradient/skips.py": _STEP,
    "trainer/data/windows.py": ["tests/test_windows.py"],
    "trainer/checkpoint/store.py": _STORE,
    "trainer/checkpoint/disk.py": _STORE,
}

# (file, function, what) -> why. The text of a change may be given by its beginning.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("data/windows.py", "windows", "`iterator = iter(micro_batches)` before"): "Neither needs the other.",
}


def why(file: str, place: str, what: str) -> str | None:
    """Why a mutant lives: the reason given here; None where there is none."""
    for (of, inside, beginning), reason in EQUIVALENT.items():
        if file.endswith(of) and place == inside and what.startswith(beginning):
            return reason
    return None
