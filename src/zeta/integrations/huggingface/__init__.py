"""Transformers' models on Zeta by name: ``attn_implementation="zeta"``. See `register`."""

from zeta.integrations.huggingface.registration import register

__all__ = ["register"]
