"""Names of users in messages."""

import pwd


def user_name(number: int) -> str:
    """Return the name of a user, or the number of one without a name here."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
