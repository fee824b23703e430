"""Which files are mutated, the tests that must kill their mutants, and the mutants that no test could kill, with why.

A mutant is known by its file, its function and what was changed; a line number would not last.
"""

_STORE = [
    "tests/test_store.py", "tests/faults/test_store_operations.py", "tests/test_disk.py", "tests/test_saving.py",
    "tests/faults/test_store_damage.py", "tests/test_manifest.py", "tests/test_init.py", "tests/test_finished.py",
]  # fmt: skip
_WINDOW = [
    "tests/test_open_window.py", "tests/test_step_state.py", "tests/test_weights.py", "tests/test_skips.py",
    "tests/test_apart.py", "tests/test_objective.py", "tests/test_step.py",
]  # fmt: skip
_STEP = [
    "tests/test_step.py", "tests/test_step_state.py", "tests/test_skips.py", "tests/test_step_on_device.py",
    "tests/test_transforms.py", "tests/test_clipping.py", "tests/test_zeroing.py", "tests/test_apart.py",
    "tests/test_invariants.py", "tests/test_mistakes.py", "tests/test_precision.py", "tests/test_two_paths.py",
    "tests/test_saved.py", "tests/test_weights.py",
]  # fmt: skip
TARGETS = {
    "trainer/data/windows.py": ["tests/test_windows.py"],
    "trainer/checkpoint/disk.py": _STORE,
    "trainer/checkpoint/store.py": _STORE,
    "trainer/gradient/open_window.py": _WINDOW,
    "trainer/step.py": _STEP,
    "trainer/gradient/skips.py": _STEP,
}

# (file, function, what) -> why. The text of a change may be given by its beginning.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("data/windows.py", "windows", "`iterator = iter(micro_batches)` before"): "Neither needs the other.",
    ("checkpoint/disk.py", "write", "`handle = os.open("): "Neither needs the other.",
    ("checkpoint/disk.py", "write", "`for start in range("): "Neither needs the other.",
    ("checkpoint/disk.py", "digest", "`length += len(piece)` before"): "Neither needs the other.",
    ("checkpoint/disk.py", "_together", "`if held and "): "The same bytes in the same order, cut into other calls.",
    ("checkpoint/disk.py", "_together", "turned `len(held) >= _SMALL`"): "The same bytes, cut into other calls.",
    ("checkpoint/disk.py", "", "1 became 2 in `_PIECE"): "Only how many bytes go into one call.",
    ("checkpoint/disk.py", "", "24 became 25"): "Only how many bytes go into one call.",
    ("checkpoint/disk.py", "", "1 became 2 in `_SMALL"): "Only which pieces are joined into one call.",
    ("checkpoint/disk.py", "", "20 became 21"): "Only which pieces are joined into one call.",
    ("checkpoint/disk.py", "", "0 became 1 in `_BINARY"): "1 is O_WRONLY, which is there already.",
    (
        "checkpoint/store.py",
        "write",
        "`if os.path.lexists(path)",
    ): "Without the folder there is no checkpoint.",
    ("checkpoint/store.py", "write", "`disk.begin(pending)` before"): "What was begun is cleared in any case.",
    ("checkpoint/store.py", "load", "`tensors = "): "Neither needs the other; of two damaged files the other is named.",
    ("trainer/step.py", "Step.__call__", "dropped `self._begin(window)`"): "finish() opens the window then.",
    ("trainer/step.py", "Step.__init__", "`self."): "What one needs of the other raises where it is not there yet.",
    ("trainer/step.py", "Step.__init__", "dropped `self._trace = "): "Each window has its own, and none is open yet.",
    ("trainer/step.py", "Step.__call__", "`for micro_batch in"): "Of an empty window nothing is gone through.",
    ("trainer/step.py", "Step._begin", "`self.parameters.refresh()` before"): "A torn step raises all the same.",
    ("trainer/step.py", "Step._step_if", "`report._reason = "): "It is asked later, when both are there.",
    ("trainer/step.py", "Step.gradient", "`if self.reducer"): "It shows only where one rank of several has raised.",
    ("gradient/open_window.py", "OpenWindow.settle", "`self._weighs_nothing = "): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow.held_apart", "dropped `if not"): "Only quicker: the list is empty.",
    (
        "gradient/open_window.py",
        "OpenWindow.held_apart",
        "dropped `return []`",
    ): "Only quicker: the list is empty.",
    ("gradient/open_window.py", "OpenWindow.held_apart", "`return ["): "Only quicker: the list is empty.",
    ("gradient/open_window.py", "OpenWindow.weighs_nothing_on", "`if any("): "Both answer None.",
    ("gradient/open_window.py", "OpenWindow.load_state_dict", "`self.rows = "): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow.load_state_dict", "`self.tokens = "): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow.load_state_dict", "`self.terms = "): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow.load_state_dict", "`self.losses_are_finite = "): "Neither needs the other.",
    (
        "gradient/open_window.py",
        "OpenWindow.leftover",
        "dropped `if len(",
    ): "Only quicker: the loop finds the same one.",
    ("gradient/open_window.py", "OpenWindow.leftover", "dropped `return self.leftover_of"): "Only quicker, as above.",
    ("gradient/open_window.py", "OpenWindow.leftover", "`together = "): "Only quicker, as above.",
    ("gradient/open_window.py", "OpenWindow.apart", "dropped `if not"): "Only quicker: the list is empty.",
    ("gradient/open_window.py", "OpenWindow.apart", "dropped `return []`"): "Only quicker: the list is empty.",
    ("gradient/open_window.py", "OpenWindow.apart", "`held = "): "Only quicker: the list is empty.",
    ("gradient/open_window.py", "OpenWindow.seed", "`weight = self._mean_weight("): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow.seed", "`sums = self.terms.get("): "Neither needs the other.",
    (
        "gradient/open_window.py",
        "OpenWindow.seed",
        "`if type(weight) is float and weight == 0.0: return None` before",
    ): "What is not added then is 0.",
    (
        "gradient/open_window.py",
        "OpenWindow.seed",
        "`if self._settings.reduction == 'micro_batches': factor",
    ): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow.seed", "`value = term.number()` before"): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow.seed", "`sums.values.append("): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow.seed", "`number = factor / "): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow._mean", "`factors = as_floats("): "Neither needs the other.",
    (
        "gradient/open_window.py",
        "OpenWindow._mean_weight",
        "`known = self._weights.get(",
    ): "What was found is not used.",
    ("gradient/open_window.py", "OpenWindow._start", "`means = "): "Neither needs the other.",
    ("gradient/open_window.py", "OpenWindow._start", "`base = "): "Neither needs the other.",
    (
        "gradient/open_window.py",
        "OpenWindow.weighs_nothing_on",
        "`zeros = ",
    ): "What was made is not used: the host knows better.",
    (
        "gradient/open_window.py",
        "OpenWindow.load_state_dict",
        "`if self.opening is not None",
    ): "Neither needs the other.",
}

