"""Test cases that the builders of published folders share: `class TestGrass(FolderCases)` runs them."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ktda_jax import UserError
from ktda_jax.data.datasets import DatasetInfo
from ktda_jax.data.tfds_source import TfdsSource, prepare


def _without_label(root, cases):
    (root / "ann_dir" / "val" / "b_2.png").unlink()
    return f"val have no label.*b_2{cases.extension}"


def _foreign_value(root, cases):
    path = root / "ann_dir" / "val" / "b_2.png"
    label = np.array(Image.open(path))
    label[5, 5] = cases.info.num_classes
    Image.fromarray(label).save(path)
    return f"b_2.png .values {cases.info.num_classes}"


def _other_size(root, cases):
    Image.new("L", (7, 9)).save(root / "ann_dir" / "train" / "a_10.png")
    return "label 9 x 7"


def _no_directory(root, cases):
    (root / "ann_dir").rename(root / "masks")
    return "no such directory: .*ann_dir/train"


def _truncated(root, cases):
    path = root / "img_dir" / "train" / f"a_10{cases.extension}"
    path.write_bytes(path.read_bytes()[:300])
    return f"cannot be read: img_dir/train/a_10{cases.extension} "


class FolderCases:
    """Every pixel of the published folders arrives, or one line names the bad file."""

    info: DatasetInfo
    builder_cls: type
    extension: str  # of the images

    @pytest.fixture
    def layout(self, tmp_path):
        """A small copy of the published layout with random content, two tiles a split."""
        rng = np.random.default_rng(0)
        root = tmp_path / "published"
        for split in self.info.splits:
            for folder in ("img_dir", "ann_dir"):
                (root / folder / split).mkdir(parents=True)
            for name in ("b_2", "a_10"):
                image = rng.integers(0, 256, (24, 20, 3), np.uint8)
                label = rng.integers(0, self.info.num_classes, (24, 20), np.uint8)
                label[:2] = 255
                Image.fromarray(image).save(root / "img_dir" / split / f"{name}{self.extension}")
                Image.fromarray(label).save(root / "ann_dir" / split / f"{name}.png")
        return root

    def build(self, root, data_dir):
        builder = self.builder_cls(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=root))
        return builder

    def test_round_trip(self, layout, tmp_path):
        info, builder = self.info, self.build(layout, tmp_path / "data")
        assert builder.name == info.name
        assert set(builder.info.splits) == set(info.splits)
        assert builder.info.features["label"].names == list(info.classes)
        assert builder.info.supervised_keys == ("image", "label")
        assert "2412.06664" in builder.info.citation
        assert builder.info.as_proto.redistribution_info.license == info.license != ""
        assert [tuple(colour) for colour in builder.info.metadata["palette"]] == list(info.palette)
        for split in info.splits:
            source = TfdsSource(info.name, split, data_dir=tmp_path / "data", num_classes=info.num_classes)
            assert [tile["name"] for tile in source] == ["a_10", "b_2"]
            for tile in source:
                image = Image.open(layout / "img_dir" / split / f"{tile['name']}{self.extension}")
                label = Image.open(layout / "ann_dir" / split / f"{tile['name']}.png")
                np.testing.assert_array_equal(tile["image"], np.asarray(image))
                np.testing.assert_array_equal(tile["label"], np.asarray(label))

    @pytest.mark.parametrize("damage", [_without_label, _foreign_value, _other_size, _no_directory, _truncated])
    def test_bad_layout(self, layout, tmp_path, damage):
        message = damage(layout, self)
        with pytest.raises(UserError, match=message) as error:
            prepare(self.info.name, tmp_path / "data", layout)
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "data").rglob("*"))
        with pytest.raises(UserError, match=message):  # TFDS alone, as under `tfds build`, says the same
            self.build(layout, tmp_path / "data")

    def test_tfds_build_finds_it(self, monkeypatch):
        """As the `tfds` command does: imported from the builder's folder, not registering the name again."""
        monkeypatch.syspath_prepend(pathlib.Path(__file__).parent)
        module = f"{self.info.name}.{self.info.name}_dataset_builder"
        assert tfds.core.community.builder_cls_from_module(module).name == self.info.name
