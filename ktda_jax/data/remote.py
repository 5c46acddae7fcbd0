"""Reading over a network through GDAL: how long it waits, what went wrong, in words, and what is fetched whole."""

import os
import re
import shutil
import tempfile
import weakref
from typing import Any

from ktda_jax.data.addresses import Address

# Defaults of the environment, of which files of this machine take no notice; GDAL by itself waits for ever.
SETTINGS = {
    "GDAL_HTTP_CONNECTTIMEOUT": "10",  # seconds
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1000",  # bytes/s, at least, within
    "GDAL_HTTP_LOW_SPEED_TIME": "30",
    "GDAL_HTTP_MAX_RETRY": "3",  # of 429 and 5xx
    "GDAL_HTTP_RETRY_DELAY": "1",
}
LISTING = "GDAL_DISABLE_READDIR_ON_OPEN"
CREDENTIALS = (
    "give GDAL credentials by the environment: GOOGLE_APPLICATION_CREDENTIALS=FILE for gs:// (after `gcloud auth "
    "application-default login` ~/.config/gcloud/application_default_credentials.json), AWS_... for s3://, "
    "GDAL_HTTP_HEADERS for https://; GS_NO_SIGN_REQUEST=YES or AWS_NO_SIGN_REQUEST=YES for what is public"
)
AGAIN = "give it again when the server answers"
FAULTS = (  # in GDAL's words, in ours, and what to do
    (r"response code: (404|410)", "there is nothing at this address (HTTP {0})", "correct it"),
    (r"response code: (40[137])", "the server refuses (HTTP {0})", f"sign the address anew, or {CREDENTIALS}"),
    (r"response code: (429|5\d\d)", "the server is not able to answer (HTTP {0})", AGAIN),
    (r"response code: (\d+)", "the server answers with HTTP {0}", "correct the address"),
    (r"Range downloading not supp", "the server gives no parts of files", "download it, and give the file"),
    (r"CURL error: Operation too slow|timed? ?out", "the server is too slow", f"{AGAIN}, or download it"),
    (r"CURL error: ([^\n]*)", "cannot reach the server ({0})", "correct the address, or give it again later"),
    (r"CREDENTIALS|AWS_SECRET|AZURE_STORAGE|not defined", "there are no credentials for it", CREDENTIALS),
    (r"does not exist|No such file", "there is nothing at this address", "correct it"),
    (r"not recognized", "it is no image that GDAL knows", "give the address of an image"),
)
BROKEN = "it did not come whole, or is damaged ({0})", "give it again, or download it and look"
SMALL = 1 << 26  # pixels of a TIFF that is fetched whole to see how it lies


def options(address: Address) -> dict[str, str]:
    """Of GDAL while such a file is opened. What users set themselves stays."""
    if not address.remote:
        return {}
    found = {"GDAL_NUM_THREADS": "1"}  # whatever users set: see `gdal.dataset`
    # Files beside it are not asked for, one by one. TRUE is ours (gdal.SETTINGS); YES would be a user's.
    if os.environ.get(LISTING, "TRUE") == "TRUE":
        found[LISTING] = "EMPTY_DIR"
    if address.secret and "CPL_VSIL_CURL_USE_HEAD" not in os.environ:
        found["CPL_VSIL_CURL_USE_HEAD"] = "NO"  # a signature is for GET
    return found


def fault(address: Address, text: str) -> tuple[str, str]:
    """What GDAL said, in words, and what to do."""
    for pattern, what, remedy in FAULTS:
        if match := re.search(pattern, text):
            return what.format(*match.groups()), remedy
    return BROKEN[0].format(address.without_secret(text)), BROKEN[1]


def fetched(address: Address, **how) -> Any:
    """The open dataset of a copy on this machine, which goes with it."""
    import rasterio.shutil

    folder = tempfile.mkdtemp(prefix="ktda_jax_")
    try:
        copy = os.path.join(folder, "copy")
        rasterio.shutil.copyfiles(os.fspath(address), copy)
        dataset = rasterio.open(copy, sharing=False, **how)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(dataset, shutil.rmtree, folder, ignore_errors=True)
    return dataset
