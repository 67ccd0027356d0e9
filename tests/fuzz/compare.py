"""What one call does in an implementation, and whether it is what the reference does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rendseg
from rendseg import ops, reference
from tests.fuzz.calls import Call, Drawing, draw

EQUAL, REFUSED, TIE = "equal to the reference", "refused", "another choice at a tie"
IN_PLACE = "read in place, where the reference finds no memory for a copy"
GOOD = (EQUAL, REFUSED, TIE, IN_PLACE)
WRONG, DIFFERENT = "wrong value", "another outcome"
CLEAN = (ValueError, TypeError, IndexError, RuntimeError)
RESULTS = {"subdivide": 3, "uncertain_points": 2, "mask_losses": 2, "mask_costs": 2}
ARITHMETIC = {torch.float64: 1e-12, torch.float32: 2e-5}


def implementations(names: list[str]) -> dict[str, Callable[..., Any]]:
    """``run(name, arguments)`` of each; "compiled" is the public function, as a user calls it."""
    table: dict[str, Callable[..., Any]] = {}
    for name in names:
        if name == "compiled":
            table[name] = lambda op, arguments: getattr(ops, op)(**arguments)
        elif name == "triton":
            table[name] = _triton
        elif name == "emulated":
            from tests.emulation import as_backend

            assert as_backend._TAKEN
            table[name] = lambda op, arguments: getattr(ops, op)(**arguments)
        else:
            raise SystemExit(f"fuzz: there is no implementation {name}; choose compiled, emulated or triton")
    return table


def _triton(op: str, arguments: dict[str, Any]) -> Any:
    with rendseg.backend("triton"):
        return getattr(ops, op)(**arguments)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def outcome(run: Callable[[str, dict[str, Any]], Any], call: Call) -> tuple[list[Tensor | None], Exception | None]:
    """Results, with the gradients after them; or the exception."""
    torch.manual_seed(7)
    try:
        results = run(call.name, call.arguments)
        found = [results] if isinstance(results, Tensor) else list(results)
        inputs = [t for value in call.arguments.values() for t in _tensors(value) if t.requires_grad]
        wanted = [t for t in found if t is not None and t.requires_grad]
        if inputs and wanted:
            d = Drawing(11)
            grads = [torch.randn(t.shape, generator=d.generator).to(t.dtype) for t in wanted]
            found += torch.autograd.grad(wanted, inputs, grads, allow_unused=True)
        return found, None
    except Exception as error:
        return [], error


def judge(seed: int, run: Callable[[str, dict[str, Any]], Any], on_device: bool = False) -> tuple[str, str]:
    """The outcome of one seed and its words; ``on_device`` as a GPU: an assertion for an index, other draws."""
    call, other = draw(seed), draw(seed)
    before = None
    written = call.arguments.get("logits")
    if call.name == "scatter_points_" and isinstance(written, Tensor) and written.numel() < 1 << 20:
        before = written.detach().clone()
    found, error = outcome(run, call)
    wanted, refusal = outcome(lambda op, arguments: getattr(reference, op)(**arguments), other)
    if error is not None or refusal is not None:
        said = f"{_said(error)} | reference: {_said(refusal)}"
        no_memory = ("can't allocate memory", "Storage size calculation overflowed")
        if error is None and any(words in str(refusal) for words in no_memory):
            return IN_PLACE, said
        if on_device and (_asserted(call, error, refusal) or "has no kernel of" in str(error)):  # for meta tensors
            return REFUSED, ""
        if error is None or refusal is None:
            return DIFFERENT, said
        kinds = [next((k for k in CLEAN if isinstance(e, k)), None) for e in (error, refusal)]
        if None in kinds or "\n" in f"{error}{refusal}".strip():
            return DIFFERENT, said
        # A head that does not fit the maps speaks for itself where it is called.
        several = len(call.defects) > 1 or call.name == "refine" or _of_memory(error, refusal) or _written_leaf(call)
        if kinds[0] != kinds[1] and not several:
            return DIFFERENT, said
        if before is not None and before.device.type == "cpu" and not _same_bits(before, call.arguments["logits"]):
            return WRONG, f"written before it refused: {said}"
        return REFUSED, ""
    if on_device and call.arguments.get("random_coords", 0) is None:
        said = _differ_drawn(found, wanted, outcome(run, draw(seed))[0])
    else:
        said = _differ(call, found, wanted)
    if said and _at_a_tie(call, found, wanted):
        return TIE, said
    return (WRONG, said) if said else (EQUAL, "")


def _said(error: Exception | None) -> str:
    return "no error" if error is None else f"{type(error).__name__}: {str(error).strip()[:300]}"


def _asserted(call: Call, error: Exception | None, refusal: Exception | None) -> bool:
    """A GPU looks at an index where it uses it, so where there are no points at none."""
    if not isinstance(refusal, IndexError):
        return False
    if error is None:
        return any(not t.numel() for value in call.arguments.values() for t in _tensors(value))
    return isinstance(error, RuntimeError) and "must lie in" in str(error)


def _of_memory(*errors: Exception) -> bool:
    """Sizes beyond memory: which of its limits an implementation names is its own affair."""
    return any(word in str(e) for e in errors for word in ("memory", "overflow", "2^", "2**", "too large"))


def _written_leaf(call: Call) -> bool:
    """A leaf, or a view of one, is refused by autograd, in one implementation before the arguments are checked."""
    written = call.arguments.get("logits")
    if call.name != "scatter_points_" or not isinstance(written, Tensor) or not written.requires_grad:
        return False
    base = written._base if written._is_view() else written
    return base is not None and base.is_leaf


def _same_bits(a: Tensor, b: Any) -> bool:
    return (
        a.layout != torch.strided or torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def _wild(call: Call, *names: str) -> bool:
    """Whether the arguments, or those of these names, have infinities or numbers whose products have."""
    values = (value for name, value in call.arguments.items() if not names or name in names)
    tensors = [t.detach() for value in values for t in _tensors(value) if not t.is_meta]
    return any(t.is_floating_point() and not bool((t.abs() < 1e30).all()) for t in tensors)


def _differ(call: Call, found: list[Tensor | None], wanted: list[Tensor | None]) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} results, not {len(wanted)}"
    if found and found[0] is not None and not found[0].numel() and call.name != "subdivide":
        return ""  # its gradients are zeros, or NaN beside infinities
    gradients = len(found) - RESULTS.get(call.name, 1)
    if gradients and _wild(call):  # what overflows, and which infinities meet, depends on the order of a sum
        found, wanted = found[: len(found) - gradients], wanted[: len(wanted) - gradients]
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        if got is None or want is None:
            if got is not want and (want if got is None else got).any():  # no gradient is a gradient of zero
                return f"result {i}: one is None"
            continue
        if got.shape != want.shape or got.dtype != want.dtype or got.device != want.device:
            return f"result {i}: {got.dtype}{list(got.shape)}, not {want.dtype}{list(want.shape)}"
        if got.is_meta or not got.numel():
            continue
        cut = {"mask_losses": (), "mask_costs": (), "aggregate": (), "refine": ("features",)}.get(call.name)
        if cut is not None and _wild(call, *cut):
            continue  # which of their sums overflows depends on how it is cut into parts
        got, want = got.detach(), want.detach()
        if not got.is_floating_point():
            if not torch.equal(got, want):
                return f"result {i}: {int((got != want).sum())} of {got.numel()} integers differ"
            continue
        summed = call.name in ("scaled_l2", "aggregate", "encode", "refine") and _wild(call)
        for kind in ("finite",) if summed else ("nan", "inf"):
            there = getattr(got, f"is{kind}")() != getattr(want, f"is{kind}")()
            if there.any():
                return f"result {i}: {int(there.sum())} of {got.numel()} are {kind} in one of the two only"
        compute = torch.float64 if want.dtype == torch.float64 else torch.float32
        wide = want.double().nan_to_num(0, 0, 0)
        least = 0.1 if i >= len(found) - gradients else 1e-3  # a gradient may be what is left of larger terms
        bound = 4 * (ARITHMETIC[compute] + torch.finfo(want.dtype).eps) * max(float(wide.abs().max()), least)
        off = float((got.double().nan_to_num(0, 0, 0) - wide).abs().max())
        if off > bound:
            return f"result {i}: off by {off:.3g}, more than {bound:.3g}"
    return ""


def _differ_drawn(found: list[Tensor | None], wanted: list[Tensor | None], again: list[Tensor | None]) -> str:
    """For points of other random numbers: on the map, and the same from the same seed."""
    (points,), (like,), (repeated,) = found, wanted, again
    assert points is not None and like is not None and repeated is not None
    if points.shape != like.shape or points.dtype != like.dtype or points.device != like.device:
        return f"{points.dtype}{list(points.shape)}, not {like.dtype}{list(like.shape)}"
    if points.is_meta:
        return ""
    if not bool(((points >= 0) & (points <= 1)).all()):
        return "points outside the map"
    return "" if torch.equal(points, repeated) else "other points from the same seed"


def _at_a_tie(call: Call, found: list[Tensor | None], wanted: list[Tensor | None]) -> bool:
    """Whether the two differ only because margins that are equal but for rounding were ordered in another way."""
    arguments = call.arguments
    if call.name == "subdivide":
        return _selects_from(found, arguments) and (found[0] is None or not _differ(call, found[:1], wanted[:1]))
    if call.name == "sample_uncertain_points":
        logits, images = arguments["logits"].detach(), arguments["image_index"]
        scores = [
            reference.uncertainty(
                reference.point_sample(
                    (logits if images is None else logits[images]).double(),
                    points,
                    padding_mode=arguments["padding_mode"],
                    align_corners=arguments["align_corners"],
                ).unsqueeze(-1),
                arguments["class_index"],
            ).flatten(1).sort(1).values
            for points in (found[0].clamp(-3, 3), wanted[0].clamp(-3, 3))
            if points is not None
        ]  # fmt: skip
        eps = torch.finfo(logits.dtype).eps
        size = float(logits.double().nan_to_num(0, 0, 0).abs().max())
        return torch.allclose(*scores, rtol=0, atol=8 * (eps + 1e-6) * max(size, 1e-3), equal_nan=True)
    if call.name == "refine":
        # Ties: the reference too goes elsewhere when the coarse logits change in their last bits.
        eps = torch.finfo(arguments["coarse"].dtype).eps
        for seed in range(6):
            noise = torch.rand(arguments["coarse"].shape, generator=torch.Generator().manual_seed(seed)) - 0.5
            shaken = arguments["coarse"].double() * (1 + 4 * max(eps, 1e-7) * noise)
            again = reference.refine(**{**arguments, "coarse": shaken.to(arguments["coarse"].dtype)})
            if _differ(call, [again], wanted):
                return True
    return False


def _selects_from(found: list[Tensor | None], arguments: dict[str, Any]) -> bool:
    """Whether the selection of ``subdivide`` is that of its own map, exactly."""
    fine = found[0]
    if fine is None or found[1] is None:
        rest = {**arguments, "return_logits": True}
        fine = ops.subdivide(**rest)[0]
    assert fine is not None and found[1] is not None
    chosen = reference.uncertain_points(fine.detach(), arguments["num_points"], arguments["class_index"])
    return torch.equal(chosen[0], found[1])
