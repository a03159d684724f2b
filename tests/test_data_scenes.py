"""Rendered scenes: what an expression means is looked up by a reader that shares no code with the generator."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from epic_fast.data import check_folder, load_image, load_mask, make_scenes, read_folder
from epic_fast.data.scenes import CLEAR, COLOURS, HELD_OUT, SHAPES
from epic_fast.errors import ConfigError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "folder", train=300, validation=40, test=80, side=64)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def fits(phrase: str, thing: dict) -> bool:
    return all(word == "shape" or word in (thing["size"], thing["colour"], thing["shape"]) for word in phrase.split())


def meant(text: str, things: list[dict], margin: float) -> list[dict]:
    """The shapes that an expression may mean; what is nearer than ``margin`` could be on either side."""
    relation = re.fullmatch(r"the (.+) (left of|right of|above|below) the (.+)", text)
    if relation:
        phrase, word, anchor = relation.groups()
        anchors = [each for each in things if fits(anchor, each)]
        assert len(anchors) == 1, "the anchor itself is not clear"
        axis, sign = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}[word]
        alike = [each for each in things if fits(phrase, each) and each is not anchors[0]]
        return [each for each in alike if sign * (anchors[0][axis] - each[axis]) > margin]
    extreme = re.fullmatch(r"the (leftmost|rightmost|topmost|lowest) (.+)", text)
    if extreme:
        word, phrase = extreme.groups()
        axis, sign = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "lowest": ("y", -1)}[word]
        alike = [each for each in things if fits(phrase, each)]
        places = {id(each): sign * each[axis] for each in alike}
        first = [all(places[id(o)] > places[id(each)] + margin for o in alike if o is not each) for each in alike]
        return [each for each, is_first in zip(alike, first, strict=True) if is_first]
    return [each for each in things if fits(text.removeprefix("the "), each)]


def test_every_expression_means_its_target_and_nothing_else(scenes: Path) -> None:
    for row in rows_of(scenes):
        things = row["objects"]
        for margin in (0.9 * CLEAR, 0.0, -0.9 * CLEAR):  # strict, to the letter, and generous readers agree
            assert meant(row["text"], things, margin) == things[:1], (row["text"], things, margin)


def test_the_reader_of_this_test_sees_when_two_are_meant() -> None:
    thing = {"size": "small", "colour": "red", "shape": "star", "x": 0.2, "y": 0.5}
    other = {**thing, "x": 0.8}
    assert len(meant("the red star", [thing, other], 0.0)) == 2
    assert meant("the leftmost star", [thing, other], 0.0) == [thing]
    assert meant("the rightmost star", [thing, other], 0.0) == [other]


def test_held_out_pairs_are_in_no_training_scene(scenes: Path) -> None:
    rows = rows_of(scenes)
    assert len(HELD_OUT) == 6
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    seen = {(each["colour"], each["shape"]) for row in rows if row["split"] != "test" for each in row["objects"]}
    assert not seen & set(HELD_OUT)
    assert len(seen) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
    test = [row for row in rows if row["split"] == "test"]
    for row in test:
        target = (row["objects"][0]["colour"], row["objects"][0]["shape"])
        assert (target in HELD_OUT) == (row["combination"] == "held out")
    assert Counter(row["combination"] for row in test) == {"seen": 40, "held out": 40}


def test_all_kinds_of_expression_occur(scenes: Path) -> None:
    kinds = Counter(row["kind"] for row in rows_of(scenes))
    assert set(kinds) == {"attributes", "extreme", "relation"}
    assert min(kinds.values()) > 40


def test_the_mask_is_where_the_colour_is(scenes: Path) -> None:
    for row in rows_of(scenes)[:100]:
        picture, mask = np.asarray(load_image(scenes / row["file_name"])).astype(int), load_mask(scenes / row["mask"])
        colour = np.array(COLOURS[row["objects"][0]["colour"]])
        # Half of a pixel is enough for the mask, so up to rounding its colour is at least halfway.
        near = np.abs(picture - colour).sum(axis=2) <= np.abs(picture - picture[0, 0]).sum(axis=2) + 6
        assert mask.sum() >= 30
        assert near[mask].all()
        other = np.abs(picture - colour).sum(axis=2) < 20
        if sum(each["colour"] == row["objects"][0]["colour"] for each in row["objects"]) == 1:
            assert not other[~mask].any()


def test_the_edges_are_smooth(scenes: Path) -> None:
    picture = np.asarray(load_image(scenes / rows_of(scenes)[0]["file_name"]))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_it_is_a_data_folder(scenes: Path) -> None:
    data = read_folder(scenes)
    assert data.problem_type == "segmentation"
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 300, "validation": 40, "test": 80}
    assert check_folder(scenes).ok


def test_a_scene_depends_on_seed_split_and_number_alone(tmp_path: Path) -> None:
    few = rows_of(make_scenes(tmp_path / "few", train=3, validation=0, test=2, side=32))
    more = rows_of(make_scenes(tmp_path / "more", train=5, validation=1, test=2, side=32))
    other = rows_of(make_scenes(tmp_path / "other", train=3, validation=0, test=2, side=32, seed=1))
    assert few == more[:3] + more[-2:]
    assert few != other
    name = few[0]["file_name"]
    assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "more" / name).read_bytes()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        make_scenes(tmp_path, train=1)
    with pytest.raises(ConfigError, match="wanted at least one scene"):
        make_scenes(tmp_path / "new", train=0)
