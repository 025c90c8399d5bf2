"""PEFT adapter folders: read, checked against their base, written, merged into the base."""
