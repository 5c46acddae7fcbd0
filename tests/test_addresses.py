"""What users write for an image that is no file of its own, what GDAL is given for it, and what is shown of it."""

import logging
import os
import pathlib
import pickle

import pytest
from test_images import error_of

from ktda_jax import UserError
from ktda_jax.config.data import listed
from ktda_jax.data import addresses, buckets
from ktda_jax.data.paths import absolute, expand, found, image, place
from ktda_jax.data.unlabelled import open_unlabelled
from ktda_jax.prediction import files

SIGNED = "https://h.net/a/My%20scene.tif?sv=1&sig=se%2Fcret"


@pytest.mark.parametrize(
    "text, opened, shown, name",
    [
        (SIGNED, f"/vsicurl/{SIGNED}", "https://h.net/a/My%20scene.tif", "My scene.tif"),
        ("https://h/a.tif?sig=1/", "/vsicurl/https://h/a.tif?sig=1/", "https://h/a.tif", "a.tif"),
        ("HTTP://h/a.tif", "/vsicurl/http://h/a.tif", "HTTP://h/a.tif", "a.tif"),
        ("https://me:word@h/a.tif", "/vsicurl/https://me:word@h/a.tif", "https://h/a.tif", "a.tif"),
        ("https://me:w@rd@h/a.tif?sig=1 2", "/vsicurl/https://me:w@rd@h/a.tif?sig=1 2", "https://h/a.tif", "a.tif"),
        ("https://h/b/o/folder%2Fa.tif?alt=media", None, "https://h/b/o/folder%2Fa.tif", "a.tif"),
        ("gs://bucket/what?.tif", "/vsigs/bucket/what?.tif", "gs://bucket/what?.tif", "what?.tif"),
        ("/vsigs/bucket/50%25.tif", "/vsigs/bucket/50%25.tif", "gs://bucket/50%25.tif", "50%25.tif"),
        ("s3://bucket/a.tif", "/vsis3/bucket/a.tif", "s3://bucket/a.tif", "a.tif"),
        ("/vsicurl/" + SIGNED, f"/vsicurl/{SIGNED}", "https://h.net/a/My%20scene.tif", "My scene.tif"),
        ("/vsicurl?max_retry=2&url=https%3A%2F%2Fh%2Fa.tif%3Fsig%3D1", None, "https://h/a.tif", "a.tif"),
        ("/vsizip/x.zip/in/a.tif", "/vsizip/x.zip/in/a.tif", "/vsizip/x.zip/in/a.tif", "a.tif"),
        ("/vsizip/{/vsicurl/https://h/x.zip?sig=1}/a.tif", None, "/vsizip/{/vsicurl/https://h/x.zip}/a.tif", "a.tif"),
    ],
)
def test_one_address(text, opened, shown, name):
    address = addresses.parse(text)
    assert os.fspath(address) == (opened or os.fspath(address)) and str(address) == shown
    assert (address.name, address.stem, address.suffix) == (name, name.rpartition(".")[0], ".tif")
    assert address.remote == ("/vsizip/x.zip" not in text)
    assert "what?" in text or files.expand(text) == [address]  # it is a pattern
    assert "sig" not in f"{address!r} {address} {address.parent}" and pickle.loads(pickle.dumps(address)) == address
    assert addresses.located(text) == address == absolute(address) and addresses.located("a.tif") == "a.tif"
    words = f"'{os.fspath(address)}' and {name.replace(' ', '%20')}{address.secret}, band 1: bad"
    assert "se%2Fcret" not in address.without_secret(words) and "sig=1" not in address.without_secret(words)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://u:p@ss@h/a.tif?sig=x y}z,/vsicurl/http://h/b.tif?s=1", "https://***@h/a.tif?***,/vsicurl/http://h/b.tif?***"),
        ("/vsicurl?url=https%3A%2F%2Fh%2Fa.tif%3Fsig%3DS&header.Authorization=Bearer%20S", "/vsicurl?***"),
        ("/vsizip/{/vsicurl/https://h/x.zip?sig=1}/a.tif", "/vsizip/{/vsicurl/https://h/x.zip?***"),
        ("a?.tif, https://h/a.tif?sig=1,2", "a?.tif, https://h/a.tif?***"),
        ("--config.data.unlabelled=s3://b/a?.tif,az://b/a.tif?sig=1", "--config.data.unlabelled=s3://b/a?.tif,az://b/a.tif?***"),
        ("what?", "what?"),
    ],
)  # fmt: skip
def test_settings_are_shown_without_secrets(text, shown):
    assert addresses.masked(text) == shown
    assert addresses.masked(f"{text.split()[0]}: no", prose=True).count("sig=") == 0


