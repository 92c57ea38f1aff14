"""Errors that a user can mend: the command line shows them as one line and exits with code 2."""


class UserError(ValueError):
    """Something that the user asked for cannot be done; the message says what was wrong and what would be right."""
