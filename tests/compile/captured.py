"""A compiler that notes the operators of the graphs it gets."""

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd


class Captured:
    """Dead code is removed from what it notes.

    Attributes:
        graphs: The operators of each graph in order, of backward ones too.
        backend: For `torch.compile`.
    """

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []
        self.backend = aot_autograd(fw_compiler=self._note, bw_compiler=self._note)

    def _note(self, graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        self.graphs.append([str(node.target) for node in calls])
        return make_boxed_func(graph.forward)

    @property
    def operators(self) -> list[str]:
        """Those of all graphs."""
        return [name for graph in self.graphs for name in graph]
