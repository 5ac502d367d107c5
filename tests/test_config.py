"""Schema < YAML < key=value, and one clear line for whatever a user gets wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ldm_sg.annotate.features import FEATURES
from ldm_sg.autoencoder import FITS
from ldm_sg.config import CHOICES, CONFIG_ROOT, Config, check, differences, load_config, save_config, to_dict
from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, build_schedule

YAMLS = sorted(CONFIG_ROOT.glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "given.yaml"
    path.write_text(text)
    return path


def test_layers_come_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {lr: 1.0e-3, steps: 70}\nmodel: {multipliers: [1, 4]}\n")
    config = load_config(path, ["train.steps=80", "model.attention=[2,1]", "annotate.column=k7"])
    assert (config.train.lr, config.train.steps) == (1e-3, 80)
    assert (config.model.multipliers, config.model.attention) == ([1, 4], [2, 1])
    assert config.annotate.column == "k7"
    assert config.train.batch_size == Config().train.batch_size
    assert load_config(None) == Config()


def test_plain_dataclasses_come_out(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "model: {multipliers: [1, 2]}\n"))
    assert type(config) is Config
    assert type(config.model.multipliers) is list
    assert all(dataclasses.is_dataclass(getattr(config, f.name)) for f in dataclasses.fields(config))


@pytest.mark.parametrize(("text", "value"), [("none", None), ("null", None), ("[]", []), ("[8,4]", [8, 4])])
def test_attention_may_be_none(text: str, value: list[int] | None, tmp_path: Path) -> None:
    assert load_config(None, [f"model.attention={text}"]).model.attention == value
    assert load_config(written(tmp_path, f"model: {{attention: {text}}}\n")).model.attention == value


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_every_configuration_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_default_configurations_exist() -> None:
    assert {"elpv", "folder"} <= {p.stem for p in YAMLS}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.nope=1", ["train.nope"]),
        ("nope.lr=1", ["nope"]),
        ("train.steps=many", ["train.steps", "many"]),
        ("train.steps=1.5", ["train.steps", "1.5"]),
        ("train.steps=null", ["train.steps"]),
        ("model.multipliers=[1,wide]", ["model.multipliers", "wide"]),
        ("model.multipliers=3", ["model.multipliers"]),
        ("train=3", ["TrainConfig"]),
        ("train.lr", ["train.lr", "section.key=value"]),
        ("train.lr=[1", ["key=value", "expected ',' or ']'"]),
        ("sample.sampler=plms", ["sample.sampler", "plms", "ddim, ddpm, heun, dpm++2m"]),
        ("diffusion.schedule=sqrt", ["diffusion.schedule", "sqrt", "scaled_linear"]),
        ("diffusion.schedule=edm", ["diffusion.schedule", "diffusion.parameterisation=edm"]),
        ("train.drop_prob=1.5", ["train.drop_prob", "1.5", "0 to 1"]),
        ("train.lr=0", ["train.lr", "more than 0"]),
        ("train.lr=nan", ["train.lr", "nan"]),
        ("train.batch_size=-4", ["train.batch_size", "-4"]),
        ("train.log_every=0", ["train.log_every", "more than 0"]),
        ("train.checkpoint_every=0", ["train.checkpoint_every", "more than 0"]),
        ("annotate.batch_size=0", ["annotate.batch_size", "more than 0"]),
        ("sample.steps=0", ["sample.steps", "0", "more than 0"]),
        ("sample.steps=1001", ["sample.steps", "1001", "at most 1000"]),
        ("sample.scale=nan", ["sample.scale", "nan", "finite"]),
        ("vae.widths=[32,40]", ["vae.widths", "[32, 40]", "multiples of 32"]),
        ("vae.widths=[]", ["vae.widths", "multiples of 32"]),
        ("vae.kl_weight=-1", ["vae.kl_weight", "-1", "0 to"]),
    ],
)
def test_bad_overrides_are_one_line_that_names_them(override: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {nope: 1}", ["train.nope"]),
        ("train: {steps: many}", ["train.steps", "many"]),
        ("train: 3", ["given.yaml", "TrainConfig"]),
        ("train: [1", ["given.yaml", "line"]),
        ("- train\n- sample", ["given.yaml"]),
        ("words", ["words"]),
        ("3", ["given.yaml"]),
    ],
)
def test_bad_files_are_one_line_that_names_them(text: str, words: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_empty_file_is_the_schema(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == Config()


def test_missing_file_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration at .*none\.yaml; those in .*elpv, folder"):
        load_config(tmp_path / "none.yaml")


def test_check_sees_values_set_later() -> None:
    config = load_config(None)
    config.annotate.size_px = 0
    with pytest.raises(ValueError, match="size_px: got 0, expected more than 0"):
        check(config)


def test_differences_name_the_keys() -> None:
    a, b = load_config(None), load_config(None, ["train.lr=0.5", "model.attention=null", "sample.n=3"])
    assert differences(a, load_config(None)) == []
    assert differences(a, b) == [
        "model.attention: [8, 4] != None",
        "train.lr: 5e-05 != 0.5",
        "sample.n: 8 != 3",
    ]


def test_to_dict_is_a_copy() -> None:
    config = load_config(None)
    to_dict(config)["model"]["multipliers"].append(9)
    assert config == Config()


def test_choices_are_what_the_code_offers() -> None:
    assert set(CHOICES["sample.sampler"]) == set(SAMPLERS)
    assert set(CHOICES["diffusion.parameterisation"]) == set(PARAMETERISATIONS)
    for name in CHOICES["diffusion.schedule"]:
        build_schedule(name)
    assert Config().annotate.autoencoder in FITS
    assert Config().annotate.features in FEATURES
