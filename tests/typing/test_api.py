"""mypy accepts what users write, and refuses what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MISTAKES = """
import torch
import zeta
from zeta import biases, masks
from zeta.nn import MultiheadAttention

q = torch.randn(1, 1, 2, 4)
zeta.attention(q, q)
zeta.attention(q, q, q, mask=q > 0)
zeta.attention(q, q, q, bias=q)
zeta.attention(q, q, q, masks.Causal())
masks.Causal() & biases.Softcap(1.0)
MultiheadAttention(None, 64, 4, need_weights="always")
MultiheadAttention(None, 64, 4)(q, q, q, attn_mask="causal")
number: int = zeta.explain(q, q, q)
"""


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_users_code_is_accepted_and_mistakes_are_not(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    planted = tmp_path / "mistakes.py"
    planted.write_text(MISTAKES, encoding="utf-8")
    done = mypy("tests/typing/api.py", str(planted))
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    first = 1 + MISTAKES[: MISTAKES.index("zeta.attention(q, q)\n")].count("\n")
    wrong = MISTAKES.count("\n", MISTAKES.index("zeta.attention(q, q)\n"))
    lines = {int(line.split(":")[1]) for line in found if planted.name in line}
    assert lines == set(range(first, first + wrong)), done.stdout + done.stderr
    assert all(planted.name in line for line in found), done.stdout
