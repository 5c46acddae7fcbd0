"""Images that are no files of their own here: behind URLs, in buckets and archives, as users write and GDAL opens them.

`pathlib` would make https:/ of https://, so these are `Address`es, with those of pathlib's names that an image needs.
What stands behind a URL's question mark may be a signature: GDAL gets it, and names, messages and records do not.
"""

import dataclasses
import glob
import os
import pathlib
import re
import urllib.parse
from collections.abc import Sequence

from ktda_jax import UserError
from ktda_jax.data import buckets

BESIDE = (".aux.xml", ".msk", ".ovr")  # what GDAL keeps beside an image; two of them are TIFFs of their own
SCHEMES = {
    "https": "/vsicurl/https://", "http": "/vsicurl/http://", "ftp": "/vsicurl/ftp://", "gs": "/vsigs/",
    "s3": "/vsis3/", "az": "/vsiaz/",
}  # fmt: skip
NETWORK = re.compile(r"/vsi(curl|gs|s3|az|adls|oss|swift|hdfs|webhdfs)(_streaming)?[/?]")
CHAINED = re.compile(r"/vsi(zip|tar|7z|rar)//vsicurl")  # where it cannot be told how far a signature goes
LOGIN = re.compile(r"(?<=://)[^/]*@")  # up to the last @, which passwords may hold
PATTERNS = re.compile(r"\b(gs|s3|az)://|/vsi(gs|s3|az)(_streaming)?/")  # whose ? may be any character of a name
SIGNATURE = re.compile(r"\?[\w.%-]+=")


@dataclasses.dataclass(frozen=True)
class Address(os.PathLike):
    """str() is for people, os.fspath() for GDAL."""

    opened: str = dataclasses.field(repr=False)  # /vsi...
    shown: str = dataclasses.field(compare=False)
    secret: str = dataclasses.field(repr=False, compare=False)  # what `shown` lacks, '' or from the ? on

    def __fspath__(self) -> str:
        return self.opened

    def __str__(self) -> str:
        return self.shown

    @property
    def remote(self) -> bool:
        """Whether it is read over a network; an archive may be on this machine."""
        return NETWORK.search(self.opened) is not None

    @property
    def name(self) -> str:
        last = self.shown.rpartition("/")[2]  # of a%2Fb.tif in a bucket's own URLs the last part counts
        return pathlib.PurePosixPath(urllib.parse.unquote(last) if "/vsicurl" in self.opened else last).name

    @property
    def stem(self) -> str:
        return pathlib.PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "Address":
        return parse(self.shown.rpartition("/")[0])

    def absolute(self) -> "Address":
        return self

    resolve = absolute

    def without_secret(self, text: str) -> str:
        """Someone else's words about it, in which its name may stand whole or in part."""
        text = text.replace(self.opened, self.shown)
        return masked(text.replace(self.secret, "") if self.secret else text, prose=True)


Image = pathlib.Path | Address  # where one is


def is_address(path: str | os.PathLike) -> bool:
    text = os.fspath(path)
    return "://" in text or text.startswith("/vsi")


def parse(text: str) -> Address:
    """UserError for a scheme that nothing reads."""
    if text.startswith("/vsi"):
        opened, shown = text, text
        for scheme, prefix in SCHEMES.items():
            if text.startswith(prefix):
                shown = f"{scheme}://{text.removeprefix(prefix)}"
        if text.startswith("/vsicurl?"):  # with options, and the URL as one of them
            shown = urllib.parse.unquote(re.search(r"\burl=([^&]*)|$", text)[1] or "/vsicurl")
    else:
        scheme, _, rest = text.partition("://")
        if scheme.lower() not in SCHEMES:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            named = LOGIN.sub("", text).partition("?")[0]
            raise UserError(f"{named} is no address that can be read: {known} and /vsi... can be")
        opened, shown = SCHEMES[scheme.lower()] + rest, text
    if "/vsicurl" not in opened:
        if NETWORK.search(opened) and SIGNATURE.search(opened):
            raise UserError(f"{masked(shown)}: a signed address is an https:// one; give that, or leave out the ?...")
        return Address(opened, shown, "")
    if CHAINED.match(opened) and "?" in opened and "{" not in opened.partition("?")[0]:
        kind, rest = re.split(r"/(?=/vsicurl)", LOGIN.sub("", opened.partition("?")[0]), maxsplit=1)
        raise UserError(f"{kind}/{rest}?***: put braces around the archive's address: {kind}/{{{rest}?...}}/NAME.tif")
    shown = LOGIN.sub("", shown)
    secret = re.search(r"\?[^}]*|$" if "{" in shown.partition("?")[0] else r"(?s)\?.*|$", shown)[0]
    return Address(opened, shown.replace(secret, "") if secret else shown, secret)


def masked(text: str, *, prose: bool = False) -> str:
    """A setting, or an argument, with *** for all that is secret in the addresses in it; the rest as it is.

    In `prose` an address ends at a space. Else it ends where a comma and another address follow: rather too much is
    hidden.
    """
    end = r"(\s+|,(?=\w+://|/vsi))" if prose else r"(,\s*(?=\w+://|/vsi))"
    return "".join(map(_masked, re.split(end, text)))


def _masked(text: str) -> str:
    if "://" not in text and "/vsi" not in text:
        return text
    text = LOGIN.sub("***@", text)
    if PATTERNS.search(text) and not SIGNATURE.search(text):
        return text
    return re.sub(r"\?.+", "?***", text, flags=re.DOTALL)


def located(path: str | os.PathLike) -> str | os.PathLike:
    """An Address of a text that is one; all else as it is."""
    return parse(path) if isinstance(path, str) and is_address(path) else path


def found(text: str, suffixes: Sequence[str], *, what: str) -> list[Address]:
    """The image at an address; of gs:// also those of a pattern, or right in a folder. UserError if there are none."""
    address = parse(text)
    if text.startswith(buckets.SCHEME):
        pattern = glob.has_magic(text)
        if pattern or address.suffix.lower() not in suffixes:
            return _listed(address, pattern, suffixes, what)
    elif address.opened.startswith(("/vsis3/", "/vsiaz/")) and (text.endswith("/") or glob.has_magic(text)):
        raise UserError(
            f"{address}: only of gs:// are folders and patterns listed; list it yourself, write the addresses into a "
            "text file, one a line, and give that file.txt"
        )
    if not address.name or address.shown.endswith("/"):
        raise UserError(f"{address} names no file; give the address of an image, or a file.txt with one a line")
    if address.suffix.lower() in (".json", ".geojson"):
        raise UserError(f"{address} is no image; of a STAC item give the address (href) of one of its assets")
    return [address]


def _listed(address: Address, pattern: bool, suffixes: Sequence[str], what: str) -> list[Address]:
    place = buckets.place(address.shown)
    try:
        names = buckets.matching(place) if pattern else buckets.inside(place)
    except OSError as error:
        raise UserError(str(error)) from error
    images = [parse(f"{buckets.SCHEME}{name}") for name in sorted(names)]
    if images == [address]:
        return images
    images = [image for image in images if not image.name.startswith(".")]
    if pattern:
        images = [image for image in images if not image.name.lower().endswith(BESIDE)]
        if not images:
            raise UserError(f"no object matches {address}")
        return images
    images = [image for image in images if image.suffix.lower() in suffixes]
    if not images:
        raise UserError(f"no {what} in the folder {address}; its objects must end in {', '.join(suffixes)}")
    return images
