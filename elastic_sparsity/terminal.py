"""Text on its way to a terminal: file names and messages as they are, but nothing in them that acts there."""

from rich.console import Console
from rich.markup import escape


def plain(text: str) -> str:
    """`text` with what cannot be shown (escape sequences, bytes that are no UTF-8) written as Python writes it."""
    return "".join(x if x.isprintable() or x == "\n" else repr(x)[1:-1] for x in text)


def title(text: str) -> str:
    """`plain` for where rich would read markup, as in the title of a table."""
    return escape(plain(text))


def say(text: str) -> None:
    """Prints one result to stdout, unwrapped; brackets are no markup."""
    Console(emoji=False, soft_wrap=True).print(plain(text), markup=False)
