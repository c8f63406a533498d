"""The one kind of error a user may see."""


class UserError(Exception):
    """A mistake a user can mend: one sentence that says what is wrong and what to do."""
