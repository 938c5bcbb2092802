"""Picklers of modules: for copies within this process, and for other processes. See `dfx.encoders.copying`."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import warnings
import weakref
from collections.abc import Collection, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import cloudpickle
import numpy as np
import torch
from cloudpickle import cloudpickle as by_value
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Attributes of a module that change its output when it is called."""
SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
WEAK_MAPPINGS: tuple[Any, ...] = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary)


class ModulePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles modules that `pickle` refuses or changes: scripted, compiled and parametrized modules, and hooks."""

    def __init__(self, file: Any, held: Collection[int] = ()) -> None:
        """`held`: the ids of all things that the module holds, so that weak references to them are kept."""
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._cells: dict[int, tuple[CellType, CellType]] = {}
        self._held = held

    def reducer_override(self, obj: Any) -> Any:
        """Returns the reduction of an object; `NotImplemented`: the object defines it itself."""
        if isinstance(obj, torch.storage.TypedStorage):
            untyped = obj._untyped_storage
            # Tensors that share a storage have a separate Python object for it each.
            return typed_storage, (self._storages.setdefault(untyped._cdata, untyped), obj.dtype)
        if isinstance(obj, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            return load_script, (obj.save_to_buffer({}),)
        if type(obj) is torch.Tensor and obj.layout in SPARSE:
            # By itself it would be noted in a list of torch's, for the next file of weights to be checked with.
            return sparse_tensor, sparse_parts(obj.detach())
        referent = referent_of(obj)
        if id(holder_of(referent)) in self._held:
            return weakref.proxy if type(obj) in PROXIES else type(obj), (referent,)
        if type(obj) in WEAK_MAPPINGS:
            weak = 1 if type(obj) is weakref.WeakValueDictionary else 0
            return type(obj), (), None, None, iter([item for item in obj.items() if id(item[weak]) in self._held])
        if isinstance(obj, nn.Module):
            return self._module(obj)
        reduced = super().reducer_override(obj)
        if isinstance(obj, FunctionType):
            compiled = vars(obj).get("_torchdynamo_orig_callable")
            if compiled is not None:
                return itself, (compiled,)
            if reduced is not NotImplemented:
                return self._function(obj, reduced)
        return reduced

    def _module(self, module: nn.Module) -> Any:
        if is_compiled(module):
            if any(getattr(module, name) for name in HOOKS):
                raise pickle.PicklingError("it has hooks on the wrapper of torch.compile: give the module within")
            return itself, (module._orig_mod,)
        if is_parametrized(module):  # whose class refuses to be pickled, though its parts can be
            return new_object, (type(module),), {k: v for k, v in vars(module).items() if k != "_compiled_call_impl"}
        if isinstance(module, torch.fx.GraphModule):  # which rebuilds itself without hooks
            make, (state, *others) = module.__reduce__()[:2]
            hooks = {key: value for key, value in vars(module).items() if key.startswith(HOOKS)}
            rest = {key: value for key, value in state.items() if key not in hooks}  # hooks may refer to the module
            return make, (rest, *others), hooks, None, None, set_state
        return NotImplemented

    def _function(self, function: FunctionType, reduced: Any) -> Any:
        """Functions that share a variable share it in the copy, too; cloudpickle by itself would separate them."""
        _, (code, scope, *_), state, *_ = reduced
        cells = None if function.__closure__ is None else tuple(self._cell(cell) for cell in function.__closure__)
        return make_function, (code, self._scope(function, scope, state[1]), cells), state, None, None, set_function

    def _cell(self, cell: CellType) -> CellType:
        """Returns the variable of the copy, still without a value: it gets its value when the functions exist."""
        return self._cells.setdefault(id(cell), (cell, CellType()))[1]

    def _scope(self, function: FunctionType, scope: dict[str, Any], slots: dict[str, Any]) -> Any:
        """Returns the global variables of a function's copy."""
        raise NotImplementedError


