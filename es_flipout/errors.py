"""Errors that the user can fix: the command line prints them as one line and exits with code 2."""


class UserError(ValueError):
    """A request of the user cannot be fulfilled; the message says what is wrong and what is allowed."""
