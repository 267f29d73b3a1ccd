"""The one exception for what a user can put right.

It lives in the lowest room so that every room can raise it. The command line prints its message and exits
with code 2, without a traceback; any other exception is a defect of tessera and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in a recipe, a path, a file or an option.

    The message names the file, field or value, says what is allowed there, and the way out. It may have
    several lines: the first stands on its own, the others are indented.
    """
