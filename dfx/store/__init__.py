"""The store: one zarr group a slide. `layout` is what it looks like, the other files what is done with it."""

from dfx.store.layout import check_folder, check_ours
from dfx.store.place import Place, place_of
from dfx.store.reading import Features, open_features
from dfx.store.status import Status, statuses
from dfx.store.writing import Columns, Store, fail, finish, write_note, write_patch_mode

__all__ = [
    "Columns",
    "Features",
    "Place",
    "Status",
    "Store",
    "check_folder",
    "check_ours",
    "fail",
    "finish",
    "open_features",
    "place_of",
    "statuses",
    "write_note",
    "write_patch_mode",
]
