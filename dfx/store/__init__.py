"""The store: one zarr group a slide. `layout` is what it looks like, the other files what is done with it."""

from dfx.store.drawing import stored_slide
from dfx.store.layout import check_folder, check_ours, dfx_attributes, encoders_in
from dfx.store.place import Place, place_of
from dfx.store.reading import Features, open_features, stored_mask
from dfx.store.status import Status, statuses
from dfx.store.writing import Columns, Store, fail, finish, read_notes, write_note, write_patch_mode

__all__ = [
    "Columns",
    "Features",
    "Place",
    "Status",
    "Store",
    "check_folder",
    "check_ours",
    "dfx_attributes",
    "encoders_in",
    "fail",
    "finish",
    "open_features",
    "place_of",
    "read_notes",
    "statuses",
    "stored_mask",
    "stored_slide",
    "write_note",
    "write_patch_mode",
]
