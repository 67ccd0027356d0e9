"""What every op file shares: registration of the Python side of an operator, and the choice of backend per call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from .. import _backends, _extension
from . import _triton
from .schemas import SCHEMAS, with_defaults

# Kept with the operators that it declares, not with this module: where the modules of rendseg were removed from
# sys.modules, a second import takes its place.
_previous = vars(torch.ops.rendseg).get("_library")
if _previous is not None:
    _previous._destroy()
_LIBRARY = library.Library("rendseg", "FRAGMENT" if _extension.LOADED else "DEF")
torch.ops.rendseg._library = _LIBRARY  # type: ignore[attr-defined]

if not _extension.LOADED:
    for _schema in SCHEMAS:
        _tags = (torch.Tag.nondeterministic_seeded,) if _schema.startswith("sample_uncertain_points") else ()
        _LIBRARY.define(_schema, tags=_tags)

# (operator, device type) with a compiled kernel; with a Triton kernel because there is none compiled; with a Triton
# kernel because backend("triton") is in force.
_COMPILED: set[tuple[str, str]] = set()
_FALLBACK: set[tuple[str, str]] = set()
_FORCED: set[tuple[str, str]] = set()


def register(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Register the Python side of ``rendseg::<name>``.

    ``reference`` serves every device for which neither a compiled nor a Triton kernel exists; ``fake`` gives shapes and
    dtypes and makes the same checks; both are called with every argument of the schema. ``backward`` and
    ``setup_context`` are those of PyTorch's ``register_autograd``.
    """
    reference, fake = with_defaults(name, reference), with_defaults(name, fake)
    _LIBRARY.impl(name, _announced(reference), "CompositeExplicitAutograd")
    library.register_fake(f"rendseg::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        library.register_autograd(f"rendseg::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    for device_type in ("cpu", "cuda"):
        if _backends.has_kernel(name, device_type):
            _COMPILED.add((name, device_type))
    if (name, "cuda") not in _COMPILED and _backends.triton_installed() and name in _backends.triton_ops():
        _LIBRARY.impl(name, _triton.or_reference(name, reference), "CUDA")
        _backends.FALLBACKS.add((name, "CUDA"))
        _FALLBACK.add((name, "cuda"))


def _announced(reference: Callable[..., Any]) -> Callable[..., Any]:
    """``reference``, with a warning at the first call if kernels could have been built."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensor = _triton.first_tensor(args)
        if tensor is not None:
            _backends.warn_of_reference(tensor.device.type)
        return reference(*args, **kwargs)

    return kernel


def impl(name: str, function: Callable[..., Any], key: str) -> None:
    """Register ``function`` for one dispatch key (autocast, in-place autograd)."""
    _LIBRARY.impl(name, function, key)


def use_reference(name: str, tensor: Tensor) -> bool:
    """Whether this call goes straight to ``rendseg.reference`` (differentiable plain PyTorch): by the backend, or
    inside transforms of ``torch.func``.

    Raises ``RuntimeError`` when a backend asked for by name has no kernel of ``name`` for the device of ``tensor``.
    """
    chosen = _backends._STATE.name
    if chosen != "reference" and not torch.compiler.is_compiling() and _transformed():
        if chosen != "auto":
            raise RuntimeError(
                f'backend "{chosen}" has no transforms of torch.func and no forward-mode derivatives: use '
                'set_backend("auto"), which runs plain PyTorch there'
            )
        return True
    if chosen == "auto":
        return False
    if _backends._STATE.error:
        raise RuntimeError(_backends._STATE.error)
    if chosen == "reference":
        return True
    if chosen == "cpp" and (name, tensor.device.type) not in _COMPILED:
        raise RuntimeError(
            f'backend "cpp" has no kernel of {name} for device {tensor.device}: this build holds none. '
            'Use set_backend("auto") or move the tensors to the CPU'
        )
    if chosen == "triton" and (name, tensor.device.type) not in _FORCED:
        raise RuntimeError(_triton.missing(name, tensor.device))
    return False


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is in progress, which kernels do not know:
    they would return without a tangent."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def has_kernel(name: str, tensor: Tensor) -> bool:
    """Whether a kernel, and not the reference, serves ``rendseg::<name>`` for ``tensor`` under the setting in force."""
    chosen, key = _backends._STATE.name, (name, tensor.device.type)
    if chosen == "triton":
        return key in _FORCED
    return chosen != "reference" and (key in _COMPILED or (chosen == "auto" and key in _FALLBACK))


class _Route:
    """The overrides of ``backend("triton")``: installed when it is asked for, taken away afterwards."""

    def __init__(self) -> None:
        self.overrides: Any = None

    def __call__(self, chosen: str) -> None:
        if chosen == "triton" and self.overrides is None:
            self.overrides = library.Library("rendseg", "IMPL")
            for schema in SCHEMAS:
                name = schema.split("(", 1)[0]
                for device_type in _backends.backends["triton"].devices:
                    key = _backends.KEYS[device_type]
                    self.overrides.impl(name, _triton.forced(name), key, allow_override=True)
                    if name in _backends.triton_ops():
                        _FORCED.add((name, device_type))
        elif chosen != "triton" and self.overrides is not None:
            _FORCED.clear()
            self.overrides._destroy()  # what was there before serves again
            self.overrides = None


_ROUTE = _Route()
_backends.ON_CHANGE.append(_ROUTE)
_ROUTE("auto" if _backends._STATE.error else _backends._STATE.name)
