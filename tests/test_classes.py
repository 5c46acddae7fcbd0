"""What labels that train as silent garbage look like, and what is said of them."""

import numpy as np
import pytest
import runs
from PIL import Image

from ktda_jax import UserError
from ktda_jax import inspect as inspect_verb
from ktda_jax.data.check import check_split
from ktda_jax.data.classes import advice, doubts
from ktda_jax.data.sources import FolderSource
from ktda_jax.training import loop


def counts(**pixels):
    found = np.zeros(256, np.int64)
    for value, number in pixels.items():
        found[int(value[1:])] = number
    return found


@pytest.mark.parametrize(
    "held, classes, mended",
    [
        ("0 255", 2, {0: 0, 255: 1}),
        ("1 2 3", 3, {1: 0, 2: 1, 3: 2}),
        ("1 2 3 255", 3, {1: 0, 2: 1, 3: 2, 255: 255}),
        ("0 1 2 3", 3, {0: 255, 1: 0, 2: 1, 3: 2}),
        ("0 128 192", 3, {0: 0, 128: 1, 192: 2}),
        ("0 100", 2, {0: 0, 100: 1}),
        ("0 100 255", 2, {0: 0, 100: 1, 255: 255}),
        ("0 128 255", 3, {0: 0, 128: 1, 255: 2}),
        ("1 2", 3, {1: 0, 2: 1, 3: 2}),
        ("0 1", 3, None),
        ("0 1 255", 3, None),
        ("0 255", 3, None),
    ],
)
def test_the_map_that_would_mend_them(held, classes, mended):
    found = counts(**{f"v{value}": 10 for value in held.split()})
    text = advice(found, classes, "stored")
    assert bool(text) == (mended is not None)
    if mended:
        assert eval(text.partition("config.data.label_map=")[2]) == tuple(mended.items())
        assert "label_map" not in advice(found, classes, "built")


def test_soft_edges_get_no_map():
    assert "soft edges" in (text := advice(counts(v0=60, v254=1, v255=40), 2, "stored")) and "label_map" not in text


def test_one_class_and_none():
    def lines(pixels, ignored=0, trained=True):
        names = ("soil", "grass", "rock")[: len(pixels)]
        return doubts(np.array(pixels), ignored, names, split="s", trained=trained, made="stored")

    assert lines([5, 1, 1]) == [] and lines([5, 0, 1], trained=False) == []
    (text,) = lines([6, 0, 2])
    assert text.startswith(
        "no pixel of split 's' is labelled 'grass', so it cannot be learnt (values 0: 75 %, 2: 25 %)"
    )
    assert "every labelled pixel of split 's' is 'rock', so there is nothing to learn" in lines([0, 0, 7])[0]
    assert "a map of 'rock' alone scores 100 (values 2: 70 %, 255 (ignored): 30 %)" in lines([0, 0, 7], 3, False)[0]
    assert "there is one class, 'soil'" in lines([7])[0]
    assert "only 1 pixels of split 's' are labelled 'grass'; many are ignored" in lines([60_000, 1], 40_000)[0]
    assert lines([60_000, 1]) == []


@pytest.fixture
def masks(tmp_path):
    """Two classes whose masks are drawn as 0 and 255."""
    root = runs.make_tiles(tmp_path / "data", train=4, val=2)
    for path in (root / "ann_dir").rglob("*.png"):
        label = np.array(Image.open(path))
        Image.fromarray(np.where(label > 2, 255, 0).astype(np.uint8)).save(path)
    return root


MASKS = {
    "loss.class_weights": None,
    "data.name": "masks",
    "data.classes": ("background", "object"),
    "data.palette": ((0, 0, 0), (255, 0, 0)),
}


def test_masks_of_0_and_255_are_named_and_their_map_mends_them(masks, tmp_path, capsys):
    config = runs.config(masks, MASKS)
    problems = inspect_verb.run(config, tmp_path / "out", samples=2)
    assert len(problems) == 2  # of training and validation
    for problem, split in zip(problems, ("train", "val"), strict=True):
        assert problem.startswith(f"every labelled pixel of split '{split}' is 'background'")
        assert problem.endswith("masks drawn as 0 and 255: if so, set config.data.label_map=((0, 0), (255, 1))")
    config = runs.config(masks, MASKS | {"data.label_map": ((0, 0), (255, 1))})
    assert inspect_verb.run(config, tmp_path / "out", samples=2) == []


@pytest.mark.slow
def test_training_warns_of_them(masks, tmp_path, capsys):
    loop.train_and_evaluate(
        runs.config(masks, MASKS | {"total_steps": 2, "eval_every": 2, "schedule.warmup": 1}), tmp_path / "run"
    )
    warned = [line for line in capsys.readouterr().out.splitlines() if "every labelled pixel" in line]
    assert len(warned) == 2 and all(line.startswith("warning: ") for line in warned)


def test_values_that_are_no_classes_come_with_the_likely_map(tmp_path):
    root = runs.make_tiles(tmp_path / "data", train=3)
    for path in (root / "ann_dir").rglob("*.png"):
        Image.fromarray(np.array(Image.open(path)) + np.uint8(1)).save(path)
    with pytest.raises(UserError) as error:
        check_split(FolderSource(root, "train", num_classes=runs.CLASSES))
    assert "label values outside 0..4 that are not 255 in" in str(error.value)
    assert "classes counted from 1: if so, set config.data.label_map=((1, 0), (2, 1), (3, 2), (4, 3), (5, 4))" in str(
        error.value
    )
