"""Seeds as a function of identity: the same names give the same draw on every machine."""

import hashlib


def seed_of(*identity: str | int) -> int:
    """Return the seed of an identity, for example of `(seed, round, client, step)`.

    Returns:
        An integer in [0, 2**63): the leading 63 bits of the SHA-256 of the parts, each written
        with its type and length, so that `1` and `"1"`, or `"a", "b"` and `"ab"`, differ.
    """
    parts = ((type(part).__name__, str(part)) for part in identity)
    text = "".join(f"{kind}:{len(part)}:{part};" for kind, part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
