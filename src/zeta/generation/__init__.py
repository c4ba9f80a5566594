"""Generation: from a model of the next token to texts, step by step with caches."""

from zeta.generation.beams import Beams, beam_search
from zeta.generation.choosing import Greedy, Sampling
from zeta.generation.prompts import Model
from zeta.generation.speculation import Draft
from zeta.generation.streaming import Generated, Step, generate, stream

__all__ = [
    "Beams",
    "Draft",
    "Generated",
    "Greedy",
    "Model",
    "Sampling",
    "Step",
    "beam_search",
    "generate",
    "stream",
]
