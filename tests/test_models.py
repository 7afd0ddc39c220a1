"""Model registry and the tiny BERT folder: made whole, made alike, and read by OpenCLIP without a warning."""

import json
import logging
import random
import warnings
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from forks import start_ranks

from openclip_otco.models import folder as towers
from openclip_otco.models import registry as models
from openclip_otco.models.bert_tiny import FILES, broken_file, make_bert_tiny, vocabulary
from openclip_otco.scenes.caption import describe
from openclip_otco.scenes.scene import draw_scene

TINY = "RN10t-bert-tiny"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "tiny"
    make_bert_tiny(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(towers.HOME, str(tmp_path / "home"))
    monkeypatch.delenv(towers.BERT, raising=False)
    models.register_models()
    return tmp_path / "home"


def test_a_folder_made_twice_is_the_same_and_the_callers_random_stream_stays(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make_bert_tiny(tmp_path / "again")
    make_bert_tiny(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(path.name for path in made.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert (made / "model.safetensors").read_bytes() != (tmp_path / "other/model.safetensors").read_bytes()


def _make(rank: int, world: int, target: Path) -> None:
    make_bert_tiny(target)


def test_two_processes_may_make_one_folder(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    start_ranks(_make, 2, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(FILES)
    assert all((target / name).read_bytes() == (made / name).read_bytes() for name in FILES)


def test_the_vocabulary_covers_scenes_and_ordinary_captions(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(made))
    tokens = vocabulary()
    assert len(tokens) == len(set(tokens)) == len(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    rng = random.Random(0)
    for _ in range(500):
        caption = describe(draw_scene(rng), rng)
        numbers = tokenizer(caption).input_ids
        assert tokenizer.unk_token_id not in numbers
        assert len(numbers) <= 32
        pieces = tokenizer.convert_ids_to_tokens(numbers)
        assert not any(piece.startswith("##") for piece in pieces)  # every word of a scene is one token
        assert tokenizer.decode(numbers, skip_special_tokens=True).replace(" ", "") == caption.lower().replace(" ", "")
    photo = "Two young men in green T-shirts are playing an unusual game of frisbee near the skateboarders' half-pipe."
    numbers = tokenizer(photo).input_ids
    assert tokenizer.unk_token_id not in numbers
    assert len(numbers) <= 32


@pytest.mark.parametrize("name", FILES)
def test_a_broken_folder_is_seen_and_made_whole(name: str, home: Path) -> None:
    folder = towers.bert_tiny_folder()
    assert folder.parent == home
    line = models.check_model(TINY)
    assert line is not None
    assert str(folder) in line
    models.prepare_model(TINY)
    assert models.check_model(TINY) is None
    whole = (folder / name).read_bytes()
    if name in ("vocab.txt", "tokenizer_config.json"):
        return  # tokenizer.json alone is enough for a tokenizer
    (folder / name).write_bytes(whole[: len(whole) // 2] if name != "tokenizer.json" else b"")
    if name == "tokenizer.json":
        (folder / "vocab.txt").unlink()
    assert broken_file(folder) == name
    line = models.check_model(TINY)
    assert line is not None
    assert name in line
    models.prepare_model(TINY)
    assert models.check_model(TINY) is None
    assert (folder / name).read_bytes() == whole


def test_the_tiny_model_runs_through_openclip_in_silence(
    home: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    models.prepare_model(TINY)
    capfd.readouterr()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model = open_clip.create_model(TINY)
        tokenizer = open_clip.get_tokenizer(TINY)
        texts = tokenizer(["a small red circle left of a big blue ring", "A dog runs."])
        with torch.no_grad():
            image, text, scale = model.eval()(torch.zeros(2, 3, 64, 64), texts)
    # OpenCLIP's own line for every model that has weights for one tower only.
    assert [r.getMessage() for r in caplog.records] in ([], [f"Model {TINY} initialized partially."])
    told = capfd.readouterr()
    assert "newly initialized" not in told.out + told.err
    assert "UNEXPECTED" not in told.out + told.err
    assert image.shape == text.shape == (2, model.visual.head.proj.out_features)
    assert texts.shape == (2, 32)
    assert torch.isfinite(image).all()
    assert scale > 1
    assert not torch.equal(text[0], text[1])


def test_registering_is_idempotent_and_holds_from_any_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models.register_models()
    first = open_clip.get_model_config(TINY)
    models.register_models()
    assert open_clip.get_model_config(TINY) == first
    assert Path(first["text_cfg"]["hf_model_name"]).is_absolute()
    assert not home.exists()  # registering writes nothing
    assert set(models.model_configs()) <= set(open_clip.list_models())


@pytest.mark.parametrize("name", ["RN50", "RN18", "EfficientNet-B3"])
def test_the_vision_towers_of_the_big_models_build(name: str, home: Path) -> None:
    config = open_clip.get_model_config(f"{name}-bert-base-uncased")
    from open_clip.timm_model import TimmModel

    vision = config["vision_cfg"]
    assert vision["timm_model_name"] in timm.list_models()
    tower = TimmModel(
        vision["timm_model_name"], config["embed_dim"], vision["image_size"], vision["timm_pool"], vision["timm_proj"]
    )
    with torch.no_grad():
        assert tower.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, config["embed_dim"])


def test_a_local_bert_folder_takes_the_hubs_place(
    home: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(towers.BERT, str(made))
    models.register_models()
    text = open_clip.get_model_config("RN18-bert-base-uncased")["text_cfg"]
    assert text["hf_model_name"] == text["hf_tokenizer_name"] == str(made)
    assert models.check_model("RN18-bert-base-uncased") is None
    monkeypatch.setenv(towers.BERT, str(tmp_path / "nowhere"))
    models.register_models()
    line = models.check_model("RN18-bert-base-uncased")
    assert line is not None
    assert str(tmp_path / "nowhere") in line
    assert towers.BERT in line
    monkeypatch.delenv(towers.BERT)
    models.register_models()


def test_the_hub_is_asked_for_only_when_it_may_be(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert models.check_model("RN50-bert-base-uncased") is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    line = models.check_model("RN50-bert-base-uncased")
    assert line is not None
    assert "HF_HUB_OFFLINE" in line
    assert towers.BERT in line
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: file)
    assert models.check_model("RN50-bert-base-uncased") is None


def test_users_own_configurations_are_checked_too(home: Path, made: Path, tmp_path: Path) -> None:
    config = models.model_configs()[TINY]
    for name, tower in (("mine-gone", "./nowhere"), ("mine-here", str(made))):
        config["text_cfg"]["hf_model_name"] = tower
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    line = models.check_model("mine-gone")
    assert line is not None
    assert "./nowhere" in line
    assert models.check_model("mine-here") is None
    models.prepare_model("mine-gone")
    assert models.check_model("ViT-B-32") is None
    assert models.check_model("no-such-model") is None
    assert models.check_model("hf-hub:nobody/nothing") is None


def test_an_unwritable_home_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(towers.HOME, str(tmp_path / "file" / "home"))
    models.register_models()
    with pytest.raises(RuntimeError, match=towers.HOME):
        models.prepare_model(TINY)
