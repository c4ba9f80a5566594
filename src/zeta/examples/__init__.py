"""Readable models built from `zeta.nn`, and what they learn from; `zeta demo` trains them."""
