"""A griffe extension that turns the project's docstrings into Markdown.

They describe arguments, results and errors in lines `name: text`, with further lines indented.
Markdown would join such lines into one paragraph; here each is an item of a list.
"""

import re

import griffe

_ITEM = re.compile(r"([A-Za-z_]\w*(?:, \w+)*): (.*)")


class Arguments(griffe.Extension):
    """Make lists of the lines that describe arguments, in all docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return the docstring with its arguments as a list, and its errors in bold."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        item = _ITEM.fullmatch(line)
        # The first line is a sentence, which may begin as an item does: "ReRoPE: distances past".
        if item and lines and (inside or not lines[-1] or lines[-1].startswith("- ")):
            lines += [] if inside else [""]
            names = ", ".join(f"**{name}**" for name in item[1].split(", "))
            lines.append(f"- {names}: {item[2]}")
            inside = True
        else:
            inside = inside and line.startswith("    ")
            lines.append(re.sub(r"^(Raises|Returns)\b", r"**\1**", line))
    return "\n".join(lines)
