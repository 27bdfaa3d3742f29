"""griffe: the project's docstrings as Markdown.

They describe an argument in a line `name: what it is`, with what follows indented, and so the
result and the errors. Markdown would join such lines into one paragraph; here each is an item.
"""

import re

import griffe

_ITEM = re.compile(r"([A-Za-z_]\w*(?:, \w+)*): (.*)")


class Arguments(griffe.Extension):
    """Makes lists of the lines of all docstrings that describe an argument."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring with its arguments as a list, and displayed formulas as code."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        item = _ITEM.fullmatch(line)
        if item and (inside or not lines or not lines[-1] or lines[-1].startswith("- ")):
            lines += [] if inside else [""]
            names = ", ".join(f"**{name}**" for name in item[1].split(", "))
            lines.append(f"- {names}: {item[2]}")
            inside = True
        else:
            inside = inside and line.startswith("    ")
            lines.append(line)
    return "\n".join(lines)
