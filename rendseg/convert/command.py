"""``rendseg convert``: weights of other frameworks to a checkpoint of rendseg, and back."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rendseg import __version__
from rendseg.data.folder import distinct_colors
from rendseg.engine.assemble import build_network
from rendseg.engine.checkpoint import FORMAT, load_checkpoint, save_checkpoint, write_atomically
from rendseg.engine.config import build_config, override_mapping

from .containers import Source, read
from .engine import DETECTOR, Model, class_list, configure, gather, identify, nested, source_config
from .errors import ConversionError
from .registry import FORMATS, NORMALIZATIONS, Format, load_format
from .rules import Applied, apply, matched, split
from .source_config import read_config

TARGETS = ("rendseg", "safetensors", "mmseg", "transformers")
_SUFFIXES = {"rendseg": ".pt", "safetensors": ".safetensors", "mmseg": ".pth", "transformers": ".safetensors"}


class Result(NamedTuple):
    """What was converted."""

    out: Path
    tensors: int
    dead: int
    seconds: float
    fresh: int = 0
    """Tensors of ours that begin with random weights."""


def convert(
    sources: Sequence[Path],
    format_name: str | None = None,
    *,
    config: Path | None = None,
    out: Path | None = None,
    to: str = "rendseg",
    normalize: str | None = None,
    overrides: Sequence[str] = (),
    check: bool = False,
) -> Result:
    """Convert ``sources`` and write ``out``. ``overrides`` are keys of the resulting configuration.

    Raises:
        ConversionError, CheckpointError, ConfigError: in one line, what is wrong and what to do.
    """
    began = time.monotonic()
    if to not in TARGETS:
        raise ConversionError(f"--to must be one of {', '.join(TARGETS)}, got {to!r}")
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise ConversionError(f"--normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
    first = Path(sources[0])
    fresh: tuple[str, ...] = ()
    out = out or Path(first.stem if first.is_file() else first.resolve().name).with_suffix(_SUFFIXES[to])
    if out.exists() and any(Path(source).exists() and out.samefile(source) for source in sources):
        raise ConversionError(f"{out} is the source itself: give another file with --out")
    if format_name in (None, "rendseg"):
        contents = _own(first, format_name, overrides)
        count, dead = len(contents["model"]), 0
    else:
        assert format_name is not None
        loaded = [read(path) for path in sources]
        found = identify(gather(loaded, format_name), format_name, first)
        given = override_mapping({}, overrides)[0]
        keys: dict[str, Any] = {**NORMALIZATIONS.get(normalize or "", {}), **_dotted(given)}  # type: ignore[dict-item]
        foreign = read_config(config) if config is not None else source_config(loaded)
        contents = _contents(found, loaded, foreign, keys, first)
        count, dead, fresh = len(found.theirs), len(found.applied.dead), found.model.fresh
        if check:
            _check_round_trip(found, first)
    network = _network(contents, first, fresh)
    if check:
        _check_forward(network, contents, first)
    _write(out, to, contents)
    begun = [name for name in contents["model"] if _is_fresh(name, fresh)]
    return Result(out, count, dead, time.monotonic() - began, len(begun))


def _is_fresh(name: str, patterns: Sequence[str]) -> bool:
    return any(matched(pattern, name) is not None for pattern in patterns)


def _dotted(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in section.items():
        keys |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return keys


# ------------------------------------------------------------------------------------------------- to a checkpoint


def _contents(
    found: Model, sources: Sequence[Source], foreign: Mapping[str, Any] | None, given: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The contents of a checkpoint, whose network has been built and filled once."""
    keys, count = configure(found, foreign, given, path)
    names, palette = class_list(sources, foreign, count)
    ids: list[int] | None = None
    if keys.get("model.name") == DETECTOR:
        data, names, palette, ids = _object_data(keys, names, palette, count)
    else:
        data, names, palette = _data(keys, names, palette, count)
    sections = nested({key: value for key, value in keys.items() if not key.startswith("data.")})
    settings = {
        "name": "converted",
        "train": {"iterations": 1},
        **sections,
        "data": {**data, **nested({k: v for k, v in keys.items() if k.startswith("data.")}).get("data", {})},
    }
    config = build_config(settings, source=f"what is known of {path}")
    return {
        "rendseg": __version__,
        "config": config.to_dict(),
        "classes": {"names": names, "palette": palette, "ignore_index": 255, **({"ids": ids} if ids else {})},
        "model": found.applied.tensors,
        "training": {"progress": {"iteration": 0}},
    }


