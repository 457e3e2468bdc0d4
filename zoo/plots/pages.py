"""The interactive pages: a template of this folder with its data in it, in one file."""

import html
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ..files import write_file


def write_page(path: str | os.PathLike[str], template: str, content: Mapping[str, Any], **texts: str) -> None:
    """Write a page that holds everything that it needs, loads nothing, and works from a disk without a network.

    Args:
        path: a `.html` file; its folder is made.
        template: name of a file of this folder, with the marks `{{DATA}}`, once, and before it one such as `{{TITLE}}` for each text.
        content: JSON values, for the script of the page.
        texts: for the marks of the same names.

    Raises:
        ValueError: if the content holds a number that is not finite.

    Example:
        >>> write_page("review.html", "review.html", {"classes": [], "items": []}, title="Labels to review", note="")
    """
    # Nothing but "<" could end the script that holds the data, and JSON has an escape for it.
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    head, tail = files(__package__).joinpath(template).read_text(encoding="utf-8").split("{{DATA}}")
    for name, text in texts.items():
        head = head.replace(f"{{{{{name.upper()}}}}}", html.escape(text))
    write_file(path, (head + data + tail).encode("utf-8", "backslashreplace"))  # file names need not be text
