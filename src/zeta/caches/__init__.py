"""Key/value caches: what an attention remembers between the steps of decoding."""

from zeta.caches.cross import CrossCache
from zeta.caches.dictionary import DictCache
from zeta.caches.dynamic import DynamicCache
from zeta.caches.interface import Cache, Cached, CacheFullError, DecodingCache
from zeta.caches.padding import extend_padding
from zeta.caches.paged import PagedCache
from zeta.caches.pool import PagePool
from zeta.caches.quantized import QuantizedCache
from zeta.caches.rolling import RollingCache
from zeta.caches.static import StaticCache

__all__ = [
    "Cache",
    "CacheFullError",
    "Cached",
    "CrossCache",
    "DecodingCache",
    "DictCache",
    "DynamicCache",
    "PagePool",
    "PagedCache",
    "QuantizedCache",
    "RollingCache",
    "StaticCache",
    "extend_padding",
]
