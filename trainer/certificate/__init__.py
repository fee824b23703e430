"""The certificate: one window's gradient as it is configured against a plain reference, and what breaks it by name."""

from trainer.certificate.certificate import Certificate, Finding
from trainer.certificate.entry import certify

__all__ = ["Certificate", "Finding", "certify"]
