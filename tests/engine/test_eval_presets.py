"""``eval.preset``: what it sets, what wins over it, and what is said about mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rendseg.cli import main
from rendseg.engine import eval_presets
from rendseg.engine.config import ConfigError, EvalConfig, build_config
from rendseg.engine.eval_presets import CONVENTIONS, PRESETS
from tests.engine.tiny import tiny_config, tiny_content


def test_presets_are_complete_and_valid() -> None:
    keys = set(PRESETS["rendseg"])
    for name, values in PRESETS.items():
        assert set(values) == keys <= set(EvalConfig.__pydantic_fields__)
        options = EvalConfig(preset=name)
        assert {key: getattr(options, key) for key in keys} == values
        assert options.scales == [1.0] and options.window is None and options.base_size is None
    defaults = {key: EvalConfig.__pydantic_fields__[key].default for key in keys}
    assert defaults == PRESETS["rendseg"]


def test_the_table_in_the_docstring_is_the_code() -> None:
    lines = (eval_presets.__doc__ or "").splitlines()
    names = next(line for line in lines if line.startswith("key ")).split()[1:]
    text = "\n".join(lines).replace("ignore_      ", "ignore_without_label ")
    for key in PRESETS["rendseg"]:
        row = next(line for line in text.splitlines() if line.startswith(f"{key} "))
        cells = [cell for cell in row.split()[1:] if not cell.startswith("(")]
        assert cells == [str(PRESETS[name][key]).lower() for name in names], key


def test_explicit_keys_win_and_the_rest_round_trips(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "eval.preset=paddleseg", "eval.absent=skip", "eval.scales=0.5", "eval.window=33")
    assert config.eval.absent == "skip" and config.eval.chain_scales is True and config.eval.merge == "softmax"
    assert config.eval.scales == [0.5] and config.eval.window == [33, 33] and config.eval.stride == [22, 22]
    assert build_config(config.to_dict()) == config
    content = tiny_content(tmp_path)
    content["eval"].update(preset="pytorch_encoding", flip=False, window_stride=[5, 4], window=[5, 9])
    options = build_config(content).eval
    assert options.merge == "exp" and not options.flip and options.stride == [5, 4]
    assert EvalConfig(window=[1, 2]).stride == [1, 1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its own configuration has conventions, too."""
    from rendseg.engine.train import train

    options = ["eval.preset=mmseg", "eval.merge=logits", "eval.base_size=[64,48]", "eval.window=24", "eval.pictures=0"]
    config = tiny_config(tmp_path_factory.mktemp("presets"), *options, "eval.limit=1", iterations=1)
    train(config)
    return config.run_dir / "last.pt"


