"""What mkdocs does beside turning pages into HTML: the project's own pages join the site, and the
table of backends is made by asking them.

The pages of the root folder (DESIGN.md and its like) are read on code hosts too, so their links go
through the folders; here they are turned into links between pages.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "design.md": "DESIGN.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
BACKENDS = "<!-- backends -->"

_TO_ROOT = re.compile(r"\]\((?:\.\./)*(DESIGN|CHANGELOG|CONTRIBUTING)\.md")
_TO_DOCS = re.compile(r"\]\(docs/")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the root folder."""
    from mkdocs.structure.files import File

    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_TO_DOCS.sub("](", text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Mends links to the root folder's pages; fills in the table of backends."""
    up = "../" * page.file.src_uri.count("/")
    markdown = _TO_ROOT.sub(lambda found: f"]({up}{found[1].lower()}.md", markdown)
    if BACKENDS in markdown:
        markdown = markdown.replace(BACKENDS, backend_table())
    return markdown


def backend_table() -> str:
    """Which backend can do what on this machine's processor, as `zeta.explain` says."""
    import torch

    import zeta
    from zeta import biases, masks

    q, k, v = torch.zeros(3, 2, 4, 64, 32).unbind()
    dense = torch.zeros(1, 4, 64, 64, requires_grad=True)
    table = torch.zeros(32, 4, requires_grad=True)
    lengths = torch.tensor([64, 40])
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"mask": masks.Causal()},
        "causal and padding": {"mask": masks.Causal() & masks.Padding(lengths)},
        "sliding window": {"mask": masks.SlidingWindow(16)},
        "documents": {"mask": masks.Documents(torch.zeros(2, 64, dtype=torch.int64))},
        "causal or documents": {
            "mask": masks.Causal() | masks.Documents(torch.zeros(2, 64, dtype=torch.int64))
        },
        "T5 bias, learned": {"bias": biases.Bucketed(table)},
        "ALiBi": {"bias": biases.Alibi(torch.ones(4))},
        "dense bias, learned": {"bias": biases.Dense(dense)},
        "softcap": {"bias": biases.Softcap(30.0)},
        "dropout": {"dropout_p": 0.1},
    }
    found = {name: zeta.explain(q, k, v, **options) for name, options in cases.items()}
    names = list(found["plain"].reasons)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for case, explanation in found.items():
        cells = [_cell(explanation, name) for name in names]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(explanation: Any, name: str) -> str:
    reasons = explanation.reasons[name]
    if name == explanation.backend:
        return "**runs**"
    return "no: " + "; ".join(reasons) if reasons else "can"
