"""Sources of regions, and the store that contains them."""

from region_pretrain.regions.store import RegionStore
from region_pretrain.regions.writing import merge_stores, write_store

__all__ = ["RegionStore", "merge_stores", "write_store"]