def test_a_preset_given_later_decides_all_conventions(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def conventions(*arguments: str) -> dict:
        assert main(["eval", str(checkpoint), *arguments, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
        return json.loads((tmp_path / "metrics.json").read_text())["conventions"]

    stored = conventions()
    assert (stored["preset"], stored["merge"], stored["base_size"]) == ("mmseg", "logits", [64, 48])
    assert stored["window"] == [24, 24]
    for arguments in (["--preset", "paddleseg"], ["eval.preset=paddleseg"]):
        found = conventions(*arguments, "eval.scales=[0.5,1]")
        assert {key: found[key] for key in PRESETS["paddleseg"]} == PRESETS["paddleseg"]
        assert found["base_size"] is None and found["window"] == [24, 24] and found["scales"] == [0.5, 1.0]
    found = conventions("eval.absent=zero", "--preset", "detectron2", "eval.merge=softmax")
    assert (found["absent"], found["merge"], found["rounding"]) == ("zero", "softmax", "short_side")
    assert set(CONVENTIONS) <= set(found)


@pytest.mark.bad_input
def test_bad_preset_on_the_command_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(checkpoint), "--preset", "mmsegmentation"]) == 2
    line = capsys.readouterr().err.strip()
    assert (
        line.startswith("rendseg: eval.preset on the command line must be one of rendseg, mmseg") and "\n" not in line
    )
    assert line.endswith(", got 'mmsegmentation'; did you mean 'mmseg'?")
    assert main(["eval", str(checkpoint), "eval.window=48", "eval.window_stride=[48,49]"]) == 2
    assert "window_stride [48, 49] exceeds window [48, 48] in width" in capsys.readouterr().err


BAD = [
    (["eval.preset=Paddle"], "got 'Paddle'; did you mean 'paddleseg'?"),
    (["eval.preset=detectron"], "did you mean 'detectron2'?"),
    (["eval.preset=7"], "must be one of rendseg, mmseg, paddleseg, detectron2, pytorch_encoding, got 7"),
    (["eval.preset=[mmseg]"], "must be one of rendseg"),
    (["eval.window=0"], "eval.window on the command line: must be [height, width] or one number, whole and at least 1"),
    (["eval.window=[8, -8]"], "at least 1, got [8, -8]"),
    (["eval.window=[8]"], "at least 1, got [8]"),
    (["eval.window=[8.5, 8]"], "at least 1, got [8.5, 8]"),
    (["eval.window=true"], "at least 1, got True"),
    (["eval.window=big"], "at least 1, got 'big'"),
    (["eval.window_stride=8"], "window_stride needs window: [height, width]"),
    (["eval.window=8", "eval.window_stride=0"], "eval.window_stride on the command line: must be [height, width]"),
    (["eval.window=8", "eval.window_stride=9"], "window_stride [9, 9] exceeds window [8, 8] in height: pixels between"),
    (["eval.scales=[]"], "eval.scales on the command line: list should have at least 1 item"),
    (["eval.scales=[1, 0]"], "eval.scales on the command line must be positive, got [1, 0]"),
    (["eval.scales=[-0.5]"], "must be positive, got [-0.5]"),
    (["eval.scales=[.inf]"], "must be finite, got [inf]"),
    (["eval.scales=half"], "eval.scales on the command line must be a list of a number, got 'half'"),
    (["eval.merge=mean"], "must be one of softmax, logits, exp, got 'mean'"),
    (["eval.absent=nan"], "must be one of skip, ignore_without_label, zero, one, got 'nan'"),
    (["eval.align_corners=2"], "must be one of True, False, model, got 2"),
    (["eval.image_resize=cubic"], "must be one of bilinear, aligned, antialias, got 'cubic'"),
    (["eval.rounding=floor"], "must be one of half_up, mmcv, long_side, short_side, got 'floor'"),
    (["eval.window_border=reflect"], "must be one of shift, pad, got 'reflect'"),
    (["eval.base_size=520"], "base_size 520 has no meaning with rounding: half_up; use mmcv, long_side or short_side"),
    (["eval.preset=mmseg", "eval.base_size=520"], "base_size must be [long, short] with rounding: mmcv, got 520"),
    (["eval.preset=detectron2", "eval.base_size=[9, 8]"], "base_size must be one number with rounding: short_side"),
    (["eval.base_size=[1, 2, 3]"], "must be one number or [long, short], whole and at least 1, got [1, 2, 3]"),
    (["eval.max_size=4096"], "max_size needs rounding: short_side, got rounding: half_up"),
    (["eval.scale_divisor=0"], "eval.scale_divisor on the command line must be at least 1, got 0"),
    (["eval.flip=sometimes"], "eval.flip on the command line must be true or false, got 'sometimes'"),
    (["eval.windows=[8, 8]"], "unknown key 'eval.windows' on the command line; did you mean 'eval.window'?"),
    (["eval.scale=[1]"], "did you mean 'eval.scales'?"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[" ".join(o) for o, _ in BAD])
def test_bad_options(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_config(tmp_path, *overrides)
    assert message in str(raised.value) and "\n" not in str(raised.value)
