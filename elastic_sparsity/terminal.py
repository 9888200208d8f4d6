"""Text to and from a terminal: file names and messages as they are, but nothing in them that acts there."""

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


def number_or_text(text: str) -> float | str:
    """A number of a command line; what is none goes on as text to the recipe's own check, which names it."""
    try:
        return float(text)
    except ValueError:
        return text.strip()
