"""What goes wrong while answering, as people and programs are told of it. No torch."""

from minigpt4.errors import Kind, UserError

FULL = "Too many people are waiting at the moment; please try again soon."
BROKEN = "Something went wrong while answering; please try again."
NO_MEMORY = "There was not enough memory for this answer; try a shorter conversation."
HANGING = "The model stopped responding; please try again in a minute."
ENDING = "The program is ending."
KINDS: dict[str, Kind] = {
    FULL: "queue_full",
    BROKEN: "broken",
    NO_MEMORY: "memory",
    HANGING: "hanging",
    ENDING: "ending",
}


def fault(sentence: str) -> UserError:
    """One of the sentences above, as an error."""
    return UserError(sentence, KINDS[sentence])


def explain(error: Exception) -> UserError:
    """What people are told of an exception."""
    return fault(NO_MEMORY if out_of_memory(error) else BROKEN)


def out_of_memory(error: Exception) -> bool:
    """Python's own, or torch's (which is not imported for this)."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
