"""The store: one zarr group a slide. `layout` is what it looks like, `writing` and `reading` what is done with it."""

from dfx.store.layout import check_folder, check_ours
from dfx.store.reading import Features, open_features
from dfx.store.writing import Columns, Store, write_patch_mode

__all__ = ["Columns", "Features", "Store", "check_folder", "check_ours", "open_features", "write_patch_mode"]
