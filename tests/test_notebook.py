"""A real notebook, run by a real kernel. Needs pip install nbclient ipykernel, and is skipped without."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
import nbformat  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("default")]  # the notebook's own libraries have many

PREPARE = """
import signal, time
import torch
from trainer import Sum, Trainer, supervised
torch.set_num_threads(1)
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
x = torch.linspace(-1, 1, 64).reshape(64, 1)
model = torch.nn.Linear(1, 1)
def error(model, micro_batch):
    return {"error": Sum((model(micro_batch[0]) - micro_batch[1]).abs().sum(), len(micro_batch[0]))}
def trainer(objective, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    return Trainer(model, objective, optimizer, data=(x, 2 * x), evaluation_data=(x, 2 * x), metrics=error,
                   batch_size=16, **settings)
generator = torch.get_rng_state()
"""
SLOW = """
pause = 0.02
def slow(model, micro_batch):
    time.sleep(pause)
    return torch.nn.functional.mse_loss(model(micro_batch[0]), micro_batch[1])
going = trainer(slow, steps=2000, evaluate_every=None)
going.fit()
"""
LOOK = """
print(going.step.clocks.steps)
"""
GO_ON = """
pause = 0
print("went on:", going.fit().reason)
print(handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The outputs of the cells: a run, one that the kernel's interrupt ends, a look, and the same run going on."""
    folder = tmp_path_factory.mktemp("notebook")
    run = "trainer(supervised(torch.nn.MSELoss()), epochs=40).fit()"
    texts = [PREPARE, run, "print(bool((torch.get_rng_state() == generator).all()))", SLOW, LOOK, GO_ON]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
    client = nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(folder)}}
    )
    slow = notebook.cells[texts.index(SLOW)]

    def interrupt() -> None:
        end = time.monotonic() + 60
        while "windows [" not in _text(slow) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)
        asyncio.run(client.km._async_interrupt_kernel())

    thread = threading.Thread(target=interrupt)
    thread.start()
    client.execute()
    thread.join()
    assert list(Path(folder).iterdir()) == []  # nothing was written without a folder
    return list(notebook.cells)


def _text(cell: Any, kind: str = "stream") -> str:
    if kind == "stream":
        return "".join(output["text"] for output in cell.outputs if output["output_type"] == "stream")
    return "".join(output["data"]["text/plain"] for output in cell.outputs if output["output_type"] == kind)


def test_a_run_shows_a_bar_that_is_drawn_over_and_a_short_report(cells: list[Any]) -> None:
    said = _text(cells[1])
    assert "\r" in said and "160/160 windows [" in said and "\x1b[3" not in said
    assert "Linear, 2 parameters, on cpu in fp32\n" in said and "window 16 rows" in said
    assert "stopped: 40 epochs done\n  160 steps, 0 skips" in said and "last evaluation: loss " in said
    assert len(said) < 6000
    assert _text(cells[1], "execute_result").startswith("Stop(40 epochs done: 160 steps, 0 skips, ")


def test_the_global_generator_is_untouched_without_a_seed(cells: list[Any]) -> None:
    assert _text(cells[2]) == "True\n"


def test_an_interrupt_gives_control_back_with_a_trainer_that_goes_on(cells: list[Any]) -> None:
    (error,) = [output for output in cells[3].outputs if output["output_type"] == "error"]
    assert error["ename"] == "KeyboardInterrupt" and "stopped by Ctrl-C" in _text(cells[3])
    assert 1 <= int(_text(cells[4])) < 2000
    assert _text(cells[5]).endswith("went on: 2,000 steps done\nTrue\n")
