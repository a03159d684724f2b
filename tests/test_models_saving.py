"""Adapters on disk: round trips, other backbones, damaged folders, a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import epic_fast
from epic_fast import EpicConfig
from epic_fast.errors import AdapterError, ConfigError
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.pairs import RandomPairs
from epic_fast.testing.probes import lively, make_batch, perturb

BATCH = make_batch([8, 5, 6])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip(folder)
    return folder


@pytest.fixture
def saved(clip_folder: Path, tmp_path: Path) -> tuple[Any, Path]:
    """A model on the towers of ``clip_folder``, and the folder of its adapter."""
    model = perturb(epic_fast.wrap(str(clip_folder), EpicConfig(prompt_length=2), num_labels=3)).eval()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    description = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del description[name]
        else:
            description[name] = value
    path.write_text(json.dumps(description))


# -- round trips ----------------------------------------------------------------------------------------------------


def test_a_clip_by_its_folder(clip_folder: Path, tmp_path: Path) -> None:
    config = EpicConfig(prompt_length=2, layer_pairs=[(0, 1), (2, 3)], gate="channel")
    task = {"num_labels": 3, "problem_type": "multi_label_classification", "labels": ["a", "ö", "c"]}
    model = perturb(epic_fast.wrap(clip_folder, config, pos_weight=[1.0, 2.0, 4.0], **task)).eval()
    model.threshold = 0.3
    model.save_pretrained(tmp_path / "new" / "adapter")
    assert sorted(each.name for each in (tmp_path / "new" / "adapter").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    stored = safetensors.torch.load_file(tmp_path / "new" / "adapter" / "model.safetensors")
    assert set(stored) == {name for name, _ in model.trainable_parameters()} | {"pos_weight_values"}
    loaded = epic_fast.from_pretrained(tmp_path / "new" / "adapter")
    with torch.no_grad():
        labels = torch.eye(3)
        found, wanted = loaded(**BATCH, labels=labels), model(**BATCH, labels=labels)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.loss, wanted.loss)
    assert loaded.config == config
    assert loaded.layer_pairs == [(0, 1), (2, 3)]
    assert (loaded.labels, loaded.threshold) == (["a", "ö", "c"], 0.3)
    assert (loaded.num_labels, loaded.problem_type) == (3, "multi_label_classification")
    assert not loaded.training
    assert loaded.backbone.tokenizer is not None
    assert loaded.backbone.image_processor is not None


@pytest.mark.parametrize("form", ["vision=,text=", "objects", "objects from folders"])
def test_a_pair(form: str, tmp_path: Path) -> None:
    vit, bert = tiny_vit(tmp_path / "vit"), tiny_bert(tmp_path / "bert")
    backbone: Any = (vit, bert)
    if form == "vision=,text=":
        backbone = f"vision={tmp_path / 'vit'},text={tmp_path / 'bert'}"
    elif form == "objects from folders":
        backbone = (type(vit).from_pretrained(tmp_path / "vit"), type(bert).from_pretrained(tmp_path / "bert"))
        backbone[0].pooler = None
    model = perturb(epic_fast.wrap(backbone, EpicConfig(prompt_length=2), num_labels=3)).eval()
    model.save_pretrained(tmp_path / "adapter")
    if form == "objects":
        with pytest.raises(
            AdapterError, match=r"does not say where its backbone \(vit\+bert\) came from.*backbone=model"
        ):
            epic_fast.from_pretrained(tmp_path / "adapter")
        loaded = epic_fast.from_pretrained(tmp_path / "adapter", backbone=(tiny_vit(), tiny_bert()))
    else:
        loaded = epic_fast.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("fields", [{"prompt_length": 0}, {"feature_norm": "standardize"}, {"num_layer_pairs": 1}])
def test_every_kind_of_state_survives(fields: dict[str, Any], clip_folder: Path, tmp_path: Path) -> None:
    config = EpicConfig(**{"prompt_length": 2, "learn_gates": False, "gate_init": 0.5, **fields})
    model = perturb(epic_fast.wrap(clip_folder, config, num_labels=1, problem_type="regression")).eval()
    if model.needs_feature_statistics:
        model.fit_feature_statistics([BATCH])
    model.save_pretrained(tmp_path)
    loaded = epic_fast.from_pretrained(tmp_path)
    assert not loaded.needs_feature_statistics
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


def test_saving_leaves_other_files_alone_and_replaces_its_own(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    (folder / "log.jsonl").write_text("mine\n")
    perturb(model, seed=11)
    model.save_pretrained(str(folder))
    assert sorted(each.name for each in folder.iterdir()) == ["config.json", "log.jsonl", "model.safetensors"]
    assert (folder / "log.jsonl").read_text() == "mine\n"
    with torch.no_grad():
        assert torch.equal(epic_fast.from_pretrained(folder)(**BATCH).logits, model(**BATCH).logits)


def test_another_type_is_close_and_is_verified_first(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    loaded = epic_fast.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert loaded.backbone.dtype == torch.bfloat16
    assert {each.dtype for _, each in loaded.trainable_parameters()} == {torch.float32}
    with torch.no_grad():
        wanted, found = model(**BATCH).logits, loaded(**BATCH).logits
    assert not torch.equal(wanted, found)
    assert (wanted - found).abs().max() < 0.05 * wanted.abs().max()
    double = epic_fast.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(double(**BATCH).logits, wanted, atol=1e-5)


# -- another backbone -----------------------------------------------------------------------------------------------


def test_one_changed_weight_is_named(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    clip = tiny_clip()
    with torch.no_grad():
        clip.text_model.encoder.layers[1].mlp.fc1.bias[3] += 1e-6
    with pytest.raises(
        AdapterError,
        match=r"another backbone.*: 1 of \d+ tensors differ: text_model\.encoder\.layers\.1\.mlp\.fc1\.bias\.",
    ):
        epic_fast.from_pretrained(folder, backbone=clip)
    assert all(each.requires_grad for each in clip.parameters())
    assert epic_fast.from_pretrained(folder, backbone=clip, verify=False).num_labels == 3


def test_another_width_depth_type_and_family_are_named(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    with pytest.raises(AdapterError, match=r"tensors differ: .*text_model.*and \d+ more"):
        epic_fast.from_pretrained(folder, backbone=tiny_clip(text_width=40))
    with pytest.raises(AdapterError, match=r"are missing: text_model\.encoder\.layers\.2"):
        epic_fast.from_pretrained(folder, backbone=tiny_clip(text_layers=2))
    with pytest.raises(AdapterError, match=r"trained in float32, this one is in bfloat16.*differ"):
        epic_fast.from_pretrained(folder, backbone=tiny_clip().to(torch.bfloat16))
    with pytest.raises(AdapterError, match=r"are missing.*are new"):
        epic_fast.from_pretrained(folder, backbone=(tiny_vit(), tiny_bert()))


def test_weights_changed_after_wrapping_change_the_fingerprint(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    before = dict(model.backbone.fingerprint())
    assert model.backbone.fingerprint() == before
    lively(model.backbone.model)
    after = model.backbone.fingerprint()
    assert all(after[name] != before[name] for name in before)
    model.save_pretrained(folder)
    with pytest.raises(AdapterError, match="another backbone"):
        epic_fast.from_pretrained(folder)


def test_a_backbone_that_has_moved_is_asked_for(tmp_path: Path) -> None:
    tiny_clip(tmp_path / "here")
    model = epic_fast.wrap(str(tmp_path / "here"), EpicConfig(prompt_length=2), num_labels=3).eval()
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(AdapterError, match=r"remembers its backbone as '.*here'.*does not exist(.|\n)*backbone="):
        epic_fast.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="elsewhere' does not exist"):
        epic_fast.from_pretrained(tmp_path / "adapter", backbone=str(tmp_path / "elsewhere"))
    loaded = epic_fast.from_pretrained(tmp_path / "adapter", backbone=str(tmp_path / "there"))
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


# -- damage ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_adapter(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"nowhere does not exist, so it is no adapter"):
        epic_fast.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"has no config\.json, so it is no adapter"):
        epic_fast.from_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="was not written by epic_fast"):
        epic_fast.from_pretrained(clip_folder)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(AdapterError, match="was not written by epic_fast"):
        epic_fast.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"library": "epic_fast", "form', b"\xff\xfe\x00"])
def test_damaged_json(content: bytes, saved: tuple[Any, Path]) -> None:
    (saved[1] / "config.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"config\.json is damaged"):
        epic_fast.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "name", ["format", "version", "method", "config", "num_labels", "problem_type", "labels", "threshold", "backbone"]
)
def test_a_description_without_one_of_its_entries(name: str, saved: tuple[Any, Path]) -> None:
    path = saved[1] / "config.json"
    description = json.loads(path.read_text())
    del description[name]
    path.write_text(json.dumps(description))
    with pytest.raises(AdapterError, match=rf"config\.json is damaged.*{name}"):
        epic_fast.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "changes",
    [{"config": 3}, {"backbone": []}, {"backbone": {"source": None, "family": "clip", "dtype": "list", "tensors": {}}}],
)
def test_a_description_with_something_else_in_an_entry(changes: dict[str, Any], saved: tuple[Any, Path]) -> None:
    edit(saved[1], **changes)
    with pytest.raises(AdapterError, match=r"config\.json is damaged"):
        epic_fast.from_pretrained(saved[1])


def test_a_future_format_and_an_unknown_method(saved: tuple[Any, Path]) -> None:
    edit(saved[1], format=2, version="9.0")
    with pytest.raises(AdapterError, match=r"in format 2, written by epic_fast 9\.0; this version .* reads format 1"):
        epic_fast.from_pretrained(saved[1])
    edit(saved[1], format=1, method="mop")
    with pytest.raises(AdapterError, match=r"holds method 'mop'.*the methods epic"):
        epic_fast.from_pretrained(saved[1])


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"prompt_lenght": 2}, r"config\.json.*no field 'prompt_lenght'; did you mean 'prompt_length'"),
        ({"prompt_length": 999}, r"config\.json.*prompt_length=999; wanted"),
        ({"layer_pairs": [[14, 1]]}, r"names text layer 14, but this text tower has 3 \(0\.\.2\)"),
    ],
)
def test_a_configuration_that_does_not_hold(field: dict[str, Any], said: str, saved: tuple[Any, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())["config"]
    edit(saved[1], config={**config, **field})
    clip = tiny_clip()
    with pytest.raises(AdapterError, match=said):
        epic_fast.from_pretrained(saved[1], backbone=clip)
    assert all(each.requires_grad for each in clip.parameters())


def test_weights_missing_cut_short_or_of_another_model(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        clip = tiny_clip()
        with pytest.raises(AdapterError, match=rf"model\.safetensors is damaged \({length} bytes\)"):
            epic_fast.from_pretrained(folder, backbone=clip)
        assert all(each.requires_grad for each in clip.parameters())
    path.unlink()
    with pytest.raises(AdapterError, match=r"model\.safetensors does not exist"):
        epic_fast.from_pretrained(folder)
    state = safetensors.torch.load(whole)
    state["text_prompt"] = torch.zeros(5, 32)
    del state["hub.text_gate"]
    safetensors.torch.save_file({**state, "extra": torch.zeros(1)}, path)
    with pytest.raises(AdapterError) as caught:
        epic_fast.from_pretrained(folder)
    for each in (
        "text_prompt ((5, 32), wanted (2, 32))",
        "hub.text_gate (missing, wanted (2,))",
        "extra ((1,), wanted none)",
    ):
        assert each in str(caught.value)


def test_nothing_is_ever_unpickled(saved: tuple[Any, Path]) -> None:
    path = saved[1] / "model.safetensors"
    path.unlink()
    torch.save({"text_prompt": torch.zeros(2, 32)}, path)
    with pytest.raises(AdapterError, match="is damaged"):
        epic_fast.from_pretrained(saved[1])


@pytest.mark.parametrize("by", ["save_pretrained", "fit"])
def test_a_backbone_is_not_written_over(by: str, tmp_path: Path) -> None:
    place = tmp_path / "clip"
    tiny_clip(place)
    before = {each.name: each.read_bytes() for each in place.iterdir()}
    model = epic_fast.wrap(place, EpicConfig(prompt_length=2, num_layer_pairs=2), num_labels=4)
    ways = {
        "save_pretrained": lambda: model.save_pretrained(place),
        "fit": lambda: epic_fast.fit(model, RandomPairs(4), output_dir=place, progress=False),
    }
    with pytest.raises(AdapterError, match=r"config.json is no adapter's.*another model.*wanted an empty folder"):
        ways[by]()
    assert {each.name: each.read_bytes() for each in place.iterdir()} == before
    # Another adapter is replaced.
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")


def test_a_folder_is_remembered_wherever_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_clip(tmp_path / "clip")
    tiny_vit(tmp_path / "vit")
    tiny_bert(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    config = EpicConfig(prompt_length=2, num_layer_pairs=2)
    pair = f"vision={tmp_path / 'vit'},text={tmp_path / 'bert'}"
    for spec, wanted in (("clip", str(tmp_path / "clip")), ("vision=vit,text=bert", pair)):
        model = epic_fast.wrap(spec, config, num_labels=4).eval()
        model.save_pretrained("saved")
        assert json.loads(Path("saved/config.json").read_text())["backbone"]["source"] == wanted
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path / "elsewhere")
            again = epic_fast.from_pretrained(tmp_path / "saved")
        with torch.no_grad():
            assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("pair", [False, True])
def test_an_adapter_and_its_backbone_move_together(pair: bool, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    tiny_clip(old / "clip")
    tiny_vit(old / "vit")
    tiny_bert(old / "bert")
    spec = f"vision={old / 'vit'},text={old / 'bert'}" if pair else str(old / "clip")
    model = epic_fast.wrap(spec, EpicConfig(prompt_length=2, num_layer_pairs=2), num_labels=4).eval()
    model.save_pretrained(old / "runs" / "adapter")
    old.rename(new)
    again = epic_fast.from_pretrained(new / "runs" / "adapter")
    assert again.backbone.source == spec.replace(str(old), str(new))
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)
    # Alone it says where the backbone was.
    (new / "runs" / "adapter").rename(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=rf"(?s)remembers its backbone as .*{old.name}.*--backbone on the"):
        epic_fast.from_pretrained(tmp_path / "adapter")
    # Of an adapter that was saved before this was written down.
    description = json.loads((tmp_path / "adapter" / "config.json").read_text())
    del description["backbone"]["seen_from_here"]
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(description))
    with pytest.raises(AdapterError, match=f"remembers its backbone as .*{old.name}"):
        epic_fast.from_pretrained(tmp_path / "adapter")


def test_saving_where_a_file_stands(saved: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="it is a file"):
        saved[0].save_pretrained(tmp_path / "file")
    with pytest.raises(AdapterError, match="could not be written"):
        saved[0].save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("too_long", ["model.safetensors", "config.json"])
def test_a_full_disk_leaves_the_previous_adapter_whole(too_long: str, clip_folder: Path, tmp_path: Path) -> None:
    """Whichever of the two files does not fit, both stay as they were: half a new adapter would not load."""
    resource = pytest.importorskip("resource")  # not on Windows
    first = EpicConfig(prompt_length=2 if too_long == "model.safetensors" else 0)
    second = EpicConfig(prompt_length=4 if too_long == "model.safetensors" else 0, label_smoothing=0.1)
    model = perturb(epic_fast.wrap(clip_folder, first, num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    sizes = {name: len(content) for name, content in before.items()}
    assert max(sizes, key=lambda name: sizes[name]) == too_long
    limit = (min(sizes.values()) + max(sizes.values())) // 2
    other = epic_fast.wrap(clip_folder, second, num_labels=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(AdapterError, match="What was saved there before is untouched"):
            other.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    with torch.no_grad():
        assert torch.equal(epic_fast.from_pretrained(tmp_path)(**BATCH).logits, model(**BATCH).logits)


# -- configurations as JSON -------------------------------------------------------------------------------------------


def test_configurations_survive_json() -> None:
    for config in (
        EpicConfig(),
        EpicConfig(layer_pairs=[(0, 1), (2, 3)], temperature=1, head="mlp", gate_init=-0.25),
        EpicConfig(layer_pairs=((0, 1), [2, 3]), interaction=False),  # type: ignore[arg-type]
    ):
        again = EpicConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert type(again.temperature) is float
    assert again.layer_pairs == [(0, 1), (2, 3)]
    with pytest.raises(ConfigError, match="no field 'temprature'; did you mean 'temperature'"):
        EpicConfig.from_dict({"temprature": 0.1})
