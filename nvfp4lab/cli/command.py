"""What every command may raise."""


class CommandError(Exception):
    """A request that cannot be carried out; the message goes to the user, without a traceback."""
