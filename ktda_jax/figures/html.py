"""One HTML file that holds all it shows: its styles, script and pictures. What comes from outside is to be escaped."""

import base64
import io
from html import escape

from PIL import Image

# No resource but what stands in the file: a browser enforces it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, body: str, *, style: str, script: str) -> str:
    """title: text; body, style, script: as they are."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body>\n{body}\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def uri(picture: Image.Image, kind: str, **options) -> str:
    """options: those with which Pillow saves that kind, 'png' or 'jpeg'."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
