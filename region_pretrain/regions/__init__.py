"""Where regions come from, and the store that keeps them."""

from region_pretrain.regions.store import RegionStore, UnknownImage
from region_pretrain.regions.writing import merge_stores, write_store

__all__ = ["RegionStore", "UnknownImage", "merge_stores", "write_store"]