@pytest.mark.parametrize(
    "text, line",
    [
        ("nfs://h/a.tif?key=1", "^nfs://h/a.tif is no address that can be read: https://, .* and /vsi... can be$"),
        ("https://h/scenes/?key=1", "^https://h/scenes/ names no file; give the address of an image, or a file.txt"),
        ("s3://bucket/*.tif", "^s3://bucket/.*: only of gs:// are folders and patterns listed; list it yourself"),
        ("az://c/b.tif?sv=1&sig=SECRET", r"^az://c/b.tif\?\*\*\*: a signed address is an https:// one; give that"),
        ("s3://c/b.tif?X-Amz-Signature=S", r"^s3://c/b.tif\?\*\*\*: a signed address is an https:// one"),
        ("gs://c/*.tif?X-Goog-Signature=S", r"^gs://c/\*.tif\?\*\*\*: a signed address is an https:// one"),
        ("/vsiaz/c/b.tif?sig=S", r"^az://c/b.tif\?\*\*\*: a signed address is an https:// one"),
        (
            "/vsizip//vsicurl/https://h/x.zip?sig=S/in.tif",
            r"x.zip\?\*\*\*: put braces around .*: /vsizip/{/vsicurl/https://h/x.zip\?...}/NAME.tif$",
        ),
        ("https://h/item.json", "is no image; of a STAC item give the address .href. of one of its assets"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_image_is_one_line(text, line):
    with pytest.raises(UserError, match=line):
        files.expand(text)


@pytest.mark.parametrize("rest", ["b.tif", "b.tif?sig=SECRET", "SECRET"])
def test_an_address_with_a_comma_goes_into_a_list(rest):
    paths = listed(f"x.tif,https://h/a.tif?sig=1,{rest}")
    line = error_of(open_unlabelled, paths, crop=64)
    assert line.startswith("config.data.unlabelled: what follows the comma after https://h/a.tif is no file; an addr")
    assert "SECRET" not in line and "sig" not in line


def test_where_a_local_path_is_needed():
    with pytest.raises(UserError, match="^https://h/w is an address, and this must be a local path; downlo"):
        expand("https://h/w?sig=1")
    with pytest.raises(UserError, match="^--output=s3://b/maps is no path, nor gs://BUCKET/FOLDER; mount it"):
        files.name_outputs([pathlib.Path("a.tif")], "s3://b/maps", one=True)
    line = error_of(files.name_outputs, [pathlib.Path("a.tif")], "https://me:word@h/maps?sig=1", one=True)
    assert line.startswith("--output=https://***@h/maps?*** is no path")


def test_a_list_names_images_a_line_each(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.tif", "a/2.tif", "3.tif"):
        (tmp_path / name).touch()
    lines = tmp_path / "list.txt"
    lines.write_text(f"# scenes of May\n{SIGNED}\n\n{tmp_path}/a\n{tmp_path}/a/2.tif\n  {tmp_path}/*.tif\n")
    images = files.expand(str(lines))
    local = [tmp_path / name for name in ("a/1.tif", "a/2.tif", "3.tif")]
    assert images == [addresses.parse(SIGNED), *local]
    made = files.name_outputs(images, str(tmp_path / "maps"), one=False)
    assert [each.map.name for each in made] == ["My scene.tif", "1.tif", "2.tif", "3.tif"]
    lines.write_bytes(f"\ufeff# Gräser\r\n{SIGNED}\r\n".encode())  # as Windows writes one
    assert files.expand(str(lines)) == [addresses.parse(SIGNED)]
    lines.write_text(f"{tmp_path}/none.tif\n")
    assert error_of(files.expand, str(lines)) == f"there is no file {tmp_path}/none.tif of {lines}"
    lines.write_text("# nothing\n")
    assert "names nothing; give it a scene or an address a line" in error_of(files.expand, str(lines))
    lines.write_text("other.txt\n")
    assert "names other.txt, another list" in error_of(files.expand, str(lines))


def test_maps_of_the_same_name_are_refused_without_their_signatures(tmp_path):
    inputs = [addresses.parse(f"https://h/get.tif?sig={k}") for k in "12"]
    line = error_of(files.name_outputs, inputs, str(tmp_path), one=False)
    assert line.startswith("https://h/get.tif and https://h/get.tif would both be mapped to") and "sig" not in line


def test_maps_of_the_same_name_are_named_by_what_tells_their_inputs_apart(tmp_path):
    def named(*inputs):
        made = files.name_outputs([image(text) for text in inputs], str(tmp_path), one=False, overlay=True)
        assert all(path.parent == tmp_path for each in made for path in each.wanted())
        return [each.map.name for each in made]

    stac = [f"https://h/S2{k}/R10m/TCI.tif?sig=1" for k in "BA"]
    assert named(*stac, "/d/b.tif") == ["S2B_R10m_TCI.tif", "S2A_R10m_TCI.tif", "b.tif"]
    assert named("https://h/TCI.tif", "/d/../e/TCI.tif", "gs://b/TCI.png") == [
        "https_h_TCI.tif",
        "d_e_TCI.tif",
        "TCI.png",
    ]
    with pytest.raises(UserError, match="/d/a_b.tif would both be mapped to|would both be mapped to .*a_b.tif"):
        named("/a/b.tif", "/c/b.tif", "/d/a_b.tif")


def test_folders_and_patterns_of_a_bucket(bucket):
    for name in ("l/a.tif", "l/b.PNG", "l/c.tif.aux.xml", "l/.d.tif", "l/notes.txt", "l/deep/e.tif", "l/plain"):
        buckets.write_text(place("gs://bucket/" + name), "x")

    def names(text):
        return [
            str(image).removeprefix("gs://bucket/") for image in found(text, files.SUFFIXES, what="scene", called="")
        ]

    assert names("gs://bucket/l") == names("gs://bucket/l/") == ["l/a.tif", "l/b.PNG"]
    assert names("gs://bucket/l/*.tif*") == ["l/a.tif"] and names("gs://bucket/l/**/e.tif") == ["l/deep/e.tif"]
    assert names("gs://bucket/l/plain") == ["l/plain"] and names("gs://bucket/l/none.tif") == [
        "l/none.tif"
    ]  # not asked
    for text, line in (
        ("gs://bucket/none/", "no scene in the folder gs://bucket/none/; its objects must end in .tif"),
        ("gs://bucket/l/*.jp2", "no object matches gs://bucket/l/*.jp2"),
        ("gs://other/l", "there is no bucket gs://other; make it, or correct the name"),
    ):
        assert error_of(found, text, files.SUFFIXES, what="scene", called="").startswith(line)
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.ERROR)  # tracebacks beside our line
    source = addresses.parse("/vsigs/bucket/l/a.tif")
    line = error_of(files.name_outputs, [source], "gs://bucket/l", one=False)
    assert line.startswith("gs://bucket/l/a.tif would be written over the input gs://bucket/l/a.tif; choose")