class PortablePickler(ModulePickler):
    """For other processes."""

    def __init__(self, file: Any, held: Collection[int] = ()) -> None:
        super().__init__(file, held)
        self._scopes: dict[str, ImportedScope] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Returns the reduction of an object; `NotImplemented`: the object defines it itself."""
        if isinstance(obj, torch.UntypedStorage):
            return untyped_storage, (pickle.PickleBuffer(bytes_of(obj)),)
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and reduced is not NotImplemented and len(reduced) > 2:
            make, (*args, _, extra), *others = reduced
            # Without the class's number: a process that knows another state of the class by this number would use that.
            return make, (*args, None, extra), *others
        return reduced

    def _scope(self, function: FunctionType, scope: dict[str, Any], slots: dict[str, Any]) -> Any:
        name = str(function.__globals__.get("__name__"))
        if name in ("__main__", *cloudpickle.list_registry_pickle_by_value()) or not owns(name, function.__globals__):
            return scope
        # Methods of importable classes use the module's own variables, and so must functions that share these.
        return self._scopes.setdefault(name, ImportedScope(name))


class LocalPickler(ModulePickler):
    """For copies within this process: `things` are the objects that the stream refers to but does not hold."""

    def __init__(self, file: Any, cells: dict[int, CellType], held: Collection[int] = ()) -> None:
        super().__init__(file, held)
        self.things: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._shared: dict[int, Any] = {}
        self._class_cells = cells

    def persistent_id(self, obj: Any) -> int | None:
        """Returns the number of a thing that the stream does not hold."""
        if id(obj) in self._numbers:
            return self._numbers[id(obj)]
        if type(obj) in (weakref.ref, weakref.WeakMethod, *PROXIES):
            if id(holder_of(referent_of(obj))) in self._held:
                return None
        elif isinstance(obj, type):
            for function in functions_of(obj):
                note_cells(function, self._class_cells)
        elif not (
            isinstance(obj, ModuleType | torch.UntypedStorage)
            or id(obj) in self._shared
            or id(obj) in self._class_cells
            or (isinstance(obj, FunctionType) and is_stateless(obj))
        ):
            return None
        self._numbers[id(obj)] = len(self.things)
        self.things.append(obj)
        return self._numbers[id(obj)]

    @property
    def held(self) -> set[int]:
        """Ids of the things in the stream; valid while this object lives."""
        return set(self.memo.copy())

    def reducer_override(self, obj: Any) -> Any:
        """Returns the reduction of an object; `NotImplemented`: the object defines it itself."""
        if isinstance(obj, MethodType) and obj.__func__ in list(functions_of(*type(obj.__self__).__mro__)):
            self._shared[id(obj.__func__)] = obj.__func__
        return super().reducer_override(obj)

    def _scope(self, function: FunctionType, scope: dict[str, Any], slots: dict[str, Any]) -> Any:
        slots["__globals__"] = {}
        for thing in (function.__globals__, function.__code__):
            self._shared[id(thing)] = thing
        return function.__globals__

    def _cell(self, cell: CellType) -> CellType:
        return cell if id(cell) in self._class_cells else super()._cell(cell)


class LocalUnpickler(pickle.Unpickler):
    """Reads a stream of `LocalPickler`; tensors are copied to a device."""

    def __init__(self, file: Any, things: list[Any], device: torch.device) -> None:
        super().__init__(file)
        self._things = things
        self._device = device
        self._storages: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, pid: int) -> Any:
        """Returns the thing with a number."""
        thing = self._things[pid]
        if not isinstance(thing, torch.UntypedStorage):
            return thing
        if pid not in self._storages:
            new = torch.empty(thing.nbytes(), dtype=torch.uint8, device=self._device).untyped_storage()
            self._storages[pid] = new.copy_(thing)
        return self._storages[pid]


class ImportedScope:
    """The global variables of a module that is imported by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return imported_scope, (self.name,)


def owns(name: str, scope: dict[str, Any]) -> bool:
    """Whether global variables belong to the module with a name."""
    return name in sys.modules and vars(sys.modules[name]) is scope


def imported_scope(name: str) -> dict[str, Any]:
    """Returns the global variables of a module; new variables if there is no such module here."""
    try:
        return vars(importlib.import_module(name))
    except ImportError:
        return {"__name__": name, "__package__": name.rpartition(".")[0]}


