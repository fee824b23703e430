"""The certificate: what passes, what is named, and that nothing is changed by looking."""

import pytest
import torch
from reference import differing, state_of
from torch import nn

from trainer import Certificate, certify
from trainer.errors import ConfigError

CROSS_ENTROPY = nn.CrossEntropyLoss()


def window(parts: int = 3, rows: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(parts * rows, 8, generator=generator)
    targets = torch.randint(3, (parts * rows,), generator=generator)
    return list(zip(inputs.split(rows), targets.split(rows), strict=True))


def net(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *middle, nn.ReLU(), nn.Linear(16, 3))


def only(certificate: Certificate) -> tuple[str, str | None, str | None]:
    assert len(certificate.findings) == 1, str(certificate)
    finding = certificate.findings[0]
    return finding.kind, finding.setting, finding.module


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": 2}, {"precision": "bf16"}])
def test_a_clean_model_passes(settings) -> None:
    certificate = certify(net(), CROSS_ENTROPY, None, window(), **settings)
    assert certificate.passed, str(certificate)
    assert certificate.error <= 4 * certificate.floor


def test_a_gradient_that_some_micro_batches_do_not_write_is_noted() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.seldom = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.always(x)
            return out + self.seldom(x) * (x[:, :1] > 2) if (x[:, 0] > 2).any() else out

    parts = window()
    parts[1][0][0, 0], parts[0][0][:, 0], parts[2][0][:, 0] = 3.0, 0.0, 0.0
    certificate = certify(Branching(), CROSS_ENTROPY, None, parts)
    assert certificate.passed, str(certificate)
    (note,) = [one for one in certificate.notes if "was written" in one]
    assert note.startswith("the gradient of 'seldom.weight' was written once in a window of 3 micro-batches")
    assert not [one for one in certify(net(), CROSS_ENTROPY, None, window()).notes if "was written" in one]


def test_batch_statistics_under_accumulation_are_named_and_pass_without() -> None:
    assert only(certify(net(nn.BatchNorm1d(16)), CROSS_ENTROPY, None, window())) == (
        "batch_statistics",
        "accumulation_steps",
        "1",
    )
    assert certify(net(nn.BatchNorm1d(16)), CROSS_ENTROPY, None, window(1)).passed


def test_looking_changes_nothing() -> None:
    model = net(nn.BatchNorm1d(16), nn.Dropout(0.3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(window()[0][0]).sum().backward()
    held, generator = state_of(model, optimizer), torch.get_rng_state()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    certify(model, CROSS_ENTROPY, optimizer, window(), activation_checkpointing=2)
    assert differing(held, state_of(model, optimizer)) == []
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_cannot_be_certified_is_said() -> None:
    with pytest.raises(ConfigError, match="no micro-batch"):
        certify(net(), CROSS_ENTROPY, None, [])
    with pytest.raises(ConfigError, match="nothing to certify"):
        certify(net().requires_grad_(False), CROSS_ENTROPY, None, window())
