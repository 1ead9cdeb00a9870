"""The errors that absorb shows to its users."""

from collections.abc import Callable

Say = Callable[[str], None]  # told in a sentence what is being done


class AbsorbError(ValueError):
    """One sentence for people: what was refused, which one it was, and what to do."""


class MisuseError(AbsorbError):
    """Options that are wrong, or wrong together, whatever the model is.

    Numbers in braces stand for the options in the sentence, and names in braces for other values.
    Python calls an option by its name, and a command by its flag.
    """

    def __init__(self, sentence: str, *options: str, **values: object):
        self.sentence, self.options, self.values = sentence, options, values
        super().__init__(self.calling(str))

    def calling(self, called: Callable[[str], str]) -> str:
        """The sentence, with every option as `called` calls it."""
        return self.sentence.format(*map(called, self.options), **self.values)


def is_failure(error: BaseException) -> bool:
    """Whether something failed, rather than that somebody stopped it.

    A panic in the Rust code of tokenizers is a BaseException, as an interrupt is.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
