"""The seam: one module's method, cloned so that it reads some names of its module's globals from us.

A method of a transformers model finds the functions it calls (``mamba_selective_scan`` and the like) in the globals of
its modeling module. :func:`clone` copies the method, through its decorators, onto the globals of a *shadow* of that
module, in which those names are ours; :func:`bind` puts the copy on one instance. Nothing is patched that another model
could see; :func:`unbind` deletes the instance's attribute and the class's method is back. ``copy.deepcopy`` keeps the
copies, saving the model writes the plain one.
"""

import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

MARK = "__subquad_method__"  # on every function that we bind: the name of the method that it stands for
LAYER_INDEX = "_subquad_layer_index"  # a layer's place in its model, for those that do not know it
HOOKED = "_old_forward"  # where accelerate keeps a module's own forward while its hook is on


def shadow_of(module_name: str, replacements: Mapping[str, Any]) -> types.ModuleType:
    """A copy of an imported module whose ``replacements`` differ, findable in ``sys.modules`` as compilers need it.

    Equal replacements of one module give one shadow.
    """
    original = sys.modules[module_name]
    key = repr(sorted((name, id(value)) for name, value in replacements.items()))
    name = f"{module_name}__subquad_{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    shadow = sys.modules.get(name)
    if shadow is None:
        shadow = types.ModuleType(name, f"{module_name} with operations of subquad in place of its own.")
        shadow.__dict__.update(original.__dict__)
        shadow.__dict__.update(replacements, __name__=name)
        sys.modules[name] = shadow
    return shadow


def clone(method: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """The function ``method`` with ``names`` as its globals; its decorators are kept, around the copy.

    Raises:
        ValueError: a decorator that hides what it wraps.
    """
    if not isinstance(method, types.FunctionType):
        raise ValueError(f"{method!r} is no plain function")
    wrapped = getattr(method, "__wrapped__", None)
    if wrapped is None:
        return _copy(method, names, method.__closure__)
    cells = method.__closure__ or ()
    if not any(_holds(cell, wrapped) for cell in cells):
        raise ValueError(f"the decorator around {wrapped.__qualname__} does not hold it in a closure")
    inner = clone(wrapped, names)
    outer = _copy(method, method.__globals__, tuple(types.CellType(inner) if _holds(c, wrapped) else c for c in cells))
    outer.__wrapped__ = inner  # type: ignore[attr-defined]
    return outer


def _holds(cell: types.CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # a cell that is not yet filled
        return False


def _copy(
    function: types.FunctionType, names: dict[str, Any], closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    copied.__qualname__, copied.__doc__ = function.__qualname__, function.__doc__
    copied.__annotations__ = function.__annotations__
    return copied


def innermost(method: Callable[..., Any]) -> types.FunctionType:
    """The function that a method's decorators wrap."""
    function = inspect.unwrap(method)
    if not isinstance(function, types.FunctionType):
        raise ValueError(f"{method!r} is no plain function")
    return function


def obstacle(module: nn.Module, name: str) -> str | None:
    """Why the method ``name`` of this instance may not be replaced, or None."""
    own = module.__dict__.get(_attribute(module, name))
    if own is None or is_ours(own) or _is_plain(module, name, own):
        return None
    return f"its {name} was already replaced by {getattr(own, '__qualname__', type(own).__name__)}"


def bind(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Let a copy of ``function`` be the method ``name`` of this instance; under an accelerate hook, what that calls."""
    if not isinstance(function, types.FunctionType):
        raise ValueError(f"{function!r} is no plain function")
    copied = _copy(function, function.__globals__, function.__closure__)
    copied.__name__ = name  # by which a pickle finds the class's method
    setattr(copied, MARK, name)
    module.__dict__[_attribute(module, name)] = types.MethodType(copied, module)


def _attribute(module: nn.Module, name: str) -> str:
    return HOOKED if name == "forward" and HOOKED in module.__dict__ else name


def unbind(module: nn.Module) -> bool:
    """Take every method of ours off an instance, and say whether there was one."""
    found = False
    for attribute, value in list(module.__dict__.items()):
        if not is_ours(value):
            continue
        found = True
        if attribute == HOOKED:
            module.__dict__[attribute] = types.MethodType(getattr(type(module), getattr(value, MARK)), module)
        else:
            del module.__dict__[attribute]
    module.__dict__.pop(LAYER_INDEX, None)
    return found


def is_ours(value: object) -> bool:
    """Whether a bound method was made by :func:`bind`."""
    return isinstance(value, types.MethodType) and hasattr(value.__func__, MARK)


def _is_plain(module: nn.Module, name: str, value: object) -> bool:
    """The class's own method, bound and kept as an attribute: what unpickling or removing a hook leaves."""
    return isinstance(value, types.MethodType) and value.__func__ is getattr(type(module), name, None)
