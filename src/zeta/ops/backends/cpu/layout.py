"""`ZetaCall` of ``native/abi.h``, field by field: where each of its numbers stands.

Every field is eight bytes wide. `Record` is the memory of one call, zero where nothing was written:
a null pointer, a stride of 0, nothing asked for.
"""

import ctypes
import struct

_MEMBERS = {
    "rows": ("data", "batch", "head", "row"),
    "plane": ("data", "dtype", "batch", "head", "row", "column"),
    "labels": ("data", "batch"),
    "integer": ("value",),
    "real": ("value",),
    "pointer": ("value",),
}

FIELDS = (
    ("integer", "bytes dtype precision num_threads"),
    ("integer", "batch heads key_heads target source head_dim value_dim"),
    ("rows", "query key value"),
    ("real", "scale"),
    ("integer", "causal window"),
    ("pointer", "prefix padding"),
    ("labels", "document_rows document_columns query_positions key_positions"),
    ("plane", "keep"),
    ("real", "softcap"),
    ("integer", "softcap_first"),
    ("pointer", "offsets"),
    ("integer", "reach"),
    ("pointer", "slopes"),
    ("plane", "dense"),
    ("real", "dropout_p"),
    ("integer", "dropout_threshold seed"),
    ("rows", "out"),
    ("pointer", "lse"),
    ("rows", "grad_out"),
    ("pointer", "grad_lse"),
    ("rows", "grad_query grad_key grad_value"),
    ("pointer", "grad_offsets"),
    ("plane", "grad_dense"),
    ("integer", "mean_weights"),
    ("pointer", "weights grad_weights"),
    ("pointer", "page_table"),
    ("integer", "page_size pages_per_row"),
    ("pointer", "key_factor value_factor"),
    ("integer", "factor_batch factor_head"),
)
"""The kinds and names of the fields, in their order; the shape suffixes of the header left out."""


def _offsets() -> tuple[dict[str, int], str]:
    """The byte at which each field begins, and the format of all."""
    offsets: dict[str, int] = {}
    codes = ""
    for kind, names in FIELDS:
        for name in names.split():
            offsets[name] = 8 * len(codes)
            codes += ("d" if kind == "real" else "q") * len(_MEMBERS[kind])
    return offsets, codes


OFFSETS, FORMAT = _offsets()
NUM_BYTES = 8 * len(FORMAT)
Record = ctypes.c_char * NUM_BYTES


class Part:
    """Neighbouring fields, written together.

    Args:
        first: The name of the first field.
        last: That of the last; by default the first.
    """

    def __init__(self, first: str, last: str | None = None) -> None:
        names = list(OFFSETS)
        end = names.index(last or first) + 1
        self.offset = OFFSETS[first]
        stop = OFFSETS[names[end]] if end < len(names) else NUM_BYTES
        self._struct = struct.Struct("=" + FORMAT[self.offset // 8 : stop // 8])

    def write(self, record: ctypes.Array[ctypes.c_char], *numbers: float) -> None:
        """Write every number of these fields."""
        self._struct.pack_into(record, self.offset, *numbers)

    def read(self, record: ctypes.Array[ctypes.c_char]) -> tuple[float, ...]:
        """What was written."""
        return self._struct.unpack_from(record, self.offset)
