"""What the method raises for people."""


class AstraError(ValueError):
    """A request that the method cannot serve; the message names the module or field and what to do."""
