"""Scripts that measure Zeta against named peers. Each checks its results before it times them."""
