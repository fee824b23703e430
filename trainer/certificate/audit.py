"""What the audit of a first step would say, found before one: of the first micro-batch's forward, state put back."""

from collections.abc import Mapping

from torch import Tensor

from trainer.certificate.batches import copied
from trainer.certificate.lab import Lab
from trainer.diagnose.audit import of_forward, wiring
from trainer.diagnose.forward import Forward
from trainer.diagnose.losses import Losses
from trainer.diagnose.unseen import unseen
from trainer.gradient.objective import terms_of


def audit(lab: Lab, parameters: Mapping[str, Tensor]) -> list[str]:
    """A sentence for each fault in who holds which parameter, in what reaches it, and in what the losses are given.

    Args:
        parameters: those of the optimizers by name, also where they require no gradient.
    """
    said = wiring(lab.model, parameters)
    if not lab.own:
        return said  # a rank that has no micro-batch in this window
    with lab.from_the_start():
        forward = Forward(lab.model, lab.objective, copied(lab.own[0]), parameters)
        losses = Losses(forward.micro_batch, closely=True)
        try:
            answer = losses.within(lambda: lab.objective(lab.model, forward.micro_batch))
            terms = terms_of(answer, lab.objective)
            losses.returned([term.value for term in terms if term.weight is None])
            said += losses.said
            said += of_forward(forward, [term.value for term in terms])
        except Exception:  # what raises is the certificate's to say
            return said
    with lab.from_the_start():
        said += changes(lab, parameters)
    return said


def changes(lab: Lab, parameters: Mapping[str, Tensor]) -> list[str]:
    """What is changed in ways that torch does not see."""
    try:
        return unseen(Forward(lab.model, lab.objective, copied(lab.own[0]), parameters))
    except Exception:  # the user's forward, or hooks on saved tensors, under which torch.func does not run
        return []
