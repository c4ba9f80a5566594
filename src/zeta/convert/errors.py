"""`ConversionError`: what cannot be converted, and why."""


class ConversionError(ValueError):
    """A module, a state dict or a checkpoint cannot be converted; the message names what and why.

    Nothing has been changed when it is raised.
    """
