"""The audit of a chat template: what of it is proved, what it writes there, and what other ways would drift."""

from torchrl_chat.audit.findings import BrokenTemplateError, audit
from torchrl_chat.audit.report import Report

__all__ = ["BrokenTemplateError", "Report", "audit"]
