"""What the order of tokens hides, where it hides anything."""

import pytest

from zeta.masks import SlidingWindow
from zeta.nn.masking import structured_mask


@pytest.mark.parametrize(
    ("target", "source", "ordered", "hides"),
    [(1, 4, True, False), (1, 5, True, True), (1, 4, False, True), (2, 4, True, True)],
)
def test_a_query_that_sees_all_keys_needs_no_window(
    target: int, source: int, ordered: bool, hides: bool
) -> None:
    found = structured_mask(True, 4, (1, 1, target, source), ordered=ordered)
    assert (found is not None) == hides
    assert found is None or isinstance(found, SlidingWindow)