def referent_of(thing: Any) -> Any:
    """Returns what a weak reference or a proxy refers to; None for other things, and where that is gone."""
    if type(thing) in (weakref.ref, weakref.WeakMethod):
        return thing()
    try:
        return thing.__reduce_ex__.__self__ if type(thing) in PROXIES else None
    except ReferenceError:
        return None


def holder_of(referent: Any) -> Any:
    """Returns the object that a weakly referred thing lives with: of a method, its own."""
    return referent.__self__ if isinstance(referent, MethodType) else referent


def is_compiled(thing: object) -> bool:
    """Whether a thing is the wrapper that `torch.compile` puts around a module."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # slow to import; imported already if a wrapper exists
    return eval_frame is not None and isinstance(thing, eval_frame.OptimizedModule)


def functions_of(*classes: type) -> Iterator[FunctionType]:
    """Yields the functions that classes define, also those within properties and static and class methods."""
    for cls in classes:
        for value in vars(cls).values():
            inner = (getattr(value, key, None) for key in ("__func__", "fget", "fset", "func"))
            yield from (f for f in (value, *inner) if isinstance(f, FunctionType))


def note_cells(function: FunctionType, found: dict[int, CellType]) -> None:
    """Note the variables of a function's closure, and of the functions in it."""
    for cell in function.__closure__ or ():
        if id(cell) not in found:
            found[id(cell)] = cell
            try:
                value = cell.cell_contents
            except ValueError:  # it has no value
                continue
            if isinstance(value, FunctionType):
                note_cells(value, found)


def is_stateless(function: FunctionType) -> bool:
    """Whether a function has no state, or can be found by its name, so that a copy may use it too."""
    if not (function.__closure__ or function.__defaults__ or function.__kwdefaults__ or vars(function)):
        return True
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def bytes_of(storage: Any) -> memoryview:
    """Returns a storage's bytes, in main memory."""
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage.cpu()).numpy())  # type: ignore[arg-type]


def sparse_parts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns what `sparse_tensor` makes a tensor of."""
    if tensor.layout is torch.sparse_coo:
        return tensor.layout, tensor.size(), tensor._indices(), None, tensor._values(), tensor.is_coalesced()
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    plain = (tensor.crow_indices(), tensor.col_indices()) if by_row else (tensor.ccol_indices(), tensor.row_indices())
    return tensor.layout, tensor.size(), *plain, tensor.values(), True


# Functions that the streams name


def untyped_storage(data: bytearray) -> torch.UntypedStorage:
    """Returns a storage of bytes."""
    return torch.from_numpy(np.frombuffer(data, np.uint8)).clone().untyped_storage()


def typed_storage(untyped: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    """Returns a storage with the data type of its tensors."""
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def sparse_tensor(
    layout: torch.layout,
    size: torch.Size,
    indices: torch.Tensor,
    plain: torch.Tensor | None,
    values: torch.Tensor,
    coalesced: bool,
) -> torch.Tensor:
    """Returns a tensor of a sparse layout."""
    if plain is None:
        return torch.sparse_coo_tensor(indices, values, size, is_coalesced=coalesced, check_invariants=True)
    return torch.sparse_compressed_tensor(indices, plain, values, size, layout=layout, check_invariants=True)


def load_script(data: bytes) -> nn.Module:
    """Returns a scripted or traced module, or a scripted function as a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the deprecation of torch.jit concerns its user, not dfx
        module: nn.Module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    return module


def itself(thing: Any) -> Any:
    """Returns its argument."""
    return thing


def new_object(cls: type) -> Any:
    """Returns an object without its state."""
    return object.__new__(cls)


def set_state(thing: Any, state: dict[str, Any]) -> None:
    """Give an object more attributes."""
    vars(thing).update(state)


def make_function(code: Any, scope: dict[str, Any], cells: tuple[CellType, ...] | None) -> FunctionType:
    """Returns a function without its state."""
    scope.setdefault("__builtins__", __builtins__)
    return FunctionType(code, scope, None, None, cells)


def set_function(function: FunctionType, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Give a function its state; if its module is loaded here, the function uses the module's own global variables."""
    if owns(str(function.__globals__.get("__name__")), function.__globals__):
        state[1]["__globals__"] = {}
    by_value._function_setstate(function, state)