# Two neighbours of which neither needs the other: the beginning of the second, by file and function.
_NEITHER = {
    ("trainer/step.py", "Step.__call__"): ["`done = "],
    ("trainer/step.py", "Step.accumulate"): [
        "`untouched = ", "`roots, seeds = ([], [])` before", "`apart = ", "`seeds.append(seed)` before",
        "`self._trace.",
    ],
    ("trainer/step.py", "Step._begin"): ["`self._buffers.", "`self._clipping.", "`self._narrow.", "`self._aside = "],
    ("trainer/step.py", "Step._finish"): [
        "`if self.reducer is not None", "`if settings.coefficients",
        "`gradients = self.parameters.gradients()` before `if s", "`by_norm = ", "`sums = ", "`if self._is_watched: ",
    ],
    ("trainer/step.py", "Step._unscale"): ["`apart = ", "`is_one = "],
    ("trainer/step.py", "Step._step"): ["`self._scale.", "`self.clocks.", "`self.skips_in_a_row = "],
    ("trainer/step.py", "Step._step_if"): [
        "`report.", "`self._buffers.", "`put_back(", "`self._scale.", "`self.clocks.", "`self.skips_in_a_row = ",
    ],
    ("trainer/step.py", "Step._skip"): [
        "`put_back(", "`report._lr", "`report._skipped", "`self.clocks.", "`self._scale.", "`self.skips_in_a_row = ",
    ],
    ("trainer/step.py", "Step._release"): [
        "`report._clocks", "`self._buffers.", "`if self.transforms", "`open_.close()` before", "`self._aside = ",
    ],
    ("trainer/step.py", "Step.cancel"): ["`self._buffers.", "`self.transforms."],
}  # fmt: skip
EQUIVALENT |= {(*of, beginning): "Neither needs the other." for of, all_ in _NEITHER.items() for beginning in all_}


def why(file: str, place: str, what: str) -> str | None:
    """Why a mutant lives: the reason given here; None where there is none."""
    for (of, inside, beginning), reason in EQUIVALENT.items():
        if file.endswith(of) and place == inside and what.startswith(beginning):
            return reason
    return None
