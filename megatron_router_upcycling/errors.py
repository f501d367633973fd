"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line: it names the flag or file and says what would work. Every command line
    entry prints it as ``error: MESSAGE`` on stderr, without a traceback, and exits with status 2.
    """
