"""What each rank has of its own in a checkpoint, and what a rank takes up of one.

The first rank's own lies in the parts themselves, so that a checkpoint of several ranks reads like that of one process.
Each other rank has its generators, the buffers that are not what the first one has, how far it came in an evaluation,
and of an open window its gradients, sums and buffers. The first rank writes all of it, each rank's tensors as a file:
one process alone touches the disk, so a rank that dies meanwhile leaves no checkpoint that is half new.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import rng
from trainer.checkpoint.of_model import model_state
from trainer.data.order import mixed
from trainer.distributed.alike import unlike_the_first
from trainer.distributed.ranks import Ranks
from trainer.errors import CheckpointError
from trainer.gradient.clocks import counted
from trainer.gradient.parameters import named_parameters
from trainer.step import Step

OF_STEP = ("open", "gradients", "aside")
OF_RUN = ("window_rng",)
OF_PARTS = ("evaluation",)


def take(model: Any, step: Step, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each rank has of its own, in the order of ranks, on the first rank; nothing on the others. The first rank's
    is empty. Called by every rank."""
    ranks = step.ranks
    if ranks.world_size == 1:
        return [{}]
    parameters = named_parameters(model)
    buffers = {name: tensor for name, tensor in model_state(model).items() if name not in parameters}
    unlike = unlike_the_first(ranks, buffers)
    own: dict[str, Any] = {}
    if ranks.rank:
        inside = step.state_dict() if step.is_open else {}
        own = {
            "model": {name: buffer for name, buffer in buffers.items() if name in unlike},
            "step": {name: inside[name] for name in OF_STEP if name in inside},
            "rng": rng.capture(),
            "run": {name: run[name] for name in OF_RUN},
            "parts": {name: run["parts"][name] for name in OF_PARTS if name in run["parts"]},
        }
    return ranks.to_first(_on_host(own))


def of_rank(state: Mapping[str, Any], ranks: Ranks, where: Path) -> dict[str, Any]:
    """The state as this rank takes it up.

    Raises CheckpointError where other ranks than there are now have stopped inside a window.
    """
    saved = state.get("ranks")
    if not isinstance(saved, list) or "step" not in state or "run" not in state:
        return dict(state)  # what is missing is named where it goes back
    now, rank = ranks.world_size, ranks.rank
    found = dict(state)
    if len(saved) != now:
        if state["step"].get("open") is not None:
            raise CheckpointError(
                f"{where} was saved by {counted(len(saved), 'rank')} inside a window, and now there "
                f"{'is' if now == 1 else 'are'} {now}: what each has summed of it cannot be dealt anew, so go on with "
                f"{len(saved)} until the window's end, or from a checkpoint that was saved at one (resume=PATH)."
            )
        nowhere = dict.fromkeys(OF_PARTS)  # an evaluation that was half done begins anew
        found["run"] = {**state["run"], "parts": {**state["run"].get("parts", {}), **nowhere}}
    if 0 < rank < len(saved):
        own = saved[rank]
        found["model"] = {**state["model"], **own["model"]}
        found["rng"] = own["rng"]
        if len(saved) == now:
            found["step"] = {**state["step"], **own["step"]}
            found["run"] = {**state["run"], **own["run"], "parts": {**state["run"]["parts"], **own["parts"]}}
    return found


def begin_new(state: Mapping[str, Any], ranks: Ranks, windows: int) -> None:
    """A rank that the checkpoint knows nothing of draws from generators of its own."""
    if ranks.rank >= len(state["ranks"]):
        rng.seed_all(mixed(state["run"]["order_seed"], ranks.rank, windows))


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(item) for item in value)
    return value