def _data(
    keys: Mapping[str, Any], names: list[str] | None, palette: Any, count: int
) -> tuple[dict[str, Any], list[str], list[list[int]]]:
    """The section ``data``, and names and colours of the classes: the source's own, else those of ``data.name``."""
    chosen = keys.get("data.name")
    known = _known_classes()
    if chosen in known and names is None:
        if len(known[chosen][0]) != count:
            raise ConversionError(
                f"data.name: {chosen} has {len(known[chosen][0])} classes, the model {count}: name another, or none"
            )
        names, palette = known[chosen]
    if names is None:
        names = [f"class {index}" for index in range(count)]
    if chosen is None:
        plain = [name.casefold() for name in names]
        chosen = next((name for name, (own, _) in known.items() if [n.casefold() for n in own] == plain), "folder")
    if not _is_palette(palette, count):
        palette = known[chosen][1] if chosen in known else distinct_colors(count).tolist()
    palette = [[int(value) for value in color] for color in palette]
    if chosen != "folder":
        return {"name": chosen}, names, palette
    if len(set(names)) < count:
        names = [f"{name} {index}" if names.count(name) > 1 else name for index, name in enumerate(names)]
    whole = {} if count > 255 else {"classes": names, "palette": palette}
    return {"name": "folder", "root": ".", **whole}, names, palette


def _object_data(
    keys: Mapping[str, Any], names: list[str] | None, palette: Any, count: int
) -> tuple[dict[str, Any], list[str], list[list[int]], list[int] | None]:
    """As ``_data``, of objects, and the categories of results where they are known. Without a name it is a data set in
    COCO's form."""
    from rendseg.data.cityscapes_instances import IDS, NAMES
    from rendseg.data.coco import CATEGORIES

    every = {number: CATEGORIES.get(number, f"category {number}") for number in range(1, 91)}  # torchvision's rows
    known = {"coco": (CATEGORIES, every), "cityscapes_instances": (dict(zip(IDS, NAMES, strict=True)),)}
    chosen, ids = keys.get("data.name"), None
    for name, several in known.items():
        for categories in several:
            same = names is not None and [n.casefold() for n in names] == [*categories.values()]
            if len(categories) == count and (same or (names is None and chosen == name)):
                chosen, ids, names = chosen or name, list(categories), names or list(categories.values())
    if names is None:
        names = [f"class {index + 1}" for index in range(count)]
    if not _is_palette(palette, count):
        palette = distinct_colors(count + 1)[1:].tolist()
    return {"name": chosen or "coco", "root": "."}, names, [[int(v) for v in color] for color in palette], ids


def _is_palette(palette: Any, count: int) -> bool:
    if isinstance(palette, Tensor):
        palette = palette.tolist()
    return (
        isinstance(palette, (list, tuple))
        and len(palette) == count
        and all(
            isinstance(color, (list, tuple)) and len(color) == 3 and all(0 <= int(v) <= 255 for v in color)
            for color in palette
        )
    )


def _known_classes() -> dict[str, tuple[list[str], list[list[int]]]]:
    """Names and colours of the public data sets."""
    from rendseg.data import ade20k, camvid, cityscapes, voc

    colors = [list(bytes.fromhex(color)) for color in ade20k._COLORS]
    return {
        "cityscapes": (list(cityscapes.CLASSES), [list(c) for c in cityscapes.CLASSES.values()]),
        "ade20k": (ade20k.CLASSES, colors),
        "voc": (list(voc.CLASSES), distinct_colors(len(voc.CLASSES)).tolist()),
        "camvid": (list(camvid.CLASSES), [list(c) for c in camvid.CLASSES.values()]),
    }


