"""Finding names in a text, fast: the almanac is asked for thousands of them."""

import re


def words(text):
    """The words of a text or a name, in lower case, with a space around each."""
    return " " + " ".join(re.findall(r"\w+", text.casefold().removeprefix("the "))) + " "


def found_in(text, names):
    """Those of the names that stand in the text, as whole words, in any case."""
    text = words(text)
    return {name for name in names if words(name) in text}
