"""The errors that are the user's to mend: a program prints them as one sentence, without a traceback."""


class UserError(Exception):
    """A mistake or a lack outside the program, told in one sentence: the thing, what was expected, what was found."""
