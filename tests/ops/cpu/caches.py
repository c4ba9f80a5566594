"""Calls of the native decode pass on caches that only it reads: in pages, and in int8."""

import dataclasses

import torch
from torch import Tensor

from zeta.ops.backends.cpu import library
from zeta.ops.backends.cpu.layout import NUM_BYTES, Part, Record

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SIZES = Part("bytes", "value_dim")
_QUERY, _KEY, _VALUE, _OUT = Part("query"), Part("key"), Part("value"), Part("out", "lse")
_SCALE, _CAUSAL, _PADDING = Part("scale"), Part("causal"), Part("padding")
_PAGES = Part("page_table", "pages_per_row")
_FACTORS = Part("key_factor", "factor_head")


@dataclasses.dataclass(frozen=True)
class Cache:
    """Queries of a few tokens, and a cache.

    Attributes:
        page_size: Tokens of a page; 0 for a cache in one piece.
        is_int8: Keys and values are int8, with a factor for each token of each head.
        heads_inside: The heads of a token lie side by side.
    """

    name: str
    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    target: int = 1
    source: int = 301
    head_dim: int = 40
    value_dim: int = 24
    page_size: int = 0
    is_int8: bool = False
    heads_inside: bool = False
    causal: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def pages_per_row(self) -> int:
        return -(-self.source // self.page_size) if self.page_size else 0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fresh operands; in pages, those of a sequence lie in no order."""
        generator = torch.Generator().manual_seed(self.source + self.head_dim)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        made = {"query": normal(self.batch, self.heads, self.target, self.head_dim).to(dtype)}
        rows, length = self.batch, self.source
        if self.page_size:
            rows, length = self.batch * self.pages_per_row, self.page_size
            order = torch.randperm(rows, generator=generator).to(torch.int32)
            made["page_table"] = order.view(self.batch, self.pages_per_row)
        for name, width in (("key", self.head_dim), ("value", self.value_dim)):
            tensor = normal(rows, self.key_heads, length, width)
            if self.heads_inside:
                tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
            made[name] = (tensor * 40).round().char() if self.is_int8 else tensor.to(dtype)
            if self.is_int8:
                factor = torch.rand(self.batch, self.key_heads, self.source, generator=generator)
                made[f"{name}_factor"] = factor / 40
        if self.lengths:
            made["padding"] = torch.tensor(self.lengths)
        return made

    def plain(self, tensors: dict[str, Tensor], name: str) -> Tensor:
        """Keys or values in one piece ``(B, G, S, features)``, in float64."""
        tensor = tensors[name].double()
        if self.page_size:
            pages = tensor[tensors["page_table"].long()]
            tensor = pages.transpose(1, 2).flatten(2, 3)[:, :, : self.source]
        if self.is_int8:
            tensor = tensor * tensors[f"{name}_factor"].double().unsqueeze(-1)
        return tensor

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The output and its log-sum-exp."""
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        out = query.new_empty((self.batch, self.heads, self.target, self.value_dim))
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        record = Record()
        native = library.load()
        _SIZES.write(
            record, NUM_BYTES, DTYPES.index(query.dtype), 0,
            torch.get_num_threads(), self.batch, self.heads, self.key_heads, self.target,
            self.source, self.head_dim, self.value_dim,
        )  # fmt: skip
        for part, tensor in ((_QUERY, query), (_KEY, key), (_VALUE, value)):
            part.write(record, tensor.data_ptr(), *tensor.stride()[:3])
        _OUT.write(record, out.data_ptr(), *out.stride()[:3], lse.data_ptr())
        _SCALE.write(record, self.head_dim**-0.5)
        _CAUSAL.write(record, self.causal)
        if self.lengths:
            _PADDING.write(record, tensors["padding"].data_ptr())
        if self.page_size:
            table = tensors["page_table"].data_ptr()
            _PAGES.write(record, table, self.page_size, self.pages_per_row)
        if self.is_int8:
            factors = [tensors[f"{name}_factor"].data_ptr() for name in ("key", "value")]
            strides = tensors["key_factor"].stride()[:2]
            _FACTORS.write(record, *factors, *strides)
        library.check(native.decode(record))
        return {"out": out, "lse": lse}


CACHES = [
    Cache("in one piece"),
    Cache("in one piece, many queries", target=9, heads=6, causal=True),
    Cache("pages", page_size=16),
    Cache("pages of odd size", page_size=7, target=3, causal=True),
    Cache("long pages", page_size=300, source=650, head_dim=64, value_dim=64),
    Cache("pages and lengths", page_size=16, lengths=(301, 33)),
    Cache("pages of whole tokens", page_size=16, heads_inside=True),
    Cache("short pages of whole tokens", page_size=3, heads_inside=True, lengths=(300, 1)),
    Cache("int8", is_int8=True),
    Cache("int8, many queries", is_int8=True, target=5, key_heads=1, causal=True),
    Cache("int8, a vector and a few more", is_int8=True, head_dim=68, value_dim=36),
    Cache("int8, wide", is_int8=True, source=1030, head_dim=128, value_dim=65),
    Cache("int8 in pages", is_int8=True, page_size=32, lengths=(0, 300)),
]
