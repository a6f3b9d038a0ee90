"""How mkdocstrings reads this project's docstrings, which mark types and references as Hugging Face's do.

``name ([`~trl_dllm.Rollout`], *optional*)`` becomes ``name (Rollout, optional)``, and ``[`~trl.GRPOTrainer`]`` in a
text is code.
"""

import re

from griffe import Extension, Object


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    text = re.sub(r"\[`~?([\w.]+)`\]", lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    # The type of an argument: a line's first brackets, behind its name.
    return re.sub(r"^( *\w+(?:, \w+)*) \((.*)\):", lambda match: f"{match[1]} ({_type(match[2])}):", text, flags=re.M)


def _type(text: str) -> str:
    return re.sub(r"\*optional\*", "optional", text).replace("`", "")