def _network(contents: dict[str, Any], path: Path, fresh: Sequence[str] = ()) -> nn.Module:
    """The network of a checkpoint's contents, whose tensors it fills exactly; ``contents`` get what counts batches, and
    the same random weights each time where names fit ``fresh``."""
    config = build_config(contents["config"], source=f"what is known of {path}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(config, len(contents["classes"]["names"]), initialise=False).eval()
    own, state = network.state_dict(), contents["model"]
    state |= {name: tensor for name, tensor in own.items() if name not in state and _is_fresh(name, fresh)}
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise ConversionError(f"{path} lacks {len(missing)} tensors of the network, first {missing[0]}")
    # A frozen norm counts no batches.
    left = [name for name in state if name not in own and not name.endswith("num_batches_tracked")]
    if left:
        raise ConversionError(f"{path} holds {len(left)} tensors that the network does not have, first {left[0]}")
    filled = {name: state.get(name, torch.zeros_like(like)) for name, like in own.items()}
    for name, tensor in filled.items():
        if tensor.shape != own[name].shape:
            raise ConversionError(
                f"{path}: {name} has shape {list(tensor.shape)}, the network that was inferred {list(own[name].shape)}"
            )
    network.load_state_dict(filled)
    contents["model"] = filled
    return network


def _own(path: Path, format_name: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """A checkpoint of rendseg, or what ``--to safetensors`` wrote of one."""
    if path.suffix == ".safetensors" and format_name == "rendseg":
        source = read(path)
        try:
            described = json.loads(source.rest[FORMAT])
            contents = {**described, "model": source.tensors, "training": {"progress": {"iteration": 0}}}
        except (KeyError, ValueError, TypeError):
            raise ConversionError(f"{path} was not written by rendseg: name its framework with --from") from None
    else:
        if format_name is None and not _is_checkpoint(path):
            raise ConversionError(
                f"{path} is no checkpoint of rendseg: name its framework with --from {' | '.join(FORMATS)}"
            )
        contents = load_checkpoint(path)
    contents["config"] = build_config(contents["config"], overrides, source=str(path)).to_dict()
    return contents


def _is_checkpoint(path: Path) -> bool:
    source = read(path)
    return source.rest.get("format") == FORMAT


# ---------------------------------------------------------------------------------------------------- the checks


def _check_round_trip(found: Model, path: Path) -> None:
    """Every tensor of the source comes back from ours, bit for bit, where nothing was folded or widened; and what came
    back gives ours again."""
    rules, ours = found.format.rules(found.model, found.backbone), found.applied.tensors
    back = split(rules, ours, path)
    if back.left:
        raise ConversionError(f"{path}: {back.left[0]} has no name in the source's format")
    changed = {name.rpartition(".")[0] for name in found.theirs if name not in back.tensors}  # bias before a norm
    for name, tensor in back.tensors.items():
        source = found.theirs.get(name)
        if name.endswith(("running_mean", "num_batches_tracked")) and changed:
            continue
        if source is None or not torch.equal(tensor.to(source.dtype), source):
            raise ConversionError(f"{path}: {name} does not come back as it was")
    again = apply(rules, (), back.tensors, path).tensors
    wrong = [name for name, tensor in ours.items() if name not in again or not torch.equal(again[name], tensor)]
    if wrong:
        raise ConversionError(f"{path}: {wrong[0]} changes when it is converted again")


@torch.no_grad()
def _check_forward(network: nn.Module, contents: Mapping[str, Any], path: Path) -> None:
    """A forward pass on noise gives finite logits, or boxes and masks, of the image's size."""
    channels = contents["config"]["model"]["backbone"]["in_chans"]
    images = torch.randn(1, channels, 97, 129, generator=torch.Generator().manual_seed(0))
    if contents["config"]["model"]["name"] == DETECTOR:
        found = network(list(images))[0]
        if found["masks"].shape[-2:] != images.shape[-2:] or not torch.isfinite(found["boxes"]).all():
            shape = list(found["masks"].shape)
            raise ConversionError(f"{path}: a forward pass gives {shape} masks, or boxes that are not finite")
        return
    refined = network.predict(images).refined  # type: ignore[operator]
    if refined.shape[-2:] != images.shape[-2:] or not torch.isfinite(refined).all():
        raise ConversionError(f"{path}: a forward pass gives {list(refined.shape)} logits, or not finite ones")


# -------------------------------------------------------------------------------------------------------- writing


def _write(out: Path, to: str, contents: dict[str, Any]) -> None:
    if to == "rendseg":
        save_checkpoint(out, contents)
        return
    state = contents["model"]
    described = {key: contents[key] for key in ("config", "classes", "rendseg") if key in contents}
    if to == "safetensors":
        _write_safetensors(out, state, {FORMAT: json.dumps(described)})
        return
    form = load_format(to)
    section = contents["config"]["model"]
    tensors = _theirs(form, to, state, section["name"] if section["name"] == DETECTOR else section["decoder"]["name"])
    if to == "transformers":
        _write_safetensors(out, tensors, {"format": "pt"})
        return
    meta = {"CLASSES": contents["classes"]["names"], "PALETTE": contents["classes"]["palette"]}
    dataset = {key.lower(): value for key, value in meta.items()}
    saved = {"meta": {**meta, "dataset_meta": dataset}, "state_dict": tensors}
    try:
        write_atomically(out, lambda file: torch.save(saved, file))
    except OSError as error:
        raise ConversionError(f"could not write {out}: {error.strerror or error}") from None


def _theirs(form: Format, to: str, state: Mapping[str, Tensor], decoder: str) -> dict[str, Tensor]:
    """Our tensors under the names of a framework."""
    best: Applied | None = None
    for model in form.models:
        for backbone in form.backbones:
            result = split(form.rules(model, backbone), state, decoder)
            left = [name for name in result.left if not name.endswith("num_batches_tracked")]
            if best is None or len(left) < len(best.left):
                best = result._replace(left=left)
    assert best is not None
    if best.left:
        raise ConversionError(
            f"--to {to} has no name for {len(best.left)} tensors of this {decoder}, first {best.left[0]}"
        )
    return best.tensors


def _write_safetensors(out: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    try:
        write_atomically(out, lambda file: file.write(data))  # type: ignore[arg-type, return-value]
    except OSError as error:
        raise ConversionError(f"could not write {out}: {error.strerror or error}") from None
