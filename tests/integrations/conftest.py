"""What tests of Transformers' models ask for."""

from collections.abc import Iterator

import pytest

from zeta.integrations import huggingface


@pytest.fixture
def registered() -> Iterator[None]:
    """``"zeta"`` is an attention implementation of Transformers, with nothing wrapped."""
    huggingface.register()
    yield
    huggingface.register()
